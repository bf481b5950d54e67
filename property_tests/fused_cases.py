"""One call of the fused loss, and the same call written with the plain losses: shared by the fused tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sdpo
from sdpo.fused import _torch
from sdpo.fused import triton as kernels
from sdpo.fused._chunks import Backend
from sdpo.fused._types import GradLogits, Make, ModelChunk, Objective, TokenInputs, TokenStats

LEARNING = ("student_hidden", "student_head", "student_bias")
Answer = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of ``fused_topk_distillation_loss``, by name: tensors and scalars."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Case:
        tensors = {name: value for name, value in changes.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in changes.items() if name not in tensors}
        kept = {name: value for name, value in self.tensors.items() if name not in scalars}
        return replace(self, tensors=kept | tensors, scalars=self.scalars | scalars)

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(self, tensors={name: moved(value) for name, value in self.tensors.items()})

    def leaves(self) -> tuple[Case, list[Tensor]]:
        """The case over fresh leaves, and those of its tensors that learn."""
        learning = {
            name: self.tensors[name].detach().clone().requires_grad_()
            for name in LEARNING
            if name in self.tensors
        }
        return replace(self, tensors=self.tensors | learning), list(learning.values())

    def fused(self, **options: Any) -> sdpo.FusedOutput:
        return sdpo.fused_topk_distillation_loss(**self.tensors, **(self.scalars | options))

    def logits(self, model: str) -> Tensor:
        t, s = self.tensors, self.scalars
        products = t[f"{model}_hidden"] @ t[f"{model}_head"].mT
        if f"{model}_bias" in t:
            products = products + t[f"{model}_bias"]
        products = products * s.get("logit_scale", 1.0)
        cap = s.get("softcap")
        return (products if cap is None else cap * torch.tanh(products / cap)) / s["temperature"]

    def plain_per_token(self) -> tuple[Tensor, Tensor]:
        """Divergence and weight of every token, masked or not."""
        t, s = self.tensors, self.scalars
        student, teacher = self.logits("student"), self.logits("teacher")
        support = s.get("support", "student")
        if support == "sampled":
            divergence = sdpo.sampled_token_distillation_loss(student, teacher, t["tokens"])
        elif s["k"] is None:
            divergence = sdpo.full_distillation_loss(student, teacher, alpha=s["alpha"])
        else:
            divergence = sdpo.topk_distillation_loss(
                student, teacher, k=s["k"], alpha=s["alpha"], tail=s["tail"], support=support
            )
        weights = torch.ones_like(divergence).detach()
        if "old_log_probs" in t and s.get("is_clip") is not None:
            log_probs = student.log_softmax(-1).gather(-1, t["tokens"][..., None])[..., 0]
            weights = sdpo.importance_weights(log_probs, t["old_log_probs"], clip=s["is_clip"])
        return divergence, weights * t.get("extra_weights", torch.ones_like(weights))

    def plain_total(self) -> Tensor:
        divergence, weights = self.plain_per_token()
        mask = self.tensors["loss_mask"]
        return (weights[mask] * divergence[mask]).sum()


def make_case(
    seed: int = 0,
    *,
    n: int | tuple[int, ...] = 33,
    d: int = 17,
    teacher_d: int | None = None,
    v: int = 507,
    scale: float = 3.0,
    weights: bool = True,
    biases: bool = True,
    **scalars: Any,
) -> Case:
    """Float64 tensors with logits of standard deviation ``scale``; about a third of the tokens masked out."""
    rng = torch.Generator().manual_seed(seed)
    shape = n if isinstance(n, tuple) else (n,)
    teacher_d = teacher_d or d

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    tensors = {
        "student_hidden": normal(*shape, d),
        "student_head": normal(v, d) * (scale / d**0.5),
        "teacher_hidden": normal(*shape, teacher_d),
        "teacher_head": normal(v, teacher_d) * (scale / teacher_d**0.5),
        "tokens": torch.randint(v, shape, generator=rng),
        "loss_mask": torch.rand(*shape, generator=rng) < 0.7,
    }
    if biases:
        tensors |= {"student_bias": normal(v) * 0.3, "teacher_bias": normal(v) * 0.3}
    if weights:
        old = normal(*shape) - 8.0
        tensors["old_log_probs"] = old.masked_fill(torch.rand(*shape, generator=rng) < 0.2, float("nan"))
        tensors["extra_weights"] = torch.rand(*shape, generator=rng, dtype=torch.float64)
        scalars.setdefault("is_clip", 2.0)
    defaults = {"k": 20, "alpha": 0.5, "tail": "bucket", "temperature": 1.0}
    return Case(tensors, defaults | scalars)


RECIPE: dict[str, Any] = {
    "alpha": 0.5, "tail": "bucket", "support": "student", "is_clip": None, "temperature": 1.0, "softcap": None,
    "logit_scale": 1.0, "trust_region_coef": None,
}  # fmt: skip


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖, in float64; 0 if both vanish."""
    reference = reference.double()
    difference = (ours.to(reference.device).double() - reference).norm()
    return 0.0 if difference == 0.0 else (difference / reference.norm()).item()


def fused(case: Case, factor: float = 1.0, **options: Any) -> Answer:
    """Everything that must equal the plain losses: total, per-token values, gradients of ``factor · total``."""
    case, leaves = case.leaves()
    out = case.fused(backend="torch", **options)
    gradients = torch.autograd.grad(out.total * factor, leaves)
    names = [name for name in LEARNING if name in case.tensors]
    return {"total": out.total, "per_token": out.per_token} | dict(zip(names, gradients, strict=True))


def plain(case: Case, factor: float = 1.0) -> Answer:
    case, leaves = case.leaves()
    total = case.plain_total()
    divergence, _ = case.plain_per_token()
    names = [name for name in LEARNING if name in case.tensors]
    gradients = dict(zip(names, torch.autograd.grad(total * factor, leaves), strict=True))
    per_token = torch.where(case.tensors["loss_mask"], divergence, 0.0)
    return {"total": total, "per_token": per_token} | gradients


def assert_same(got: Answer, expected: Answer, tolerance: float = 1e-9) -> None:
    """Relative to the norm; what vanishes up to rounding may do so differently."""
    for name, value in expected.items():
        assert (got[name].double() - value.double()).norm() <= tolerance * value.norm() + 1e-12, name


def divide_by_the_mask(case: Case, **options: Any) -> Answer:
    """The twin that projects everything and multiplies by the mask afterwards: 0 · NaN is NaN."""
    mask = case.tensors["loss_mask"]
    whole = case.with_(loss_mask=torch.ones_like(mask))
    answer = fused(whole, **options)
    hidden = answer["student_hidden"] * mask[:, None]
    return answer | {"student_hidden": hidden, "per_token": answer["per_token"] * mask}


def in_turns(*sides: ModelChunk) -> list[Make]:
    """What makes the student's and the teacher's half, in one buffer: what was made first is then gone."""
    buffer = torch.empty_like(sides[0].products)
    return [partial(lambda side: side._replace(products=buffer.copy_(side.products)), side) for side in sides]


def side_by_side(*sides: ModelChunk) -> list[Make]:
    return [partial(lambda side: side._replace(products=side.products.clone()), side) for side in sides]


def slopes_of(
    chunk: Backend,
    k: int | None,
    logits: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    gain: Tensor | None = None,
    tokens: Tensor | None = None,
    lay_out: Callable[..., list[Make]] | None = None,
    **scalars: Any,
) -> Tensor:
    """A backend's slopes [c, V] for student's and teacher's logits [c, V], in a dtype, seen in float64.

    The logits lie in one buffer where the backend says that they may.
    """
    rows, vocabulary = logits[0].shape
    made = GradLogits(torch.empty(rows, vocabulary, dtype=dtype), gain)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    stats = torch.empty(len(TokenStats._fields), rows, dtype=working)
    recipe = Objective(k, **RECIPE | scalars)
    tokens = torch.arange(rows) if tokens is None else tokens
    if lay_out is None:
        may_take_turns = chunk is not _torch.chunk and kernels.take_turns(recipe, dtype)
        lay_out = in_turns if may_take_turns else side_by_side
    sides = lay_out(*(ModelChunk(side.to(working), None) for side in logits))
    chunk(*sides, TokenInputs(tokens, None, None, None, None), recipe, stats, made)
    return made.values.double()


def strangers(rows: int, vocabulary: int, scale: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(12)
    student, teacher = (torch.randn(rows, vocabulary, generator=rng) * scale for _ in range(2))
    return student, teacher


def certain_student() -> tuple[Tensor, Tensor]:
    """Logits of a student that is nearly certain of what its teacher doubts, and the teacher's."""
    student, teacher = strangers(24, 4000, 1.0)
    student[:, 0] = 20.0
    teacher[:, :2] = 20.0
    return student, teacher


def turns_error(chunk: Backend, dtype: torch.dtype, **scalars: Any) -> float:
    """Of a chunk's slopes, both models' logits in one buffer, against float64."""
    logits, gain = strangers(6, 507, 3.0), torch.ones(6)
    exact = slopes_of(_torch.chunk, 20, logits, torch.float64, **scalars)
    made = slopes_of(
        chunk, 20, logits, dtype, None if dtype == torch.float32 else gain, lay_out=in_turns, **scalars
    )
    return relative_error(gain[:, None] * made, exact)


def saturated_error(chunk: Backend, k: int | None) -> float:
    """Of the slopes of a nearly certain student, against float64."""
    exact = slopes_of(_torch.chunk, k, certain_student(), torch.float64)
    return relative_error(slopes_of(chunk, k, certain_student(), torch.float32), exact)


def far_apart() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Logits and sampled tokens: the likeliest, ones 100 nats below it, and with next to nothing outside."""
    student, teacher = strangers(6, 507, 3.0)
    tokens = student.argmax(dim=1)
    student[2:4, 0] -= 100.0
    tokens[2:4] = 0
    student[4:, 8:] -= 90.0
    tokens[4:] = 7
    return (student, teacher), tokens


def bf16_slopes_error(chunk: Backend, **scalars: Any) -> float:
    """The largest of a row's, against float64, relative to its length if it has any; infinite where NaN."""
    logits, tokens = far_apart()
    k, gain = scalars.pop("k", 8), torch.empty(len(tokens))
    exact = slopes_of(_torch.chunk, k, logits, torch.float64, tokens=tokens, **scalars)
    ours = slopes_of(chunk, k, logits, torch.bfloat16, gain, tokens, **scalars)
    error = (gain[:, None] * ours - exact).norm(dim=1) / (exact.norm(dim=1) + 1e-20)
    return error.nan_to_num(torch.inf).max().item()


def inexact_stats(
    chunk: Backend, *, made_of: bool, lost: float = 0.0, told: float = 0.0
) -> tuple[TokenStats, TokenStats]:
    """On products that are wrong in their sixth digit, and as they should be, in float64; the likeliest sampled.

    The products lack a share ``lost``, of which the backend is ``told``; it may know what they are made of.
    """
    rng = torch.Generator().manual_seed(14)
    hidden = torch.randn(2, 12, 64, generator=rng).bfloat16()
    hidden[1] = (hidden[0].float() + 0.1 * hidden[1].float()).bfloat16()
    head = (torch.randn(700, 64, generator=rng) * 1.5).bfloat16()
    bias = torch.randn(700, generator=rng)
    exact = hidden.double() @ head.double().t()
    noise = 0.0 if lost else 3e-6 * exact.std() * torch.randn(exact.shape, generator=rng)
    inexact = ((exact + noise) * (1.0 - lost)).float()
    rows = TokenInputs((exact[0] + bias).argmax(1), None, None, None, None)

    def stats(backend: Backend, products: Tensor, **known: Any) -> TokenStats:
        made = torch.empty(len(TokenStats._fields), 12, dtype=products.dtype)
        sides = (
            ModelChunk(products[i], bias, hidden[i] if made_of else None, head if made_of else None, **known)
            for i in range(2)
        )
        backend(*side_by_side(*sides), rows, Objective(50, **RECIPE | {"softcap": 90.0}), made, None)
        return TokenStats(*made.double())

    return stats(chunk, inexact, accumulation_bias=told), stats(_torch.chunk, exact.clone())


def value_error(chunk: Backend, *, made_of: bool = False, lost: float = 0.0, told: float = 0.0) -> float:
    """The median of a token's."""
    ours, exact = inexact_stats(chunk, made_of=made_of, accumulation_bias=lost, told=told)
    return ((ours.per_token - exact.per_token) / exact.per_token).abs().median().item()


def log_prob_error(chunk: Backend, *, made_of: bool) -> float:
    """The largest of a likeliest token's log-probability, in nats; infinite where that is positive."""
    ours, exact = inexact_stats(chunk, made_of=made_of)
    found, known = (torch.stack([of.log_probs, of.teacher_log_probs]) for of in (ours, exact))
    return torch.inf if (found > 1e-7).any() else (found - known).abs().max().item()


def outside_error(chunk: Backend, *, made_of: bool = True) -> float:
    """The largest of a token's value where tokens outside the support are what the teacher thinks of besides.

    The products are wrong in their sixth digit, and the backend may know what they are made of.
    """
    rng = torch.Generator().manual_seed(15)
    hidden = torch.randn(2, 600, 64, generator=rng).bfloat16()
    hidden[1] = (hidden[0].float() + 0.4 * hidden[1].float()).bfloat16()
    head = (torch.randn(700, 64, generator=rng) * 1.5).bfloat16()
    exact = hidden.double() @ head.double().t()
    support = exact[0].topk(2).indices
    left, outside = (side.softmax(1).scatter(1, support, 0.0).sum(1) for side in exact)
    seen = ((left < 0.01 * outside) & (outside > 0.01) & (outside < 0.9)).nonzero().flatten()
    assert len(seen) >= 8
    hidden, exact = hidden[:, seen], exact[:, seen]
    inexact = (exact + 3e-6 * exact.std() * torch.randn(exact.shape, generator=rng)).float()
    rows = TokenInputs(torch.zeros(len(seen), dtype=torch.long), None, None, None, None)

    def values(backend: Backend, products: Tensor) -> Tensor:
        made = torch.empty(len(TokenStats._fields), len(seen), dtype=products.dtype)
        sides = (ModelChunk(products[i], None, *((hidden[i], head) if made_of else ())) for i in range(2))
        backend(*side_by_side(*sides), rows, Objective(2, **RECIPE), made, None)
        return made[0].double()

    ours, known = values(chunk, inexact), values(_torch.chunk, exact.clone())
    return ((ours - known) / known).abs().max().item()


def lost_length(chunk: Backend, k: int | None) -> tuple[float, float]:
    """How much longer or shorter a row of slopes, seen along itself, is in bf16: with its gain, and without."""
    logits, gain = strangers(16, 507, 8.0), torch.empty(16)
    exact = slopes_of(chunk, k, logits, torch.float32)
    along = (slopes_of(chunk, k, logits, torch.bfloat16, gain) * exact).sum(1) / exact.square().sum(1)
    return (gain * along - 1).abs().max().item(), (along - 1).abs().max().item()


def hidden_breaks(chunk: Backend) -> float:
    """Share of losses in which a single broken logit, the teacher's or the student's, does not show."""
    hidden = 0
    for broken in range(2):
        for k, support in ((20, "student"), (20, "teacher"), (None, "student")):
            logits = strangers(3, 507, 3.0)
            logits[broken][1, 300] = torch.nan
            stats = torch.empty(len(TokenStats._fields), 3)
            rows = TokenInputs(torch.zeros(3, dtype=torch.long), None, None, None, None)
            chunk(
                *side_by_side(*(ModelChunk(z, None) for z in logits)),
                rows,
                Objective(k, **RECIPE | {"support": support}),
                stats,
                None,
            )
            hidden += stats[0].isnan().tolist() != [False, True, False]
    return hidden / 6

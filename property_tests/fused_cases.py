"""One call of the fused loss, and the same call written with the plain loss: shared by the fused tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sdpo
from sdpo.fused import _torch
from sdpo.fused._types import (
    ChunkLoss,
    GradLogits,
    ModelChunk,
    Objective,
    PolicyInputs,
    Project,
    Surrogate,
    TokenInputs,
    TokenStats,
)

TRAINABLE = ("student_hidden", "student_weight", "student_bias")
HEAD_PARTS = ("hidden", "weight", "bias")
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of ``fused_distillation_loss``: tensors by name, those of an LMHead as ``student_hidden`` etc."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Case:
        """The case with other arguments; None removes a tensor, a support without k and tail removes those."""
        others = {name: value for name, value in self.tensors.items() if name not in changes}
        tensors = {name: value for name, value in changes.items() if isinstance(value, Tensor)}
        removed = {name for name, value in changes.items() if value is None and name in self.tensors}
        scalars = {name: value for name, value in changes.items() if name not in removed | tensors.keys()}
        if scalars.get("support") in ("full", "sampled"):
            scalars = {"k": None, "tail": None} | scalars
        kept = {name: value for name, value in self.scalars.items() if name not in tensors}
        return replace(self, tensors=others | tensors, scalars=kept | scalars)

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(self, tensors={name: moved(value) for name, value in self.tensors.items()})

    def leaves(self) -> tuple[Case, list[Tensor]]:
        """The case over fresh leaves, and its trainable tensors."""
        trainable = {
            name: self.tensors[name].detach().clone().requires_grad_()
            for name in TRAINABLE
            if name in self.tensors
        }
        return replace(self, tensors=self.tensors | trainable), list(trainable.values())

    def arguments(self) -> dict[str, Any]:
        """Of ``fused_distillation_loss``, by name. A reference without a weight has the teacher's head."""
        tensors = dict(self.tensors)
        if "reference_hidden" in tensors and "reference_weight" not in tensors:
            shared = {f"reference_{part}": tensors.get(f"teacher_{part}") for part in HEAD_PARTS[1:]}
            tensors |= {name: value for name, value in shared.items() if value is not None}
        heads: dict[str, Any] = {}
        if "teacher_ids" in tensors:
            heads["teacher"] = sdpo.TeacherTopK(tensors.pop("teacher_ids"), tensors.pop("teacher_log_probs"))
        for model in ("student", "teacher", "reference"):
            if f"{model}_hidden" in tensors:
                parts = (tensors.pop(f"{model}_{part}", None) for part in HEAD_PARTS)
                heads[model] = sdpo.LMHead(*parts)  # type: ignore[arg-type]
        return heads | tensors | self.scalars

    def fused(self, **options: Any) -> sdpo.FusedOutput:
        return sdpo.fused_distillation_loss(**(self.arguments() | options))

    def logits(self, model: str) -> Tensor:
        """A model's logits before they are divided by the temperature."""
        t, s = self.tensors, self.scalars
        products = t[f"{model}_hidden"] @ t[f"{model}_weight"].mT
        if f"{model}_bias" in t:
            products = products + t[f"{model}_bias"]
        products = products * s.get("logit_scale", 1.0)
        cap = s.get("softcap")
        return products if cap is None else cap * torch.tanh(products / cap)

    def log_probs(self, model: str) -> Tensor:
        return torch.log_softmax(self.logits(model) / self.scalars["temperature"], -1)

    def plain_per_token(self) -> tuple[Tensor, Tensor]:
        """Divergence and weight of every token, masked or not."""
        t, s = self.tensors, self.scalars
        student, options = (
            self.logits("student"),
            {name: s[name] for name in ("tail", "alpha", "temperature")},
        )
        if s["support"] == "given":
            divergence = sdpo.given_topk_distillation_loss(
                student, t["teacher_ids"], t["teacher_log_probs"], **options
            )
        else:
            options |= {"support": s["support"], "k": s["k"]}
            divergence = sdpo.distillation_loss(
                student, self.logits("teacher"), tokens=t["tokens"], **options
            )
        weights = torch.ones_like(divergence).detach()
        if "old_log_probs" in t and s.get("is_clip") is not None:
            log_probs = self.log_probs("student").gather(-1, t["tokens"][..., None])[..., 0]
            weights = sdpo.importance_weights(log_probs, t["old_log_probs"], clip=s["is_clip"])
        return divergence, weights * t.get("weights", torch.ones_like(weights))

    def plain_policy_loss(self) -> Tensor:
        """Clipped surrogate of every token, masked or not; without a known old policy the ratio is 1."""
        t, s = self.tensors, self.scalars
        log_probs = self.log_probs("student").gather(-1, t["tokens"][..., None])[..., 0]
        old = t.get("old_log_probs", log_probs.detach())
        return sdpo.clipped_policy_gradient(
            log_probs, old, t["advantages"], clip_low=s["clip_low"], clip_high=s["clip_high"]
        )

    def plain_total(self) -> Tensor:
        divergence, weights = self.plain_per_token()
        mask = self.tensors["loss_mask"]
        if "advantages" not in self.tensors:
            return (weights[mask] * divergence[mask]).sum()
        share = self.tensors.get("policy_weight", self.scalars.get("policy_weight"))
        policy = self.tensors.get("weights", torch.ones_like(divergence)) * self.plain_policy_loss()
        return (share * policy + (1.0 - share) * weights * divergence)[mask].sum()


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
        "student_weight": normal(v, d) * (scale / d**0.5),
        "teacher_hidden": normal(*shape, teacher_d),
        "teacher_weight": normal(v, teacher_d) * (scale / teacher_d**0.5),
        "tokens": torch.randint(v, shape, generator=rng),
        "loss_mask": torch.rand(*shape, generator=rng) < 0.7,
    }
    if biases:
        tensors |= {"student_bias": normal(v) * 0.3, "teacher_bias": normal(v) * 0.3}
    if weights:
        old = normal(*shape) - 8.0
        tensors["old_log_probs"] = old.masked_fill(torch.rand(*shape, generator=rng) < 0.2, float("nan"))
        tensors["weights"] = torch.rand(*shape, generator=rng, dtype=torch.float64)
        scalars.setdefault("is_clip", 2.0)
    defaults = {"support": "student", "k": 20, "tail": "bucket", "alpha": 0.5, "temperature": 1.0}
    if scalars.get("support") == "sampled":
        defaults["alpha"] = 1.0
    return Case(tensors, defaults).with_(**scalars)


def with_given_teacher(case: Case, k: int, tail: str = "bucket") -> Case:
    """The case with the top K of its teacher, as a server gives them, in place of the teacher."""
    log_probs = case.log_probs("teacher").detach()
    ids = log_probs.topk(k, dim=-1).indices
    tensors = {name: value for name, value in case.tensors.items() if not name.startswith("teacher")}
    return Case(
        tensors | {"teacher_ids": ids, "teacher_log_probs": log_probs.gather(-1, ids)},
        case.scalars | {"support": "given", "k": None, "tail": tail},
    )


def with_policy(case: Case, seed: int = 0, *, weight: float | None = None, **scalars: Any) -> Case:
    """The case with a policy gradient near on-policy, its weight a number or, if None, a tensor [...].

    Half of the sampled tokens are the student's likeliest.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = case.tensors["tokens"].shape

    def normal() -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    log_probs = case.log_probs("student").detach()
    likeliest = torch.rand(shape, generator=rng) < 0.5
    tokens = torch.where(likeliest, log_probs.argmax(-1), case.tensors["tokens"])
    old = log_probs.gather(-1, tokens[..., None])[..., 0] + 0.4 * normal()
    return case.with_(
        tokens=tokens,
        old_log_probs=old.masked_fill(torch.rand(shape, generator=rng) < 0.2, float("nan")),
        advantages=normal(),
        policy_weight=torch.rand(shape, generator=rng, dtype=torch.float64) if weight is None else weight,
        **({"clip_low": 0.2, "clip_high": 0.28} | scalars),
    )


def make_objective(**changes: Any) -> Objective:
    scalars: dict[str, Any] = {
        "support": "student", "k": 20, "tail": "bucket", "alpha": 0.5, "is_clip": None, "temperature": 1.0,
        "softcap": None, "logit_scale": 1.0, "trust_region_coef": None,
    }  # fmt: skip
    if changes.get("support") in ("full", "sampled"):
        scalars |= {"k": None, "tail": None}
    return Objective(**(scalars | changes))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖, in float64; 0 if both vanish."""
    reference = reference.double()
    difference = (ours.to(reference.device).double() - reference).norm()
    return 0.0 if difference == 0.0 else (difference / reference.norm()).item()


def fused(case: Case, factor: float = 1.0, **options: Any) -> Result:
    """Everything that must equal the plain loss: total, per-token values, gradients of ``factor · total``."""
    case, leaves = case.leaves()
    out = case.fused(backend="torch", **options)
    gradients = torch.autograd.grad(out.total * factor, leaves)
    names = [name for name in TRAINABLE if name in case.tensors]
    return {"total": out.total, "per_token": out.per_token} | dict(zip(names, gradients, strict=True))


def plain(case: Case, factor: float = 1.0) -> Result:
    case, leaves = case.leaves()
    total = case.plain_total()
    divergence, _ = case.plain_per_token()
    names = [name for name in TRAINABLE if name in case.tensors]
    gradients = dict(zip(names, torch.autograd.grad(total * factor, leaves), strict=True))
    per_token = torch.where(case.tensors["loss_mask"], divergence, 0.0)
    return {"total": total, "per_token": per_token} | gradients


def assert_same(actual: Result, expected: Result, tolerance: float = 1e-9) -> None:
    """Relative to the norm; values that vanish up to rounding may do so differently."""
    for name, value in expected.items():
        assert (actual[name].double() - value.double()).norm() <= tolerance * value.norm() + 1e-12, name


def multiply_by_the_mask(case: Case, **options: Any) -> Result:
    """A counter-example: projects every token and multiplies by the mask afterwards, where 0 · NaN is NaN."""
    mask = case.tensors["loss_mask"]
    weights = case.tensors["weights"].nan_to_num()  # others are refused
    whole = case.with_(loss_mask=torch.ones_like(mask), weights=weights)
    result = fused(whole, **options)
    hidden = result["student_hidden"] * mask[:, None]
    return result | {"student_hidden": hidden, "per_token": result["per_token"] * mask}


# --- one chunk: a backend is called with logits or products ----------------------------------------------------


def token_inputs(tokens: Tensor, *, policy: bool = False) -> TokenInputs:
    """Sampled tokens without weights; with ``policy`` each has an on-policy gradient of a weight of its own."""
    count = len(tokens)
    inputs = PolicyInputs(torch.ones(count), torch.linspace(0.5, 2.0, count)) if policy else None
    return TokenInputs(tokens, None, None, None, None, inputs)


def projections(*models: ModelChunk, shared_buffer: bool = False) -> list[Project]:
    """Functions that compute the models' products: copies, in one buffer that the later overwrites if shared."""
    buffers = [torch.empty_like(models[0].products)] * 2 if shared_buffer else [None] * 2

    def project(model: ModelChunk, buffer: Tensor | None) -> ModelChunk:
        products = model.products.clone() if buffer is None else buffer.copy_(model.products)
        return model._replace(products=products)

    return [partial(project, model, buffer) for model, buffer in zip(models, buffers, strict=True)]


def chunk_stats(
    chunk_loss: ChunkLoss, student: ModelChunk, teacher: ModelChunk, tokens: Tensor, objective: Objective
) -> TokenStats:
    """A backend's statistics without a gradient, in float64. It overwrites the products, so it gets copies."""
    stats = torch.empty(len(TokenStats._fields), len(tokens), dtype=student.products.dtype)
    chunk_loss(*projections(student, teacher), token_inputs(tokens), objective, stats, None)
    return TokenStats(*stats.double())


def chunk_grad(
    chunk_loss: ChunkLoss,
    logits: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    tokens: Tensor | None = None,
    *,
    shared_buffer: bool = False,
    policy: bool = False,
    **objective: Any,
) -> Tensor:
    """A backend's gradient [C, V] for student's and teacher's logits [C, V], written in ``dtype``, as float64."""
    count, vocabulary = logits[0].shape
    grad_logits = GradLogits(torch.empty(count, vocabulary, dtype=dtype), row_scale)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    stats = torch.empty(len(TokenStats._fields), count, dtype=working)
    tokens = torch.arange(count) if tokens is None else tokens
    models = projections(
        *(ModelChunk(products.to(working), None) for products in logits), shared_buffer=shared_buffer
    )
    if policy:
        objective |= {"surrogate": Surrogate("clipped", 0.2, 0.2, (1.0, 1.0))}
    inputs = token_inputs(tokens, policy=policy)
    chunk_loss(*models, inputs, make_objective(**objective), stats, grad_logits)
    return grad_logits.values.double()


def independent_logits(count: int, vocabulary: int, scale: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(12)
    student, teacher = (torch.randn(count, vocabulary, generator=rng) * scale for _ in range(2))
    return student, teacher


def certain_student_logits() -> tuple[Tensor, Tensor]:
    """Logits of a student that is nearly certain of a token its teacher gives one half, and the teacher's."""
    student, teacher = independent_logits(24, 4000, 1.0)
    student[:, 0] = 20.0
    teacher[:, :2] = 20.0
    return student, teacher


def shared_buffer_error(chunk_loss: ChunkLoss, dtype: torch.dtype, **objective: Any) -> float:
    """Error of the gradient in ``dtype`` with both models' products in one buffer, against float64."""
    logits, row_scale = independent_logits(6, 507, 3.0), torch.ones(6)
    exact = chunk_grad(_torch.chunk_loss, logits, torch.float64, **objective)
    ours = chunk_grad(
        chunk_loss,
        logits,
        dtype,
        None if dtype == torch.float32 else row_scale,
        shared_buffer=True,
        **objective,
    )
    return relative_error(row_scale[:, None] * ours, exact)


def certain_student_error(chunk_loss: ChunkLoss, **objective: Any) -> float:
    """Error of the gradient of a nearly certain student, against float64."""
    exact = chunk_grad(_torch.chunk_loss, certain_student_logits(), torch.float64, **objective)
    return relative_error(chunk_grad(chunk_loss, certain_student_logits(), torch.float32, **objective), exact)


def logits_far_from_sampled() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Logits and sampled tokens: the likeliest; ones 100 nats below it; with almost nothing outside the support."""
    student, teacher = independent_logits(6, 507, 3.0)
    tokens = student.argmax(dim=1)
    student[2:4, 0] -= 100.0
    tokens[2:4] = 0
    student[4:, 8:] -= 90.0
    tokens[4:] = 7
    return (student, teacher), tokens


def bf16_grad_error(chunk_loss: ChunkLoss, **objective: Any) -> float:
    """The largest error of a token's bf16 gradient, against float64, relative to its length; infinite where NaN."""
    logits, tokens = logits_far_from_sampled()
    if objective.get("support") != "sampled":
        objective = {"k": 8} | objective
    row_scale = torch.empty(len(tokens))
    exact = chunk_grad(_torch.chunk_loss, logits, torch.float64, tokens=tokens, **objective)
    ours = chunk_grad(chunk_loss, logits, torch.bfloat16, row_scale, tokens, **objective)
    error = (row_scale[:, None] * ours - exact).norm(dim=1) / (exact.norm(dim=1) + 1e-20)
    return error.nan_to_num(torch.inf).max().item()


def bf16_length_errors(chunk_loss: ChunkLoss, **objective: Any) -> tuple[float, float]:
    """Errors of a token's bf16 gradient in length, projected on the exact one: with row scale, and without."""
    logits, row_scale = independent_logits(16, 507, 8.0), torch.empty(16)
    exact = chunk_grad(chunk_loss, logits, torch.float32, **objective)
    ours = chunk_grad(chunk_loss, logits, torch.bfloat16, row_scale, **objective)
    projection = (ours * exact).sum(1) / exact.square().sum(1)
    return (row_scale * projection - 1).abs().max().item(), (projection - 1).abs().max().item()


def stats_of_inexact_products(
    chunk_loss: ChunkLoss, *, with_factors: bool, bias: float, known_bias: float
) -> tuple[TokenStats, TokenStats]:
    """A backend's statistics on products with an error in the sixth digit, and float64's on exact ones.

    The sampled tokens are the likeliest. With an accumulation ``bias`` the error is that; the backend is given
    ``known_bias`` as its value, and, ``with_factors``, what the products are made of.
    """
    rng = torch.Generator().manual_seed(14)
    hidden = torch.randn(2, 12, 64, generator=rng).bfloat16()
    hidden[1] = (hidden[0].float() + 0.1 * hidden[1].float()).bfloat16()
    weight = (torch.randn(700, 64, generator=rng) * 1.5).bfloat16()
    head_bias = torch.randn(700, generator=rng)
    exact = hidden.double() @ weight.double().t()
    noise = 0.0 if bias else 3e-6 * exact.std() * torch.randn(exact.shape, generator=rng)
    inexact = ((exact + noise) * (1.0 - bias)).float()
    tokens, objective = (exact[0] + head_bias).argmax(1), make_objective(k=50, softcap=90.0)

    def stats(backend: ChunkLoss, products: Tensor, accumulation_bias: float) -> TokenStats:
        factors = [(hidden[i], weight) if with_factors else (None, None) for i in range(2)]
        student, teacher = (
            ModelChunk(products[i], head_bias, *factors[i], accumulation_bias) for i in range(2)
        )
        return chunk_stats(backend, student, teacher, tokens, objective)

    return stats(chunk_loss, inexact, known_bias), stats(_torch.chunk_loss, exact, 0.0)


def per_token_error(
    chunk_loss: ChunkLoss, *, with_factors: bool = False, bias: float = 0.0, known_bias: float = 0.0
) -> float:
    """The median error of a token's loss on inexact products."""
    ours, exact = stats_of_inexact_products(
        chunk_loss, with_factors=with_factors, bias=bias, known_bias=known_bias
    )
    return ((ours.per_token - exact.per_token) / exact.per_token).abs().median().item()


def log_prob_error(chunk_loss: ChunkLoss, *, with_factors: bool) -> float:
    """The largest error of a likeliest token's log-probability, in nats; infinite where that is positive."""
    ours, exact = stats_of_inexact_products(chunk_loss, with_factors=with_factors, bias=0.0, known_bias=0.0)
    actual, expected = (torch.stack([of.log_probs, of.teacher_log_probs]) for of in (ours, exact))
    return torch.inf if (actual > 1e-7).any() else (actual - expected).abs().max().item()


def likely_outside_error(chunk_loss: ChunkLoss) -> float:
    """The largest error of a token's loss where the teacher has likely tokens outside the student's support.

    The products have an error in the sixth digit; the backend is given their factors.
    """
    rng = torch.Generator().manual_seed(15)
    hidden = torch.randn(2, 600, 64, generator=rng).bfloat16()
    hidden[1] = (hidden[0].float() + 0.4 * hidden[1].float()).bfloat16()
    weight = (torch.randn(700, 64, generator=rng) * 1.5).bfloat16()
    exact = hidden.double() @ weight.double().t()
    support = exact[0].topk(2).indices
    student_outside, teacher_outside = (z.softmax(1).scatter(1, support, 0.0).sum(1) for z in exact)
    suitable = (student_outside < 0.01 * teacher_outside) & (teacher_outside > 0.01) & (teacher_outside < 0.9)
    suitable = suitable.nonzero().flatten()
    assert len(suitable) >= 8
    hidden, exact = hidden[:, suitable], exact[:, suitable]
    inexact = (exact + 3e-6 * exact.std() * torch.randn(exact.shape, generator=rng)).float()
    tokens, objective = torch.zeros(len(suitable), dtype=torch.long), make_objective(k=2)

    def per_token(backend: ChunkLoss, products: Tensor) -> Tensor:
        student, teacher = (ModelChunk(products[i], None, hidden[i], weight) for i in range(2))
        return chunk_stats(backend, student, teacher, tokens, objective).per_token

    ours, expected = per_token(chunk_loss, inexact), per_token(_torch.chunk_loss, exact)
    return ((ours - expected) / expected).abs().max().item()


def hidden_nan_share(chunk_loss: ChunkLoss) -> float:
    """Share of losses in which a single NaN logit, the teacher's or the student's, does not show."""
    hidden = 0
    for model in range(2):
        for support in ("student", "teacher", "full"):
            logits = independent_logits(3, 507, 3.0)
            logits[model][1, 300] = torch.nan
            student, teacher = (ModelChunk(z, None) for z in logits)
            tokens = torch.zeros(3, dtype=torch.long)
            stats = chunk_stats(chunk_loss, student, teacher, tokens, make_objective(support=support))
            hidden += stats.per_token.isnan().tolist() != [False, True, False]
    return hidden / 6

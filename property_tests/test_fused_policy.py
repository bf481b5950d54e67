"""The policy gradient in the fused loss: against its definition token by token, the plain surrogate, and TRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_cases import (
    TRAINABLE,
    Case,
    Result,
    assert_same,
    chunk_grad,
    fused,
    make_case,
    relative_error,
    with_policy,
)
from hypothesis import strategies as st
from strategies import Claim, alphas, name_of, seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdpo
from sdpo.fused import _torch
from sdpo.fused._policy import policy_term
from sdpo.fused._types import Surrogate

SUPPORTS: list[dict[str, Any]] = [
    *(
        {"support": owner, "tail": tail}
        for owner in ("student", "teacher")
        for tail in ("bucket", "renormalize")
    ),
    {"support": "full"},
    {"support": "sampled"},
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    support = draw(st.sampled_from(SUPPORTS))
    if "tail" in support:
        support = support | {"k": draw(st.sampled_from([1, 4, 63]))}
    case = make_case(
        draw(seeds),
        n=draw(st.sampled_from([(5,), (2, 4)])),
        d=5,
        v=64,
        scale=draw(st.sampled_from([0.5, 3.0])),
        weights=draw(st.booleans()),
        biases=draw(st.booleans()),
        **support,
        alpha=1.0 if support["support"] == "sampled" else draw(alphas),
        temperature=draw(st.sampled_from([1.0, 0.6])),
        softcap=draw(st.sampled_from([None, 10.0])),
        logit_scale=draw(st.sampled_from([1.0, 1.4])),
    )
    return with_policy(case, draw(seeds), weight=draw(st.sampled_from([None, None, 0.3, 1.0])))


def by_definition(case: Case, factor: float) -> Result:
    """The total as a sum over the active tokens, each from its own logits."""
    case, leaves = case.leaves()
    t, s = case.tensors, case.scalars
    divergence, weights = case.plain_per_token()
    total = torch.zeros((), dtype=torch.float64)
    policy_loss = torch.zeros(t["tokens"].shape, dtype=torch.float64)
    logits = case.logits("student") / s["temperature"]
    for index in t["loss_mask"].nonzero().tolist():
        at = tuple(index)
        log_prob = logits[at][t["tokens"][at]] - logits[at].exp().sum().log()
        old = t["old_log_probs"][at].item()
        ratio = (log_prob - (log_prob.item() if math.isnan(old) else old)).exp()
        advantage = t["advantages"][at].item()
        in_range = min(max(ratio.item(), 1.0 - s["clip_low"]), 1.0 + s["clip_high"])
        unclipped, clipped = ratio * advantage, torch.tensor(in_range * advantage, dtype=torch.float64)
        loss = -(unclipped if unclipped.item() <= clipped.item() + 1e-15 else clipped)
        policy_loss[at] = loss.detach()
        share = t["policy_weight"][at].item() if "policy_weight" in t else s["policy_weight"]
        weight = t["weights"][at].item() if "weights" in t else 1.0
        total = total + share * weight * loss + (1.0 - share) * weights[at] * divergence[at]
    names = [name for name in TRAINABLE if name in t]
    gradients = dict(zip(names, torch.autograd.grad(total * factor, leaves), strict=True))
    per_token = torch.where(t["loss_mask"], divergence.detach(), 0.0)
    return {"total": total.detach(), "per_token": per_token, "policy_loss": policy_loss} | gradients


def fused_with_policy(case: Case, factor: float, **options: Any) -> Result:
    return fused(case, factor, **options) | {"policy_loss": case.fused(backend="torch").policy_loss}


def property_equals_the_definition(implementation: Callable[..., Result], case: Case, chunk: int) -> None:
    assert_same(implementation(case, 1.7, chunk_size=chunk), by_definition(case, 1.7))


def without_the_softmax(case: Case, factor: float, **options: Any) -> Result:
    original = _torch._add_policy_gradient

    def add(scale: Tensor, inside: Tensor, tail: Tensor, is_token: Tensor, *log_probs: Tensor) -> Any:
        _, _, at_token = original(scale, inside, tail, is_token, *log_probs)
        return inside + scale[:, None] * is_token, tail, at_token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "_add_policy_gradient", add)
        return fused_with_policy(case, factor, **options)


def without_the_sampled_token_outside(case: Case, factor: float, **options: Any) -> Result:
    original = _torch._write_grad_logits

    def write(*args: Any) -> None:
        original(*args[:-1], None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "_write_grad_logits", write)
        return fused_with_policy(case, factor, **options)


def weighing_the_policy_only(case: Case, factor: float, **options: Any) -> Result:
    """λ · policy loss + divergence."""
    right, out = fused_with_policy(case, factor, **options), case.fused(backend="torch")
    share = case.tensors.get("policy_weight", torch.tensor(case.scalars.get("policy_weight", 0.0)))
    rest = (share * out.weights / (1.0 - share) * out.per_token).nan_to_num(0.0).sum()
    return right | {"total": right["total"] + rest}


def without_a_range(case: Case, factor: float, **options: Any) -> Result:
    return fused_with_policy(case.with_(clip_low=1.0, clip_high=math.inf), factor, **options)


def property_per_token_losses_let_the_caller_reduce(
    implementation: Callable[..., Tensor], case: Case
) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, *case.tensors["tokens"].shape, generator=rng, dtype=torch.float64)
    leafed, leaves = case.leaves()
    ours = torch.autograd.grad(implementation(leafed, a, b), leaves)
    leafed, leaves = case.leaves()
    mask = case.tensors["loss_mask"]
    plain = (a * leafed.plain_per_token()[0] + b * leafed.plain_policy_loss())[mask].sum()
    for left, right in zip(ours, torch.autograd.grad(plain, leaves), strict=True):
        assert relative_error(left, right) < 1e-9


def reduced(case: Case, a: Tensor, b: Tensor) -> Tensor:
    out = case.fused(backend="torch", reduction="none", chunk_size=3)
    assert out.policy_loss is not None
    return (a * out.per_token).sum() + (b * out.policy_loss).sum()


def reduced_with_one_factor(case: Case, a: Tensor, b: Tensor) -> Tensor:
    return reduced(case, a, a)


RIGHT_AND_WRONG: list[tuple[Callable[..., None], Callable[..., Any], dict[str, Any], list[Any]]] = [
    (
        property_equals_the_definition,
        fused_with_policy,
        {"case": cases(), "chunk": st.sampled_from([1, 3, 1000])},
        [
            without_the_softmax,
            without_the_sampled_token_outside,
            weighing_the_policy_only,
            without_a_range,
        ],
    ),
    (
        property_per_token_losses_let_the_caller_reduce,
        reduced,
        {"case": cases().filter(lambda case: bool(case.tensors["loss_mask"].any()))},
        [reduced_with_one_factor],
    ),
]
CLAIMS = [
    Claim(check, right, wrong, drawn)
    for check, right, drawn, counter_examples in RIGHT_AND_WRONG
    for wrong in counter_examples
]


@pytest.mark.parametrize("claim", {claim.check: claim for claim in CLAIMS}.values(), ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{name_of(claim)}-{claim.wrong.__name__}")
def test_counter_examples_are_rejected(claim: Claim) -> None:
    claim.rejects_counter_example()


# ---- the ends of the weight ----------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations on tensors, and the matrix products among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def run(case: Case) -> tuple[list[Tensor], Operations]:
    case, leaves = case.leaves()
    with Operations() as operations:
        out = case.fused(backend="torch", chunk_size=4)
        gradients = torch.autograd.grad(out.total, leaves)
    return [out.total, out.per_token, out.weights, *gradients], operations


@pytest.mark.parametrize("scalars", SUPPORTS, ids=str)
def test_a_weight_of_0_is_the_loss_without_a_policy_gradient(scalars: dict[str, Any]) -> None:
    case = with_policy(make_case(1, n=9, v=64, **scalars), weight=0.0)
    left_out = ("advantages", "policy_weight", "clip_low", "clip_high")
    plain = Case(
        {name: value for name, value in case.tensors.items() if name not in left_out},
        {name: value for name, value in case.scalars.items() if name not in left_out},
    )
    out = case.fused()
    assert out.policy_loss is out.policy_weights is None
    assert out.metrics.keys() == plain.fused().metrics.keys()
    ours, operations = run(case)
    expected, plain_operations = run(plain)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    # The values of advantages are checked: a handful of operations, whatever the number of chunks.
    assert operations.count <= plain_operations.count + 16
    assert operations.products == plain_operations.products
    # Nor does a policy gradient need more products.
    assert run(with_policy(case, weight=0.5))[1].products == plain_operations.products


@pytest.mark.parametrize("scalars", SUPPORTS, ids=str)
def test_a_weight_of_1_is_the_clipped_surrogate(scalars: dict[str, Any]) -> None:
    case, leaves = with_policy(make_case(2, n=9, v=64, **scalars), weight=1.0).leaves()
    expected = (case.tensors["weights"] * case.plain_policy_loss())[case.tensors["loss_mask"]].sum()
    out = case.fused(backend="torch")
    assert relative_error(out.total, expected) < 1e-12
    for left, right in zip(
        torch.autograd.grad(out.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert relative_error(left, right) < 1e-10


def test_without_old_log_probs_it_is_on_policy() -> None:
    case = with_policy(make_case(3, n=9, v=64, weights=False), weight=1.0)
    tensors = {name: value for name, value in case.tensors.items() if name != "old_log_probs"}
    case, leaves = Case(tensors, case.scalars | {"clip_low": None, "clip_high": None}).leaves()
    mask, advantages = case.tensors["loss_mask"], case.tensors["advantages"]
    out = case.fused(backend="torch")
    assert torch.equal(out.policy_loss, torch.where(mask, -advantages, 0.0))
    log_probs = case.log_probs("student").gather(-1, case.tensors["tokens"][..., None])[..., 0]
    expected = torch.autograd.grad(-(advantages * log_probs)[mask].sum(), leaves)
    for left, right in zip(torch.autograd.grad(out.total, leaves), expected, strict=True):
        assert relative_error(left, right) < 1e-10


def test_importance_weights_are_of_the_divergence_only() -> None:
    case = with_policy(make_case(4, n=33, v=64), weight=0.4)
    truncated, whole = case.with_(is_clip=0.5).fused(), case.with_(is_clip=100.0).fused()
    assert torch.equal(truncated.policy_loss, whole.policy_loss)
    assert torch.equal(truncated.policy_weights, whole.policy_weights)
    assert relative_error(truncated.weights, whole.weights) > 0.01
    # Old log-probabilities of the policy gradient alone.
    alone = case.with_(is_clip=None).fused()
    torch.testing.assert_close(alone.policy_loss, whole.policy_loss)
    torch.testing.assert_close(alone.weights, alone.policy_weights * (0.6 / 0.4))


def test_one_advantage_and_one_weight_per_row() -> None:
    case = with_policy(make_case(5, n=(3, 4), v=64))
    rows = case.with_(
        advantages=torch.arange(3.0).double() - 1.0, policy_weight=torch.tensor([0.0, 0.5, 1.0])
    )
    spread = {name: rows.tensors[name][:, None].expand(3, 4) for name in ("advantages", "policy_weight")}
    assert_same(fused(rows), fused(rows.with_(**spread)), 0.0)
    assert relative_error(fused(rows)["total"], fused(case)["total"]) > 1e-3


def test_masked_tokens_are_never_read() -> None:
    case = with_policy(make_case(6, n=20, v=64))
    mask = case.tensors["loss_mask"]
    poison = {
        name: case.tensors[name].masked_fill(~mask, math.nan) for name in ("advantages", "policy_weight")
    }
    assert_same(fused(case.with_(**poison)), fused(case), 0.0)


def test_a_token_that_the_student_cannot_sample_sends_no_policy_gradient() -> None:
    case = with_policy(make_case(7, n=9, v=64, k=5, biases=False), weight=1.0)
    bias = torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor([3]), -math.inf)
    case = case.with_(student_bias=bias, tokens=torch.full((9,), 3))
    for surrogate in ({}, {"surrogate": "cispo"}):
        result = fused(case.with_(**surrogate))
        assert not result["student_hidden"].any()
        assert torch.isfinite(result["total"])


@pytest.mark.parametrize("support", ["student", "full"])
def test_a_nearly_certain_token_has_an_exact_gradient(support: str) -> None:
    """1 − p in float32 has no digit left; the sum of all other probabilities has all."""
    logits = [torch.randn(4, 500, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    logits[0][:, 0] = logits[1][:, 0] = 22.0
    options: dict[str, Any] = {"support": support, "policy": True, "tokens": torch.zeros(4, dtype=torch.long)}

    def gradient(dtype: torch.dtype) -> Tensor:
        return chunk_grad(_torch.chunk_loss, (logits[0], logits[1]), dtype, **options)[:, 0]

    exact = gradient(torch.float64)
    assert relative_error(gradient(torch.float32), exact) < 1e-4
    naive = 1.0 - torch.softmax(logits[0], -1)[:, 0]
    assert ((naive / (1.0 - torch.softmax(logits[0].double(), -1)[:, 0])) - 1.0).abs().max() > 1e-2


def test_metrics_of_the_policy_gradient() -> None:
    case = with_policy(make_case(8, n=200, v=64), weight=0.5)
    out, mask = case.fused(), case.tensors["loss_mask"]
    ratio = (out.log_probs - case.tensors["old_log_probs"]).exp().nan_to_num(1.0)
    advantages = case.tensors["advantages"]
    stopped = ((ratio > 1.28) & (advantages > 0.0)) | ((ratio < 0.8) & (advantages < 0.0))
    assert 0.05 < out.metrics["policy_clip_fraction"] < 0.95
    torch.testing.assert_close(out.metrics["policy_clip_fraction"], stopped[mask].double().mean())
    torch.testing.assert_close(out.metrics["policy_loss"], out.policy_loss[mask].mean())
    torch.testing.assert_close(
        out.total, (out.weights * out.per_token + out.policy_weights * out.policy_loss).sum()
    )


def losses(case: Case, hidden: Tensor) -> Tensor:
    """The total, made of the losses of each token."""
    out = case.with_(student_hidden=hidden).fused(backend="torch", reduction="none")
    return (out.weights * out.per_token + out.policy_weights * out.policy_loss).sum()


def test_under_functional_transforms() -> None:
    case = with_policy(make_case(10, n=9, v=64))
    hidden, expected = case.tensors["student_hidden"], fused(case)["student_hidden"]
    total = torch.func.grad(lambda h: case.with_(student_hidden=h).fused(backend="torch").total)
    assert relative_error(total(hidden), expected) < 1e-12
    assert relative_error(torch.func.grad(lambda h: losses(case, h))(hidden), expected) < 1e-12
    leaf = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(case, leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative"):
        gradient.sum().backward()
    batch = case.tensors["advantages"].expand(2, 9)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda advantages: case.with_(advantages=advantages).fused().total)(batch)


# ---- surrogates ----------------------------------------------------------------------------------------------


def cispo(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return -(log_probs - old).exp().clamp(0.9, 1.5).detach() * advantages * log_probs


def sapo(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    t = torch.where(advantages > 0.0, 2.0, 1.05).double()
    return -advantages * torch.sigmoid(t * ((log_probs - old).exp() - 1.0)) * 4.0 / t


def clipped(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return sdpo.clipped_policy_gradient(log_probs, old, advantages, clip_low=0.1, clip_high=0.5)


@pytest.mark.parametrize("surrogate", [clipped, cispo, sapo])
def test_the_derivative_of_a_surrogate_is_that_of_its_formula(surrogate: Callable[..., Tensor]) -> None:
    rng = torch.Generator().manual_seed(0)
    log_probs, drift, advantages = torch.randn(3, 500, generator=rng, dtype=torch.float64)
    log_probs, old = log_probs - 3.0, log_probs - 3.0 + 0.5 * drift
    # The bounded ratio of a token that left every range.
    old[:2] -= torch.tensor([30.0, -30.0])
    scalars = Surrogate(surrogate.__name__, 0.1, 0.5, (2.0, 1.05))  # type: ignore[arg-type]
    term = policy_term(log_probs, old, advantages, scalars)
    leaf = log_probs.clone().requires_grad_()
    expected = surrogate(leaf, old, advantages)
    finite = slice(0 if surrogate is clipped else 2, None)
    (derivative,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(term.loss[finite], expected.detach()[finite])
    torch.testing.assert_close(term.derivative[finite], derivative[finite])
    assert term.loss.isfinite().all()
    others = {"clipped", "cispo", "sapo"} - {surrogate.__name__}
    for other in others:
        wrong = policy_term(log_probs, old, advantages, Surrogate(other, 0.1, 0.5, (2.0, 1.05)))  # type: ignore[arg-type]
        assert relative_error(wrong.derivative[finite], derivative[finite]) > 1e-2


# ---- TRL -----------------------------------------------------------------------------------------------------

EPSILON_LOW, EPSILON_HIGH, MAX_LENGTH = 0.2, 0.28, 11


def loss_type_weights(loss_type: str, mask: Tensor) -> Tensor:
    """The weights [B, T] that the docstring of the fused loss gives."""
    rows, lengths = mask.shape[0], mask.sum(-1, keepdim=True)
    weights = {
        "grpo": 1.0 / (rows * lengths),
        "sapo": 1.0 / (rows * lengths),
        "bnpo": 1.0 / lengths.sum(),
        "dapo": 1.0 / lengths.sum(),
        "cispo": 1.0 / lengths.sum(),
        "dr_grpo": torch.tensor(1.0 / (rows * MAX_LENGTH)),
        "luspo": torch.tensor(1.0 / rows),
    }[loss_type]
    return weights.double().expand(mask.shape)


def trl_loss(loss_type: str, log_probs: Tensor, case: Case) -> Tensor:
    """``GRPOTrainer._compute_loss`` of one micro-batch on its own, of tokens with these log-probabilities."""
    trl = pytest.importorskip("trl")
    mask = case.tensors["loss_mask"]
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        loss_type=loss_type,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=SimpleNamespace(
            delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1
        ),
        epsilon_low=EPSILON_LOW,
        epsilon_high=5.0 if loss_type == "cispo" else EPSILON_HIGH,
        importance_sampling_level="token",
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": {}},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
    )
    trainer._metrics["train"] = _Lists()
    inputs = {
        "prompt_ids": case.tensors["tokens"][:, :1],
        "prompt_mask": mask[:, :1].long(),
        "completion_ids": case.tensors["tokens"],
        "completion_mask": mask.long(),
        "advantages": case.tensors["advantages"],
        "old_per_token_logps": case.tensors["old_log_probs"],
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
def test_trl_loss_types_are_weights_and_surrogates(loss_type: str) -> None:
    case = with_policy(make_case(9, n=(3, 7), v=64, weights=False), weight=1.0, is_clip=None)
    mask = case.tensors["loss_mask"]
    assert len(set(mask.sum(-1).tolist())) > 1
    old = case.tensors["old_log_probs"]
    log_probs = case.log_probs("student").gather(-1, case.tensors["tokens"][..., None])[..., 0]
    old = torch.where(old.isnan(), log_probs.detach() + 0.3, old)
    case = case.with_(advantages=torch.tensor([1.0, -0.5, 0.7]).double(), old_log_probs=old)
    surrogate: dict[str, Any] = {"clip_low": EPSILON_LOW, "clip_high": EPSILON_HIGH}
    if loss_type == "cispo":
        surrogate = {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 5.0 - 1.0}
    if loss_type == "sapo":
        none: dict[str, Any] = {"clip_low": None, "clip_high": None}
        surrogate = none | {"surrogate": "sapo", "sapo_temperatures": (1.0, 1.05)}
    case, leaves = case.with_(**surrogate, weights=loss_type_weights(loss_type, mask)).leaves()
    log_probs = case.log_probs("student").gather(-1, case.tensors["tokens"][..., None])[..., 0]
    expected, out = trl_loss(loss_type, log_probs, case), case.fused(backend="torch")
    assert relative_error(out.total, expected) < 1e-6
    for left, right in zip(
        torch.autograd.grad(out.total, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert relative_error(left, right) < 1e-6
    unweighted = case.with_(weights=torch.ones_like(mask, dtype=torch.float64)).fused(backend="torch")
    assert relative_error(unweighted.total, expected) > 0.1


# ---- arguments -----------------------------------------------------------------------------------------------

ROWS = torch.zeros(9, dtype=torch.float64)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"advantages": ROWS}, ValueError, "policy_weight: expected together with advantages"),
    ({"policy_weight": 0.5}, ValueError, "advantages: expected together with policy_weight"),
    ({"surrogate": "cispo"}, ValueError, "surrogate: expected advantages with 'cispo'"),
    ({"clip_low": 0.2}, ValueError, "clip_low: expected None with no advantages"),
    ({"sapo_temperatures": (1.0, 1.0)}, ValueError, "sapo_temperatures: expected None with no advantages"),
]
BAD_POLICY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"policy_weight": 1.5}, ValueError, r"policy_weight: expected a number in \[0, 1\], got 1.5"),
    ({"policy_weight": None}, ValueError, "policy_weight: expected together with advantages"),
    ({"policy_weight": "half"}, TypeError, "policy_weight: expected a number"),
    ({"policy_weight": ROWS - 0.1}, ValueError, r"policy_weight: expected numbers in \[0, 1\] .* got -0.1"),
    ({"policy_weight": ROWS + math.nan}, ValueError, "policy_weight: expected numbers .* got nan"),
    ({"policy_weight": ROWS.long()}, TypeError, "policy_weight: expected a tensor of floating dtype"),
    ({"policy_weight": ROWS[:3]}, ValueError, "policy_weight: expected shape"),
    ({"advantages": ROWS + math.nan}, ValueError, "advantages: expected finite numbers .* got nan; mask"),
    ({"advantages": ROWS + math.inf}, ValueError, "advantages: expected finite numbers .* got inf"),
    ({"advantages": ROWS[:4]}, ValueError, "advantages: expected shape"),
    ({"advantages": ROWS.long()}, TypeError, "advantages: expected a tensor of floating dtype"),
    ({"clip_low": None}, TypeError, "clip_low: expected a number, got None"),
    ({"clip_low": 1.1}, ValueError, "clip_low: expected"),
    ({"clip_high": -0.1}, ValueError, "clip_high: expected"),
    ({"clip_high": None}, TypeError, "clip_high: expected"),
    ({"surrogate": "gspo"}, ValueError, r"surrogate: expected one of \('clipped', 'cispo', 'sapo'\)"),
    ({"surrogate": "sapo"}, ValueError, "clip_low: expected None with surrogate='sapo'"),
    (
        {"sapo_temperatures": (1.0, 1.0)},
        ValueError,
        "sapo_temperatures: expected None with surrogate='clipped'",
    ),
    (
        {"surrogate": "sapo", "clip_low": None, "clip_high": None},
        TypeError,
        "sapo_temperatures: expected a tuple",
    ),
    (
        {"surrogate": "sapo", "clip_low": None, "clip_high": None, "sapo_temperatures": (1.0, 0.0)},
        ValueError,
        r"sapo_temperatures\[1\]: expected",
    ),
    (
        {"surrogate": "sapo", "clip_low": None, "clip_high": None, "sapo_temperatures": (math.inf, 1.0)},
        ValueError,
        r"sapo_temperatures\[0\]: expected a number in \(0, inf\), got inf",
    ),
    ({"advantages": [0.0] * 9}, TypeError, "advantages: expected a tensor of floating dtype, got list"),
    ({"old_log_probs": None}, ValueError, "old_log_probs: expected together with is_clip"),
    ({"advantages": ROWS.to("meta")}, ValueError, "advantages: expected a tensor on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=str)
def test_bad_input_without_a_policy_gradient_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_case(20, n=9, v=64).with_(**change).fused()


@pytest.mark.parametrize(("change", "error", "message"), BAD_POLICY, ids=str)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = with_policy(make_case(20, n=9, v=64), weight=0.5)
    with pytest.raises(error, match=message):
        case.with_(**change).fused()

"""The kernels on a GPU: against the plain loss in float64, to the accuracy they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import Case, make_case, relative_error, with_given_teacher, with_policy

import sdpo
from sdpo.fused import _chunks
from sdpo.fused._matmul import grad_hidden_from_logits

pytestmark = pytest.mark.gpu

VALUE = 1e-5

SCALARS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0},
    {"alpha": 1.0, "k": 1},
    {"tail": "renormalize", "alpha": 0.3},
    {"support": "teacher"},
    {"support": "sampled"},
    {"support": "full"},
    {"support": "full", "alpha": 0.0, "softcap": 20.0},
    {"support": "full", "alpha": 1.0},
    {"softcap": 20.0, "temperature": 0.7, "logit_scale": 1.3},
    {"support": "teacher", "softcap": 20.0, "alpha": 0.0, "temperature": 1.5},
]
SIZES = [(33, 64, 507), (5, 17, 1003), (64, 64, 4097), (1, 64, 4096), (130, 128, 50257)]


def check(case: Case, dtype: torch.dtype, **options: Any) -> None:
    """Value within 1e-5 of float64 on the same rounded inputs; gradients within the rounding of their dtype."""
    rounded = case.cast(dtype)
    exact, exact_leaves = rounded.cast(torch.float64, "cuda").leaves()
    ours, leaves = rounded.cast(dtype, "cuda").leaves()
    expected, out = exact.plain_total(), ours.fused(**options)
    assert relative_error(out.total, expected) < VALUE
    divergence, _ = exact.plain_per_token()
    mask = case.tensors["loss_mask"].cuda()
    assert relative_error(out.per_token[mask], divergence[mask]) < VALUE
    gradients = torch.autograd.grad(out.total, leaves)
    for ours_, exact_ in zip(gradients, torch.autograd.grad(expected, exact_leaves), strict=True):
        unit = torch.finfo(dtype).eps
        assert relative_error(ours_, exact_) < max(unit, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scalars", SCALARS, ids=str)
def test_kernels_give_the_plain_numbers(scalars: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_case(1, n=33, d=64, v=1003, **scalars), dtype, backend="triton", chunk_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scalars", SCALARS, ids=str)
def test_kernels_give_the_plain_policy_gradient(scalars: dict[str, Any], dtype: torch.dtype) -> None:
    # The ratio of a token is the exponential of what its old log-probability, rounded as well, leaves.
    case = with_policy(make_case(1, n=33, d=64, v=1003, **scalars))
    check(case, dtype, backend="triton", chunk_size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scalars", [{"k": 100}, {"support": "full"}], ids=str)
def test_kernels_give_the_plain_policy_gradient_alone(scalars: dict[str, Any], dtype: torch.dtype) -> None:
    case = with_policy(make_case(2, n=130, d=128, v=50257, **scalars), weight=1.0)
    check(case, dtype, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", [16, 40])  # rows that do not fit a chunk, and two in each
@pytest.mark.parametrize("scalars", [{}, {"support": "teacher"}, {"support": "full"}], ids=str)
@pytest.mark.parametrize("policy", [False, True])
def test_kernels_give_the_plain_loss_of_some_tokens(
    policy: bool, scalars: dict[str, Any], chunk_size: int, dtype: torch.dtype
) -> None:
    case = make_case(1, n=(4, 20), d=64, v=1003, **scalars)
    case = (with_policy(case) if policy else case).cast(dtype)
    results = []
    for working, backend in ((dtype, "triton"), (torch.float64, "torch")):
        leaves_of, leaves = case.cast(working, "cuda").leaves()
        out = leaves_of.fused(token_fraction=0.5, token_weights=gate, backend=backend, chunk_size=chunk_size)
        results.append([out.total, *torch.autograd.grad(out.total, leaves)])
    total, *gradients = zip(*results, strict=True)
    assert relative_error(*total) < VALUE
    for ours, exact in gradients:
        assert relative_error(ours, exact) < max(torch.finfo(dtype).eps, 2e-5)


def gate(statistics: sdpo.TokenStatistics, kept: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(statistics.teacher_log_probs - statistics.log_probs) * kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_kernels_give_the_plain_loss_of_a_served_teacher(tail: str, dtype: torch.dtype) -> None:
    case = with_given_teacher(make_case(15, n=33, d=64, v=1003, softcap=20.0), 20, tail)
    check(case, dtype, backend="triton", chunk_size=16)
    check(with_policy(case), dtype, backend="triton", chunk_size=16)


@pytest.mark.parametrize("scalars", [{"k": 100}, {"support": "teacher"}, {"support": "full"}], ids=str)
def test_a_policy_weight_of_0_changes_no_bit(scalars: dict[str, Any]) -> None:
    case = make_case(14, n=130, d=64, v=5000, weights=False, **scalars)
    scored = with_policy(case, weight=0.0).cast(torch.bfloat16, "cuda")
    plain = case.with_(tokens=scored.tensors["tokens"].cpu()).cast(torch.bfloat16, "cuda")

    def numbers(case: Case) -> list[torch.Tensor]:
        case, leaves = case.leaves()
        out = case.fused(backend="triton")
        return [out.total, out.per_token, *torch.autograd.grad(out.total, leaves)]

    assert all(torch.equal(*pair) for pair in zip(numbers(scored), numbers(plain), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "scalars", [{"k": 100}, {"support": "full"}, {"k": 300, "support": "teacher"}], ids=str
)
def test_any_size(size: tuple[int, int, int], scalars: dict[str, Any]) -> None:
    n, d, v = size
    check(make_case(2, n=n, d=d, v=v, **scalars), torch.bfloat16, backend="triton")


@pytest.mark.parametrize("k", [255, 256, 1000, 1024])
def test_wide_supports(k: int) -> None:
    check(make_case(3, n=9, d=64, v=5000, k=k), torch.bfloat16, backend="triton")


def test_the_torch_backend_has_the_same_accuracy() -> None:
    check(make_case(4, n=33, d=64, v=1003), torch.bfloat16, backend="torch", chunk_size=16)


def test_a_full_support_leaves_an_exact_tail() -> None:
    """Top-K mass of 0.999999: what is left of 1 − Σp in float32 is noise, the kernels' tail is not."""
    case = make_case(5, n=64, d=64, v=4097, k=100, scale=13.0, weights=False, biases=False).cast(
        torch.bfloat16
    )
    ours = case.cast(torch.bfloat16, "cuda").fused(backend="triton")
    exact = case.cast(torch.float64, "cuda")
    mask = case.tensors["loss_mask"].cuda()
    top = exact_log_tail(exact)[mask]
    deep = (top.exp() < 1e-5) & (top.exp() > 1e-30)
    assert deep.sum() > 5
    error = (ours.student_log_tail[mask] - top)[deep].abs()
    assert error.max() < 1e-4
    naive = torch.log(-torch.expm1(torch.log(ours.student_topk_mass[mask][deep])))
    assert not (naive - top[deep]).abs().max() < 1e-4, "1 - mass would have passed"


def exact_log_tail(case: Case) -> torch.Tensor:
    return sdpo.topk_log_probs(case.logits("student"), k=case.scalars["k"]).log_tail


def test_ties_and_impossible_tokens() -> None:
    case = make_case(6, n=20, d=64, v=1003, weights=False)
    case.tensors["student_weight"][:700] = case.tensors["student_weight"][0]
    impossible = torch.arange(1003) % 3 == 1
    for side in ("student", "teacher"):
        case.tensors[f"{side}_bias"].zero_().masked_fill_(impossible, -torch.inf)
    ours, leaves = case.cast(torch.float32, "cuda").leaves()
    out = ours.fused(backend="triton")
    reference, _ = case.cast(torch.float64, "cuda").plain_per_token()
    mask = case.tensors["loss_mask"].cuda()
    assert relative_error(out.per_token[mask], reference[mask]) < 1e-4
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.total, leaves))


def test_same_inputs_same_bits() -> None:
    case, leaves = make_case(7, n=300, d=128, v=50257, k=100).cast(torch.bfloat16, "cuda").leaves()

    def once() -> list[torch.Tensor]:
        out = case.fused()
        return [out.total, out.per_token, *torch.autograd.grad(out.total, leaves)]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_memory_does_not_grow_with_the_tokens() -> None:
    def peak(n: int) -> int:
        case, leaves = make_case(8, n=n, d=64, v=50257, weights=False).cast(torch.bfloat16, "cuda").leaves()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(case.fused(chunk_size=64).total, leaves)
        return torch.cuda.max_memory_allocated() - before

    peak(64)
    # Enough of 512 tokens are active to fill a block of logit gradients. What grows is the hidden gradient (bf16)
    # and a few numbers per token, not 50257 of them.
    assert peak(2048) - peak(512) < (2048 - 512) * (64 * 2 * 4 + 400)


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "ordinary"])
def test_every_token_is_accurate_to_the_fifth_digit(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Models that mostly agree: the accumulation bias of their logits is a large part of their divergence."""
    from sdpo.fused.triton import _launch

    plain: dict[str, Any] = {"weights": False, "biases": False}
    case = make_case(12, n=128, d=3584, v=20_000, scale=scale, k=100, **plain)
    near = 0.9 * case.tensors["student_hidden"] + 0.44 * case.tensors["teacher_hidden"]
    case = case.with_(teacher_hidden=near, teacher_weight=case.tensors["student_weight"]).cast(torch.bfloat16)
    exact, _ = case.cast(torch.float64, "cuda").plain_per_token()
    mask, ours = case.tensors["loss_mask"].cuda(), case.cast(torch.bfloat16, "cuda")

    def worst() -> float:
        per_token = ours.fused(backend="triton").per_token[mask].double()
        return ((per_token - exact[mask]).abs() / exact[mask]).max().item()

    assert worst() < 1e-5
    # A counter-example: the products as they are.
    monkeypatch.setattr(_chunks, "accumulation_bias", lambda device, operand, summands: 0.0)
    monkeypatch.setattr(_launch, "_recomputes_top_logits", lambda objective: False)
    assert worst() > 1e-5


@pytest.mark.parametrize("scale", [3.0, 13.0], ids=["ordinary", "nearly all mass on the support"])
@pytest.mark.parametrize("scalars", [{"k": 100}, {"support": "full"}], ids=str)
def test_norm_of_the_gradient(scalars: dict[str, Any], scale: float) -> None:
    """float32 leaves under autocast: bf16 products, gradients that are not rounded to bf16 at the end."""
    plain: dict[str, Any] = {"weights": False, "biases": False}
    case = make_case(10, n=512, d=1024, v=24_000, scale=scale, **plain, **scalars)
    # A teacher that mostly agrees: between strangers a single token would be all of the gradient.
    near = 0.9 * case.tensors["student_hidden"] + 0.44 * case.tensors["teacher_hidden"]
    case = case.with_(teacher_hidden=near, teacher_weight=case.tensors["student_weight"]).cast(torch.bfloat16)
    exact, exact_leaves = case.cast(torch.float64, "cuda").leaves()
    ours, leaves = case.cast(torch.float32, "cuda").leaves()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        total = ours.fused(chunk_size=128).total
    expected = torch.autograd.grad(exact.plain_total(), exact_leaves)
    hidden, head = (
        abs(ours_.double().norm() / exact_.norm() - 1)
        for ours_, exact_ in zip(torch.autograd.grad(total, leaves), expected, strict=True)
    )
    assert hidden < 1e-4
    # The gradient of a weight sums over tokens: no factor of a token corrects the rounding of its logit gradient.
    assert head < 2e-3


def test_a_nan_token_shows() -> None:
    case = make_case(11, n=8, d=64, v=5000, weights=False).cast(torch.bfloat16, "cuda")
    case.tensors["loss_mask"].fill_(True)
    case.tensors["student_hidden"][3] = torch.nan
    assert case.fused(backend="triton").per_token.isnan().tolist() == [token == 3 for token in range(8)]


def test_a_long_sum_has_a_small_accumulation_bias() -> None:
    """All summands positive is the worst case: one product of this length is too small by 4e-4."""
    grad_logits = torch.rand(768, 152_064, device="cuda").bfloat16()
    weight = torch.rand(152_064, 3584, device="cuda").bfloat16()
    ours, exact = (
        grad_hidden_from_logits(grad_logits, weight, torch.empty(768, 3584, device="cuda")),
        grad_logits.double() @ weight.double(),
    )
    assert abs(((ours.double() * exact).sum() / exact.square().sum()).item() - 1) < 1e-4


def test_autocast_decides_the_dtype_of_the_products() -> None:
    case = make_case(9, n=33, d=64, v=1003).cast(torch.float32, "cuda")
    operands = {name: value for name, value in case.tensors.items() if name.endswith(("hidden", "weight"))}
    rounded, rounded_leaves = case.with_(
        **{name: value.bfloat16().float() for name, value in operands.items()}
    ).leaves()
    ours, leaves = case.leaves()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = ours.fused()
    expected = rounded.fused()
    assert relative_error(out.total, expected.total) < VALUE
    gradients = torch.autograd.grad(out.total, leaves)
    for actual, exact in zip(gradients, torch.autograd.grad(expected.total, rounded_leaves), strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, exact) < 4e-3  # logit gradients in bf16 against float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_log_probabilities_alone_are_those_of_the_loss(dtype: torch.dtype, backend: Any) -> None:
    """So that on-policy the importance weights are 1."""
    case = make_case(2, n=130, d=128, v=50257, weights=False, softcap=20.0, temperature=0.7).cast(
        dtype, "cuda"
    )
    out = case.fused(backend=backend)
    student, mask = case.arguments()["student"], case.tensors["loss_mask"]
    got = sdpo.fused_log_probs(
        student, case.tensors["tokens"], loss_mask=mask, softcap=20.0, temperature=0.7, chunk_size=48
    )
    assert (got - out.log_probs).abs().max() < 1e-4
    exact = case.cast(torch.float64, "cuda").log_probs("student").gather(-1, case.tensors["tokens"][:, None])
    assert (got - exact[:, 0])[mask].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_and_entropies_have_gradients(dtype: torch.dtype) -> None:
    case = make_case(3, n=130, d=128, v=50257, weights=False, temperature=0.7).cast(dtype, "cuda")
    low = case.arguments()["student"]
    tokens, mask = case.tensors["tokens"], case.tensors["loss_mask"]
    factors = torch.randn(2, *tokens.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    parts = [part.detach().requires_grad_() for part in low if part is not None]
    both = sdpo.fused_log_probs_and_entropy(
        sdpo.LMHead(*parts), tokens, loss_mask=mask, temperature=0.7, chunk_size=48
    )
    got = torch.autograd.grad((factors * torch.stack(both)).sum(), parts)
    exact = [part.detach().double().requires_grad_() for part in parts]
    hidden, weight, *bias = exact
    log_p = ((hidden @ weight.T + sum(bias)) / 0.7).log_softmax(-1)
    sampled = log_p.gather(-1, tokens[..., None])[..., 0]
    values = torch.stack([sampled, -(log_p.exp() * log_p).sum(-1)]).masked_fill(~mask, 0.0)
    assert (torch.stack(both) - values).abs().max() < 1e-4
    expected = torch.autograd.grad((factors.double() * values).sum(), exact)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) < max(torch.finfo(dtype).eps, 1e-5)

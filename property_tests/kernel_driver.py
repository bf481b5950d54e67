"""Run in a process of its own with TRITON_INTERPRET=1: the kernels on a CPU, against plain torch.

Prints one JSON object: the relative error of each check, by name. Those named `wrong:` are counter-examples, whose
errors must be large.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fused_cases import (
    Case,
    bf16_grad_error,
    bf16_length_errors,
    certain_student_error,
    hidden_nan_share,
    likely_outside_error,
    log_prob_error,
    make_case,
    per_token_error,
    relative_error,
    shared_buffer_error,
    with_given_teacher,
    with_policy,
)
from torch import Tensor

import sdpo
from sdpo.fused.triton import _exact_logits, _launch, _reductions
from sdpo.fused.triton._elementwise import scaled, sum_partials
from sdpo.fused.triton._math import EXCLUDED_KEY, order_key, select_k

# The interpreter computes both branches of every `where`.
warnings.simplefilter("ignore", RuntimeWarning)

# So small that a small vocabulary, too, has several blocks.
_launch.BLOCK_V, _launch.FULL_BLOCK_V = 256, 64

CASES: dict[str, dict[str, Any]] = {
    "jsd": {},
    "forward": {"alpha": 0.0},
    "reverse": {"alpha": 1.0, "tail": "renormalize"},
    "one token": {"k": 1, "alpha": 0.3},
    "nearly all": {"k": 506, "alpha": 1.0},
    "wide support, narrow groups": {"k": 300},
    "temperature and scale": {"temperature": 0.6, "logit_scale": 1.3},
    "soft-cap": {"softcap": 5.0, "temperature": 1.4, "alpha": 0.0},
    "teacher's support": {"support": "teacher", "softcap": 5.0},
    "teacher's support, renormalized": {"support": "teacher", "tail": "renormalize", "alpha": 0.2},
    "sampled": {"support": "sampled"},
    "sampled, soft-cap": {"support": "sampled", "softcap": 5.0},
    "full jsd": {"support": "full"},
    "full forward": {"support": "full", "alpha": 0.0, "softcap": 5.0},
    "full reverse": {"support": "full", "alpha": 1.0},
}


def outputs(case: Case, backend: str, chunk_size: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of the fused loss."""
    case, leaves = case.leaves()
    out = case.fused(backend=backend, chunk_size=chunk_size)
    gradients = torch.autograd.grad(out.total, leaves)
    # Where the tail is nearly everything its logarithm is close to 0: compare the masses.
    tail_masses = [out.student_log_tail.exp(), out.teacher_log_tail.exp()]
    left_out = ("count", "metrics", "student_log_tail", "teacher_log_tail")
    values = [getattr(out, name) for name in out._fields if name not in left_out]
    fields = tail_masses + [value for value in values if value is not None]

    def finite(values: Sequence[Tensor]) -> list[Tensor]:
        """Large numbers in place of NaN and infinities: they must agree, and a norm needs finite numbers."""
        return [torch.nan_to_num(value.detach(), nan=1e6, posinf=1e5, neginf=-1e5) for value in values]

    return finite(fields), finite(gradients)


def errors(
    case: Case, reference: Case | None = None, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """The largest of values and of gradients, against float64 on the same inputs, rounded to ``dtype``."""
    ours = outputs(case.cast(dtype), "triton")
    expected = outputs((reference or case).cast(dtype).cast(torch.float64), "torch")
    values, gradients = (
        max(relative_error(left, right) for left, right in zip(*pair, strict=True))
        for pair in zip(ours, expected, strict=True)
    )
    return values, gradients


def error(case: Case, reference: Case | None = None) -> float:
    return max(errors(case, reference))


def ties_and_impossible_tokens() -> Case:
    case = make_case(2, n=6, v=507, k=20, weights=False)
    impossible = torch.arange(507) % 3 == 1
    impossible[128:256] = True
    tied = case.tensors["student_weight"].clone()
    tied[300:420] = tied[300]
    case = case.with_(student_weight=tied)
    biases = {
        f"{model}_bias": case.tensors[f"{model}_bias"].masked_fill(impossible, -torch.inf)
        for model in ("student", "teacher")
    }
    biases["student_bias"][300:420] = biases["student_bias"][301]
    return case.with_(**biases)


def trust_region(softcap: float | None) -> Case:
    other = make_case(3, n=6, v=130).tensors
    case = make_case(4, n=6, v=130, k=9, softcap=softcap, trust_region_coef=0.3)
    return case.with_(reference_hidden=other["teacher_hidden"])


def nearly_agreeing() -> Case:
    case = make_case(10, n=5, v=507, k=20, alpha=1.0, weights=False, biases=False)
    near = case.tensors["student_hidden"] * (1 + 1e-2)
    return case.with_(teacher_hidden=near, teacher_weight=case.tensors["student_weight"])


@triton.jit
def select_k_kernel(values_ptr, selected_ptr, position_ptr, K, N: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offs, mask=offs < N, other=0.0)
    selected, position = select_k(tl.where(offs < N, order_key(values), EXCLUDED_KEY), K)
    tl.store(selected_ptr + offs, selected.to(tl.int32))
    tl.store(position_ptr + offs, position)


def selection_error(*, ties_to_the_last: bool) -> float:
    """Share of selections unlike a stable sort's, over rounded values with many ties, ±0 and −inf."""
    rng = torch.Generator().manual_seed(5)
    wrong = total = 0
    for n, k in ((5, 5), (37, 1), (100, 60), (128, 127)):
        values = (torch.randn(n, generator=rng) * 2).round()
        values = values.abs().masked_fill(torch.rand(n, generator=rng) < 0.2, -torch.inf)
        selected, position = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        select_k_kernel[(1,)](values, selected, position, k, N=n, BLOCK=128)
        source = values.flip(0) if ties_to_the_last else values
        expected = torch.sort(source, descending=True, stable=True).indices[:k]
        expected = (n - 1 - expected if ties_to_the_last else expected).sort().values
        indices = selected.nonzero().flatten()
        wrong += int(indices.tolist() != expected.tolist())
        wrong += int(position[indices].tolist() != list(range(k)))
        total += 2
    return wrong / total


def policy_gradients() -> dict[str, float]:
    """A policy gradient beside the divergence, with a gradient of the logits in float32 and in bf16."""
    names = ("jsd", "reverse", "soft-cap", "teacher's support", "sampled", "full jsd")
    cases = {name: with_policy(make_case(1, n=3, v=300, **CASES[name])) for name in names}
    results = {f"policy, {name}": error(case) for name, case in cases.items()}
    for name in ("jsd", "reverse", "soft-cap", "teacher's support", "sampled"):
        scalars = CASES[name]
        results[f"bf16 gradient, policy, {name}"] = bf16_grad_error(
            _launch.chunk_loss, **scalars, policy=True
        )
    results["wrong: policy of another token"] = error(
        cases["jsd"].with_(tokens=cases["jsd"].tensors["tokens"].roll(1)), cases["jsd"]
    )
    return results


def row_factors() -> dict[str, float]:
    """Some tokens of each row, weighed by a function of the row; with a policy gradient too."""
    results, gate = {}, {"token_fraction": 0.5, "token_weights": entropy_share}
    for name in ("jsd", "teacher's support", "full jsd"):
        case = make_case(1, n=(2, 5), v=130, **CASES[name])
        weighed = (with_policy(case) if name == "jsd" else case).with_(**gate)
        results[f"row factors, {name}"] = row_factor_error(weighed)
    results["wrong: another fraction"] = row_factor_error(weighed.with_(token_fraction=0.7), weighed)
    return results


def entropy_share(statistics: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
    entropy = statistics.teacher_entropy * kept
    return entropy / entropy.sum(-1, keepdim=True).clamp(min=1e-9)


def row_factor_error(case: Case, reference: Case | None = None) -> float:
    """With both rows in a chunk."""
    ours = outputs(case.cast(torch.float32), "triton", chunk_size=11)
    expected = outputs((reference or case).cast(torch.float32).cast(torch.float64), "torch", chunk_size=11)
    pairs = (pair for group in zip(ours, expected, strict=True) for pair in zip(*group, strict=True))
    return max(relative_error(left, right) for left, right in pairs)


def given_teachers() -> dict[str, float]:
    """A teacher whose top K are given, in which the sampled tokens may or may not be."""
    case = make_case(1, n=3, v=300, alpha=1.0)
    given = with_given_teacher(case, k=20)
    softcap = make_case(1, n=3, v=300, **CASES["soft-cap"])
    results = {
        "given, soft-cap": error(with_given_teacher(softcap, k=20)),
        "given, one token": error(with_given_teacher(case, k=1)),
        "given, renormalized": error(with_given_teacher(case, k=33, tail="renormalize")),
        "given, policy": error(with_policy(given)),
        "given, all tokens": error(with_given_teacher(make_case(7, n=3, v=33), k=33)),
    }
    other = given.with_(teacher_ids=(given.tensors["teacher_ids"] + 1) % 300)
    return results | {"wrong: given, other ids": error(other, given)}


def elementwise() -> dict[str, float]:
    values = torch.randn(3, 5001, generator=torch.Generator().manual_seed(11)).half()
    partials, row_scale = torch.randn(3, 4, 1030), torch.rand(4)
    total = sum_partials(partials, row_scale, torch.empty(4, 1030))
    expected = row_scale.double()[:, None] * partials.double().sum(0)
    return {
        "scaled": relative_error(scaled(values, torch.tensor(1 / 3)), (values.double() / 3).half()),
        "sum of partials": relative_error(total, expected),
    }


def inexact_products() -> dict[str, float]:
    """Products with the errors of a tensor core. Where factors or bias are known the kernels correct them."""
    chunk_loss = _launch.chunk_loss
    results = {
        "loss, factors known": per_token_error(chunk_loss, with_factors=True),
        "wrong: loss, factors unknown": per_token_error(chunk_loss) * 1e3,
        "log-probability, factors known": log_prob_error(chunk_loss, with_factors=True),
        "wrong: log-probability, factors unknown": log_prob_error(chunk_loss, with_factors=False) * 1e3,
        "loss, accumulation bias known": per_token_error(chunk_loss, bias=1e-3, known_bias=1e-3),
        "wrong: loss, accumulation bias unknown": per_token_error(chunk_loss, bias=3e-2),
        "loss, a likely token outside": likely_outside_error(chunk_loss),
    }
    original = _exact_logits.likeliest_tokens
    # As for the support's owner, whose tokens outside are not searched.
    _exact_logits.likeliest_tokens = lambda *args, **flags: original(*args, **flags | {"OWNS_SUPPORT": True})
    results["wrong: loss, a likely token outside"] = likely_outside_error(chunk_loss) * 1e3
    _exact_logits.likeliest_tokens = original
    return results


def unscaled_grad() -> dict[str, float]:
    """bf16 gradients, written before their factor is known and rewritten where the origin is out of range."""
    kinds: dict[str, dict[str, Any]] = {
        "student's": {}, "forward": {"alpha": 0.0}, "soft-cap": {"softcap": 40.0},
        "teacher's": {"support": "teacher"}, "sampled": {"support": "sampled"},
        "renormalized": {"tail": "renormalize"},
    }  # fmt: skip
    chunk_loss = _launch.chunk_loss
    results = {f"bf16 gradient, {name}": bf16_grad_error(chunk_loss, **kind) for name, kind in kinds.items()}
    for limit in ("MAX_ABOVE_ORIGIN", "MAX_BELOW_ORIGIN"):
        original = getattr(_reductions, limit)
        setattr(_reductions, limit, tl.constexpr(1e30))
        results[f"wrong: no {limit}"] = min(bf16_grad_error(chunk_loss, **kinds["forward"]), 1e3)
        setattr(_reductions, limit, original)
    return results


def main() -> None:
    results = {name: error(make_case(1, n=5, v=507, **scalars)) for name, scalars in CASES.items()}
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("jsd", "full reverse", "soft-cap"):
            values, gradients = errors(make_case(1, n=5, v=507, **CASES[name]), dtype=dtype)
            results |= {f"{name}, {dtype}": values, f"{dtype} gradient, {name}": gradients}
    # More groups than tokens to select, and fewer.
    results["widest support"] = error(make_case(12, n=3, v=20_011, k=1024))
    results["widest support, few groups"] = error(make_case(13, n=3, v=1100, k=1024, support="teacher"))
    results["odd sizes"] = error(make_case(6, n=1, v=1003, d=5, teacher_d=3, k=33))
    results["tiny vocabulary"] = error(make_case(7, n=5, v=3, k=2))
    results["no weights, no biases"] = error(make_case(8, n=5, v=130, weights=False, biases=False))
    results["expanded weights"] = error(
        make_case(9, n=5, v=130).with_(weights=torch.tensor([0.5], dtype=torch.float64).expand(5))
    )
    results["ties and impossible tokens"] = error(ties_and_impossible_tokens())
    results["impossible tokens, full"] = error(ties_and_impossible_tokens().with_(support="full"))
    results["nearly agreeing models"] = error(nearly_agreeing())
    results["trust region"] = error(trust_region(None))
    results["trust region, soft-cap"] = error(trust_region(5.0))
    results["certain student"] = certain_student_error(_launch.chunk_loss, k=100)
    results["certain student, full"] = certain_student_error(_launch.chunk_loss, support="full")
    results["row scale"] = bf16_length_errors(_launch.chunk_loss, k=100)[0]
    results["row scale, full"] = bf16_length_errors(_launch.chunk_loss, support="full")[0]
    results |= policy_gradients() | row_factors() | given_teachers()
    results |= elementwise() | inexact_products() | unscaled_grad()
    results["shared buffer, teacher's support"] = shared_buffer_error(
        _launch.chunk_loss, torch.float32, support="teacher", k=20
    )
    results["bf16 gradient, shared buffer"] = shared_buffer_error(_launch.chunk_loss, torch.bfloat16, k=20)
    # In other formats the gradient needs the student's products again.
    results["wrong: shared buffer, float32 gradient"] = shared_buffer_error(
        _launch.chunk_loss, torch.float32, k=20
    )
    results["hidden NaN"] = hidden_nan_share(_launch.chunk_loss)
    results["selection"] = selection_error(ties_to_the_last=False)
    results["wrong: selection, ties to the last"] = selection_error(ties_to_the_last=True)
    hot = make_case(1, n=5, v=507, temperature=0.6)
    results["wrong: no temperature"] = error(hot.with_(temperature=1.0), hot)
    results["wrong: renormalized"] = error(hot.with_(tail="renormalize"), hot)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

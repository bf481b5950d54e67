"""Run in a process of its own with TRITON_INTERPRET=1: the kernels on a CPU, against plain torch.

Prints one JSON object: the largest relative error of each check, by name. `wrong:` checks are twins, and off.
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
)
from torch import Tensor

from sdpo.fused.triton import _launch, _reductions, _topk_loss
from sdpo.fused.triton._elementwise import joined, scaled
from sdpo.fused.triton._math import SMALLEST, first_k, order_key

# The interpreter computes both branches of every `where`.
warnings.simplefilter("ignore", RuntimeWarning)

# Several blocks of columns even in small vocabularies.
_launch.BLOCK, _launch.FULL_BLOCK = 256, 64

CASES: dict[str, dict[str, Any]] = {
    "jsd": {},
    "forward": {"alpha": 0.0},
    "reverse": {"alpha": 1.0, "tail": "renormalize"},
    "one token": {"k": 1, "alpha": 0.3},
    "nearly all": {"k": 506, "alpha": 1.0},
    "wide groups narrow": {"k": 300},
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


def answer(case: Case, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and gradients."""
    case, leaves = case.leaves()
    out = case.fused(backend=backend, chunk_size=3)
    gradients = torch.autograd.grad(out.total, leaves)
    # A nearly full tail has a logarithm near 0, without a relative error worth the name: compare its mass.
    masses = [out.student_log_tail.exp(), out.teacher_log_tail.exp()]
    left_out = ("count", "metrics", "student_log_tail", "teacher_log_tail")
    fields = masses + [getattr(out, name) for name in out._fields if name not in left_out]

    def finite(values: Sequence[Tensor]) -> list[Tensor]:
        """With stand-ins: a distance knows no infinities, but their places must agree."""
        return [torch.nan_to_num(value.detach(), nan=1e6, posinf=1e5, neginf=-1e5) for value in values]

    return finite(fields), finite(gradients)


def errors(
    case: Case, reference: Case | None = None, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Of values and gradients, against float64 on the same inputs, rounded to ``dtype``."""
    got = answer(case.cast(dtype), "triton")
    expected = answer((reference or case).cast(dtype).cast(torch.float64), "torch")
    values, gradients = (
        max(relative_error(left, right) for left, right in zip(*pair, strict=True))
        for pair in zip(got, expected, strict=True)
    )
    return values, gradients


def error(case: Case, reference: Case | None = None) -> float:
    return max(errors(case, reference))


def ties_and_impossible_tokens() -> Case:
    case = make_case(2, n=6, v=507, k=20, weights=False)
    shut = torch.arange(507) % 3 == 1
    shut[128:256] = True
    tied = case.tensors["student_weight"].clone()
    tied[300:420] = tied[300]
    case = case.with_(student_weight=tied)
    biases = {
        f"{side}_bias": case.tensors[f"{side}_bias"].masked_fill(shut, -torch.inf)
        for side in ("student", "teacher")
    }
    biases["student_bias"][300:420] = biases["student_bias"][301]
    return case.with_(**biases)


def trust_region(softcap: float | None) -> Case:
    other = make_case(3, n=6, v=130).tensors
    case = make_case(4, n=6, v=130, k=9, softcap=softcap, trust_region_coef=0.3)
    return case.with_(reference_hidden=other["teacher_hidden"])


@triton.jit
def choose(values, chosen, rank, K, N: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    keys = tl.where(place < N, order_key(tl.load(values + place, mask=place < N, other=0.0)), SMALLEST)
    mask, position = first_k(keys, K)
    tl.store(chosen + place, mask.to(tl.int32))
    tl.store(rank + place, position)


def selection_error(last_ties: bool) -> float:
    """Share of choices unlike a stable sort's, over rounded values with many ties, ±0 and −inf."""
    rng = torch.Generator().manual_seed(5)
    wrong = total = 0
    for n, k in ((5, 5), (37, 1), (100, 60), (128, 127)):
        values = (torch.randn(n, generator=rng) * 2).round()
        values = values.abs().masked_fill(torch.rand(n, generator=rng) < 0.2, -torch.inf)
        chosen, rank = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        choose[(1,)](values, chosen, rank, k, N=n, BLOCK=128)
        source = values.flip(0) if last_ties else values
        best = torch.sort(source, descending=True, stable=True).indices[:k]
        best = (n - 1 - best if last_ties else best).sort().values
        found = chosen.nonzero().flatten()
        wrong += int(found.tolist() != best.tolist()) + int(rank[found].tolist() != list(range(k)))
        total += 2
    return wrong / total


def main() -> None:
    results = {name: error(make_case(1, n=5, v=507, **scalars)) for name, scalars in CASES.items()}
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("jsd", "full reverse", "soft-cap"):
            values, gradients = errors(make_case(1, n=5, v=507, **CASES[name]), dtype=dtype)
            results |= {f"{name}, {dtype}": values, f"{dtype} gradient, {name}": gradients}
    # More groups of columns than tokens to choose, and fewer.
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
    halves = torch.randn(3, 5001, generator=torch.Generator().manual_seed(11)).half()
    results["scale"] = relative_error(scaled(halves, torch.tensor(1 / 3)), (halves.double() / 3).half())
    parts, gain = torch.randn(3, 4, 1030), torch.rand(4)
    ours = joined(parts, gain, torch.empty(4, 1030))
    results["joined"] = relative_error(ours, gain.double()[:, None] * parts.double().sum(0))
    results["saturated"] = certain_student_error(_launch.chunk_loss, k=100)
    results["saturated, full"] = certain_student_error(_launch.chunk_loss, support="full")
    results["gain"] = bf16_length_errors(_launch.chunk_loss, k=100)[0]
    results["gain, full"] = bf16_length_errors(_launch.chunk_loss, support="full")[0]
    results |= inexact_products() | slopes_in_place()
    results["hidden breaks"] = hidden_nan_share(_launch.chunk_loss)
    results["selection"] = selection_error(last_ties=False)
    results["wrong: selection by last ties"] = selection_error(last_ties=True)
    hot = make_case(1, n=5, v=507, temperature=0.6)
    results["wrong: no temperature"] = error(hot.with_(temperature=1.0), hot)
    results["wrong: renormalized"] = error(hot.with_(tail="renormalize"), hot)
    print(json.dumps(results))


def inexact_products() -> dict[str, float]:
    chunk_loss = _launch.chunk_loss
    found = {
        "value, exact products known": per_token_error(chunk_loss, with_factors=True),
        "wrong: value, inexact products": per_token_error(chunk_loss) * 1e3,
        "log-probability, exact products known": log_prob_error(chunk_loss, with_factors=True),
        "wrong: log-probability, inexact products": log_prob_error(chunk_loss, with_factors=False) * 1e3,
        "value, a share is lost": per_token_error(chunk_loss, bias=1e-3, known_bias=1e-3),
        "wrong: value, a share is lost": per_token_error(chunk_loss, bias=3e-2),
        "value, a likely token outside": likely_outside_error(chunk_loss),
    }
    true = _topk_loss.refined
    # Who chose the support has no likely token outside: nobody is asked for one.
    _topk_loss.refined = lambda *args: true(*args[:21], True, *args[22:])
    found["wrong: value, a likely token outside"] = likely_outside_error(_launch.chunk_loss) * 1e3
    _topk_loss.refined = true
    return found


def slopes_in_place() -> dict[str, float]:
    """bf16 slopes that lie there before their factor is known, or, where that does not do, are made again."""
    kinds: dict[str, dict[str, Any]] = {
        "student's": {}, "forward": {"alpha": 0.0}, "soft-cap": {"softcap": 40.0},
        "teacher's": {"support": "teacher"}, "sampled": {"support": "sampled"},
        "renormalized": {"tail": "renormalize"},
    }  # fmt: skip
    found = {
        f"bf16 slopes, {name}": bf16_grad_error(_launch.chunk_loss, **kind) for name, kind in kinds.items()
    }
    for limit in ("REACH", "DEPTH"):
        true = getattr(_reductions, limit)
        setattr(_reductions, limit, tl.constexpr(1e30))
        found[f"wrong: {limit} without end"] = min(
            bf16_grad_error(_launch.chunk_loss, **kinds["forward"]), 1e3
        )
        setattr(_reductions, limit, true)
    return found


def nearly_agreeing() -> Case:
    case = make_case(10, n=5, v=507, k=20, alpha=1.0, weights=False, biases=False)
    near = case.tensors["student_hidden"] * (1 + 1e-2)
    return case.with_(teacher_hidden=near, teacher_weight=case.tensors["student_weight"])


if __name__ == "__main__":
    main()

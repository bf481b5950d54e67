"""Run in a process of its own: every launch of the kernels, compiled for a GPU that need not be there.

The fused loss is called on a CPU with kernels that compile instead of running. Prints one JSON object: by kernel,
the number of its variants.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
import triton
from fused_cases import make_objective
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdpo.fused._types import GradLogits, ModelChunk, TokenInputs, TokenStats
from sdpo.fused.triton import _elementwise, _launch

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
            torch.int32: "*i32"}  # fmt: skip
COUNT, VOCABULARY, K = 4, 5000, 100

compiled: dict[str, Any] = {}


def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in fixed
        else POINTERS[value.dtype] if isinstance(value, Tensor)
        else "fp32" if isinstance(value, float)
        else "i32"
        for name, value in given.items()
    }  # fmt: skip
    options = {"num_warps": kwargs.get("num_warps", 4)}
    key = json.dumps([kernel.fn.__name__, signature, {n: str(v) for n, v in fixed.items()}, options])
    if key not in compiled:
        compiled[key] = triton.compile(ASTSource(kernel, signature, fixed), target=HOPPER, options=options)


def call(
    slope_dtype: torch.dtype | None, *, bias: bool = False, weighted: bool = False, **scalars: Any
) -> None:
    objective = make_objective(**scalars)

    def side() -> ModelChunk:
        return ModelChunk(
            torch.zeros(COUNT, VOCABULARY),
            torch.zeros(VOCABULARY).bfloat16() if bias else None,
            torch.zeros(COUNT, 48).bfloat16(),
            torch.zeros(VOCABULARY, 48).bfloat16(),
        )

    weight = torch.ones(COUNT) if weighted else None
    lift = torch.ones(()) if slope_dtype == torch.float16 else None
    slope = None
    if slope_dtype is not None:
        gain = None if slope_dtype == torch.float32 else torch.ones(COUNT)
        slope = GradLogits(torch.zeros(COUNT, VOCABULARY, dtype=slope_dtype), gain)
    stats = torch.zeros(len(TokenStats._fields), COUNT)
    rows = TokenInputs(torch.zeros(COUNT, dtype=torch.int64), weight, weight, weight, lift)
    _launch.chunk_loss(side(), side(), rows, objective, stats, slope)


def main() -> None:
    triton.JITFunction.run = compile_instead
    call(torch.bfloat16, k=K)
    call(torch.float16, k=K, weighted=True, is_clip=2.0, alpha=0.0)
    call(torch.float32, k=K, bias=True, softcap=30.0, support="teacher", alpha=1.0, tail="renormalize")
    call(torch.bfloat16, k=K, bias=True, softcap=30.0, support="teacher")
    call(torch.bfloat16, support="sampled", alpha=1.0)
    call(torch.bfloat16, support="full")
    call(torch.float32, support="full", bias=True, softcap=30.0, alpha=0.0, weighted=True)
    call(None, k=K)
    _elementwise.scaled(torch.zeros(9).bfloat16(), torch.ones(()))
    _elementwise.joined(torch.zeros(3, COUNT, 64), torch.ones(COUNT), torch.zeros(COUNT, 64).bfloat16())
    _elementwise.joined(torch.zeros(1, COUNT, 64), None, torch.zeros(COUNT, 64))
    print(json.dumps(Counter(json.loads(key)[0] for key in compiled)))


if __name__ == "__main__":
    main()

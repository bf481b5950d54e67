"""Run in a process of its own: compile every launch of the kernels for a GPU, without having one.

The fused loss is called on a CPU with kernels that compile instead of running. Prints one JSON object: by kernel,
the number of variants.
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

from sdpo.fused._types import GradLogits, ModelChunk, PolicyInputs, Surrogate, TokenInputs, TokenStats
from sdpo.fused.triton import _elementwise, _launch

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
C, V, D, K = 4, 5000, 48, 100

compiled: dict[str, Any] = {}


def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for ``JITFunction.run``; as there, an argument that is None is a constant."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
    signature = {name: "constexpr" if name in constants else triton_type(values[name]) for name in names}
    options = {"num_warps": kwargs.get("num_warps", 4)}
    key = json.dumps([kernel.fn.__name__, signature, {n: str(v) for n, v in constants.items()}, options])
    if key not in compiled:
        source = ASTSource(kernel, signature, constants)
        compiled[key] = triton.compile(source, target=HOPPER, options=options)


def triton_type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launch_all(
    grad_dtype: torch.dtype | None,
    *,
    bias: bool = False,
    weighted: bool = False,
    policy: bool = False,
    **objective: Any,
) -> None:
    """Launch what one chunk launches, with a gradient of ``grad_dtype``."""

    def model() -> ModelChunk:
        return ModelChunk(
            torch.zeros(C, V),
            torch.zeros(V).bfloat16() if bias else None,
            torch.zeros(C, D).bfloat16(),
            torch.zeros(V, D).bfloat16(),
        )

    weight = torch.ones(C) if weighted else None
    loss_scale = torch.ones(()) if grad_dtype == torch.float16 else None
    grad_logits = None
    if grad_dtype is not None:
        row_scale = None if grad_dtype == torch.float32 else torch.ones(C)
        grad_logits = GradLogits(torch.zeros(C, V, dtype=grad_dtype), row_scale)
    stats = torch.zeros(len(TokenStats._fields), C)
    inputs = PolicyInputs(torch.ones(C), torch.ones(C)) if policy else None
    if policy:
        objective |= {"surrogate": Surrogate("clipped", 0.2, 0.2, (1.0, 1.0))}
    tokens = TokenInputs(torch.zeros(C, dtype=torch.int64), weight, weight, weight, loss_scale, inputs)
    _launch.chunk_loss(model, model, tokens, make_objective(**objective), stats, grad_logits)


def main() -> None:
    triton.JITFunction.run = compile_instead
    launch_all(torch.bfloat16, k=K)
    launch_all(torch.float16, k=K, weighted=True, is_clip=2.0, alpha=0.0)
    launch_all(torch.float32, k=K, bias=True, softcap=30.0, support="teacher", alpha=1.0, tail="renormalize")
    launch_all(torch.bfloat16, k=K, bias=True, softcap=30.0, support="teacher")
    launch_all(torch.bfloat16, support="sampled", alpha=1.0)
    launch_all(torch.bfloat16, support="full")
    launch_all(torch.float32, support="full", bias=True, softcap=30.0, alpha=0.0, weighted=True)
    launch_all(None, k=K)
    launch_all(torch.bfloat16, k=K, policy=True)
    launch_all(torch.float16, k=K, tail="renormalize", softcap=30.0, weighted=True, policy=True)
    launch_all(torch.bfloat16, support="full", policy=True)
    _elementwise.scaled(torch.zeros(9).bfloat16(), torch.ones(()))
    _elementwise.sum_partials(torch.zeros(3, C, D), torch.ones(C), torch.zeros(C, D).bfloat16())
    _elementwise.sum_partials(torch.zeros(1, C, D), None, torch.zeros(C, D))
    print(json.dumps(Counter(json.loads(key)[0] for key in compiled)))


if __name__ == "__main__":
    main()

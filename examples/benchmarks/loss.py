"""Time and memory of the fused loss and its gradients, LM head included, beside its floor and its peers.

    python examples/benchmarks/loss.py                                  # every shape of this device
    python examples/benchmarks/loss.py --shapes 0 --names fused plain   # a few of them
    python examples/benchmarks/loss.py --output examples/benchmarks/records/loss-h100.json

Floor: the matrix products alone, in the chunks of the fused loss. Memory: the peak above that of the inputs, and
the same less the returned gradients, which no implementation avoids. On a CPU the fused loss is compared with the
plain one, `sdpo.distillation_loss`, in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_peers import (
    ALPHA,
    LOSSES,
    PEERS,
    SHAPES,
    TEMPERATURE,
    TOPK,
    Inputs,
    K,
    Shape,
    command,
    make_inputs,
    versions,
)
from torch import Tensor

from sdpo import LMHead
from sdpo.fused._plan import make_plan
from sdpo.fused._types import Plan
from sdpo.fused._validate import check_objective, check_operands

GIB = 2**30


def floor(x: Inputs) -> Callable[[], None]:
    """The products of the fused loss and nothing else, into buffers like its own."""
    plan, count = plan_of(x), x.hidden.shape[0]
    chunk_size = min(plan.chunk_size, count)
    block_size = max(chunk_size, min(plan.grad_block_size, count))
    hidden, weight = x.hidden.detach(), x.weight.detach()
    mixed = {"out_dtype": torch.float32} if weight.dtype == torch.bfloat16 else {}
    student, teacher = (torch.empty(chunk_size, weight.shape[0], device=weight.device) for _ in range(2))
    grad_logits = torch.randn(block_size, weight.shape[0], device=weight.device).to(weight.dtype)
    grad_hidden, grad_weight = (
        torch.empty_like(hidden),
        torch.empty_like(weight) if plan.grad_weight else None,
    )

    def once() -> None:
        for start in range(0, count, block_size):
            stop = min(start + block_size, count)
            for low in range(start, stop, chunk_size):
                high = min(low + chunk_size, stop)
                torch.mm(hidden[low:high], weight.t(), out=student[: high - low], **mixed)
                torch.mm(x.teacher_hidden[low:high], weight.t(), out=teacher[: high - low], **mixed)
                torch.mm(grad_logits[low - start : high - start], weight, out=grad_hidden[low:high])
            if grad_weight is not None:
                beta = 0.0 if start == 0 else 1.0
                grad_weight.addmm_(grad_logits[: stop - start].t(), hidden[start:stop], beta=beta)

    return once


def plan_of(x: Inputs) -> Plan:
    """How the fused loss divides its work on these inputs."""
    objective = check_objective(
        vocabulary=x.weight.shape[0], **TOPK, alpha=ALPHA, temperature=TEMPERATURE, is_clip=None, softcap=None,
        logit_scale=1.0, trust_region_coef=None, given_k=None, surrogate=None,
    )  # fmt: skip
    operands = check_operands(
        student=LMHead(x.hidden, x.weight), teacher=LMHead(x.teacher_hidden, x.weight), reference=None,
        tokens=x.tokens, loss_mask=torch.ones_like(x.tokens, dtype=torch.bool), old_log_probs=None, weights=None,
        advantages=None, policy_weight=None, objective=objective,
    )  # fmt: skip
    return make_plan(operands, objective, chunk_size=None, backend="auto")


def step_of(loss: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], None]:
    def step() -> None:
        x.hidden.grad = x.weight.grad = None
        loss(x).mean().backward()

    return step


def measure(make_step: Callable[[Inputs], Callable[[], None]], x: Inputs, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, and its peak memory in GiB above the inputs."""
    step = make_step(x)
    on_gpu = x.hidden.is_cuda
    step()
    x.hidden.grad = x.weight.grad = None
    gc.collect()
    before = reset_peak(on_gpu)
    step()
    peak = (read_peak(on_gpu) - before) / GIB
    gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.weight) if t.requires_grad) / GIB
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    x.hidden.grad = x.weight.grad = None
    return {"ms": statistics.median(times), "peak_gib": peak, "beside_gradients_gib": peak - gradients}


def reset_peak(on_gpu: bool) -> int:
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak(on_gpu)


def read_peak(on_gpu: bool) -> int:
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def run(shape: Shape, names: list[str], device: str, repeats: int) -> list[dict[str, Any]]:
    x = make_inputs(shape, device)
    plan = plan_of(x)
    head = "trainable" if shape.trains_head else "frozen"
    chunk, block = (min(size, shape.tokens) for size in (plan.chunk_size, plan.grad_block_size))
    print(f"\n{shape.tokens} x {shape.hidden} x {shape.vocabulary}, head {head}")
    print(f"chunks of {chunk} tokens, blocks of logit gradients of {block}")
    print(f"{'':26}{'ms':>9}{'/ floor':>9}{'peak GiB':>10}{'beside gradients':>18}")
    rows: list[dict[str, Any]] = []
    for name in ["floor", *names]:
        make_step = floor if name == "floor" else lambda x, name=name: step_of(LOSSES[device][name], x)
        # Else a peer would run what it compiled for the last shape.
        torch.compiler.reset()
        try:
            row = {"name": name, **measure(make_step, x, repeats)}
        except (ImportError, RuntimeError) as error:
            if name not in PEERS:
                raise
            print(f"{name:26}{type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
            rows.append({"name": name, "error": type(error).__name__})
            continue
        rows.append(row)
        ratio = row["ms"] / rows[0]["ms"]
        memory = f"{row['peak_gib']:10.2f}{row['beside_gradients_gib']:18.2f}" if name != "floor" else ""
        print(f"{name:26}{row['ms']:9.1f}{ratio:9.2f}{memory}", flush=True)
    return rows


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES[device])), help="their numbers"
    )
    parser.add_argument(
        "--names", nargs="*", default=list(LOSSES[device]), help="implementations beside the floor"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file for the record, JSON")
    args = parser.parse_args()
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else threads
    print(where, versions())
    record: dict[str, Any] = {"device": where, "versions": versions(), "command": ["loss.py", *command()]}
    record |= {"k": K, "alpha": ALPHA, "shapes": []}
    for number in args.shapes:
        shape = SHAPES[device][number]
        record["shapes"].append({**shape._asdict(), "results": run(shape, args.names, device, args.repeats)})
        if args.output:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

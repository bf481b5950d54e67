"""The loss and its gradients, head included: time and memory of the fused loss, its floor and its peers.

    python examples/benchmarks/loss.py                                  # every shape of this device
    python examples/benchmarks/loss.py --shapes 0 --names fused plain   # a few of them
    python examples/benchmarks/loss.py --output examples/benchmarks/records/loss-h200.json

Floor: the matrix products alone, in the chunks the fused loss uses. Memory: the peak above what was there before,
and the same less the gradients that come out, which nothing can avoid. On a CPU the fused loss meets the plain one,
`sdpo.topk_distillation_loss`, in float32.
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
from loss_peers import ALPHA, LOSSES, PEERS, SHAPES, Inputs, K, Shape, command, make_inputs, versions
from torch import Tensor

from sdpo.fused._plan import check_objective, check_operands, make_plan

GIB = 2**30


def floor(x: Inputs) -> Callable[[], None]:
    """The products of the fused loss and nothing else, writing where it writes."""
    plan = plan_of(x)
    rows, width = x.hidden.shape[0], min(plan.chunk_rows, x.hidden.shape[0])
    block = max(width, min(plan.slope_rows, rows))
    hidden, head = x.hidden.detach(), x.head.detach()
    wide = {"out_dtype": torch.float32} if head.dtype == torch.bfloat16 else {}
    logits = [torch.empty(width, head.shape[0], dtype=torch.float32, device=head.device) for _ in range(2)]
    slopes = torch.randn(block, head.shape[0], device=head.device, dtype=torch.float32).to(head.dtype)
    hidden_gradient, head_gradient = torch.empty_like(hidden), torch.empty_like(head) if plan.head else None

    def once() -> None:
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            for low in range(start, stop, width):
                high = min(low + width, stop)
                torch.mm(hidden[low:high], head.t(), out=logits[0][: high - low], **wide)
                torch.mm(x.teacher_hidden[low:high], head.t(), out=logits[1][: high - low], **wide)
                torch.mm(slopes[low - start : high - start], head, out=hidden_gradient[low:high])
            if head_gradient is not None:
                beta = 0.0 if start == 0 else 1.0
                head_gradient.addmm_(slopes[: stop - start].t(), hidden[start:stop], beta=beta)

    return once


def plan_of(x: Inputs) -> Any:
    recipe = check_objective(
        vocabulary=x.head.shape[0], k=K, alpha=ALPHA, tail="bucket", support="student", is_clip=None,
        temperature=1.0, softcap=None, logit_scale=1.0, trust_region_coef=None,
    )  # fmt: skip
    operands = check_operands(
        student=(x.hidden, x.head, None), teacher=(x.teacher_hidden, x.head, None), reference=(None, None, None),
        tokens=x.tokens, loss_mask=torch.ones_like(x.tokens, dtype=torch.bool), old_log_probs=None,
        extra_weights=None, trust_region_coef=None,
    )  # fmt: skip
    return make_plan(operands, recipe, chunk_size=None, backend="auto")


def step_of(loss: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], None]:
    def step() -> None:
        x.hidden.grad = x.head.grad = None
        loss(x).mean().backward()

    return step


def measure(make_step: Callable[[Inputs], Callable[[], None]], x: Inputs, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, and its peak memory in GiB above the inputs."""
    step = make_step(x)
    on_gpu = x.hidden.is_cuda
    step()
    x.hidden.grad = x.head.grad = None
    gc.collect()
    before = reset_peak(on_gpu)
    step()
    peak = (read_peak(on_gpu) - before) / GIB
    gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.head) if t.requires_grad) / GIB
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    x.hidden.grad = x.head.grad = None
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
    head = "learns" if shape.head_learns else "frozen"
    print(f"\n{shape.tokens} x {shape.hidden} x {shape.vocabulary}, head {head}")
    print(
        f"chunks of {min(plan.chunk_rows, shape.tokens)}, slopes of {min(plan.slope_rows, shape.tokens)} tokens"
    )
    print(f"{'':26}{'ms':>9}{'/ floor':>9}{'peak GiB':>10}{'beside gradients':>18}")
    rows: list[dict[str, Any]] = []
    for name in ["floor", *names]:
        make_step = floor if name == "floor" else lambda x, name=name: step_of(LOSSES[device][name], x)
        # What a peer compiled for the last shape would be in the way of this one.
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

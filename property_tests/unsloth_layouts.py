"""A micro-batch of an Unsloth run by every layout of its rows: the loss, its gradient, and Unsloth's attention.

`watch` records it in the process that trains, `summary` describes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

# The configuration of each layout; "alone" has one row in a forward, so that nothing is packed or padded.
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"packing": "groups", "max_tokens_per_forward": 1},
    "packed": {"packing": "packed"},
    "groups": {"packing": "groups"},
    "padded": {"packing": "padded"},
}
# The functions that Unsloth's attention may call; some are not installed.
KERNELS = [
    "flash_attn_varlen_func", "flash_attn_func", "xformers_attention", "_torch_varlen_packed",
    "_sdpa_packed_segments", "_training_sdpa", "_inference_sdpa",
]  # fmt: skip


def watch(trainer: Any, limit: int | None = None) -> list[dict[str, Any]]:
    """Record each micro-batch with a loss: the layout of the run, and the gaps of every layout.

    A gap is relative to the result with one row in each forward; that of the gradient is in the norm over all
    parameters.

    Args:
        trainer: a trainer that has not trained yet.
        limit: number of micro-batches that run by every layout, from the first on; `None`: all.

    Returns:
        A list that is filled while the trainer trains.
    """
    compute = trainer._micro_batch_output
    found: list[dict[str, Any]] = []

    def output(*args: Any, **kwargs: Any) -> Any:
        # Before the run's own forward: nothing may replace weights between that and its backward.
        gaps, attention = {}, {}
        if limit is None or len(found) < limit:
            gaps, attention = _by_layout(trainer, partial(compute, *args, **kwargs))
        result = compute(*args, **kwargs)
        if result.metrics:
            # A metric is a sum and a count.
            forwards, _ = result.metrics["self_distillation/teacher_forwards"]
            _, positions = result.metrics["self_distillation/teacher_padding_fraction"]
            found.append(
                {
                    "layout": list(trainer._forward_mode.layout[:2]),
                    "teacher_forwards": int(forwards),
                    "teacher_positions": int(positions),
                    "gaps": gaps,
                    "attention": attention,
                }
            )
        return result

    trainer._micro_batch_output = output
    return found


def _by_layout(
    trainer: Any, compute: Callable[[], Any]
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    with torch.no_grad():
        # Also finds the run's layout, which needs forwards of its own.
        has_loss = bool(compute().metrics)
    if not has_loss:
        return {}, {}
    totals, paths = {}, {}
    for name in LAYOUTS:
        with _layout(trainer, name), attention() as paths[name]:
            totals[name] = _total_and_gradient(trainer, compute)
    gaps = {name: _gaps(values, totals["alone"]) for name, values in totals.items()}
    return gaps, {name: sorted(seen) for name, seen in paths.items()}


@contextlib.contextmanager
def _layout(trainer: Any, name: str) -> Iterator[None]:
    check, changes = trainer._check_model, LAYOUTS[name]

    def check_model(*args: Any) -> Any:
        context, fused = check(*args)
        config = replace(context.config, **changes)
        return replace(context, config=config, layout=changes["packing"]), fused

    trainer._check_model = check_model
    try:
        yield
    finally:
        del trainer._check_model


def _total_and_gradient(trainer: Any, compute: Callable[[], Any]) -> torch.Tensor:
    """[1 + n] float64: the loss, and the gradients of all trainable parameters."""
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    total = compute().total
    gradients = torch.autograd.grad(total, parameters)
    return torch.cat([part.detach().double().flatten() for part in (total, *gradients)])


def _gaps(values: torch.Tensor, alone: torch.Tensor) -> dict[str, float]:
    gap = values - alone
    return {
        "loss": float(gap[0].abs() / alone[0].abs()),
        "gradient": float(gap[1:].norm() / alone[1:].norm()),
    }


@contextlib.contextmanager
def attention() -> Iterator[set[str]]:
    """Collects how Unsloth's attention was called, and which kernels it called."""
    from unsloth.utils import attention_dispatch as dispatch

    paths: set[str] = set()
    calls: list[str] = []

    def named(name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kernel(*args, **kwargs)

        return call

    run = dispatch._run_attention

    def run_attention(*, config: Any, context: Any, Q: Any, K: Any, V: Any) -> Any:
        calls.clear()
        out = run(config=config, context=context, Q=Q, K=K, V=V)
        mode = "training" if context.training else "evaluation"
        rows = "padded" if context.attention_mask is not None else "plain"
        rows = "packed" if context.seq_info is not None else rows
        names = ", ".join(dict.fromkeys(calls))
        paths.add(f"{mode} {rows} {str(Q.dtype).removeprefix('torch.')} {config.backend}: {names}")
        return out

    kernels = {name: vars(dispatch)[name] for name in KERNELS if vars(dispatch).get(name) is not None}
    try:
        for name, kernel in kernels.items():
            setattr(dispatch, name, named(name, kernel))
        dispatch._run_attention = run_attention
        yield paths
    finally:
        dispatch._run_attention = run
        for name, kernel in kernels.items():
            setattr(dispatch, name, kernel)


def summary(micro_batches: list[dict[str, Any]]) -> str:
    """One line for each micro-batch, and one for each way in which attention ran."""
    lines = []
    for number, seen in enumerate(micro_batches):
        layout, reason = seen["layout"]
        gaps = (f"{name} {gap['loss']:.1e} {gap['gradient']:.1e}" for name, gap in seen["gaps"].items())
        lines.append(
            f"micro-batch {number}: {layout}{reason and f' ({reason})'}, {seen['teacher_forwards']} teacher "
            f"forwards of {seen['teacher_positions']} positions; loss and gradient against rows alone: "
            + (", ".join(gaps) or "not compared")
        )
    for name in LAYOUTS:
        paths = {path for seen in micro_batches for path in seen["attention"].get(name, [])}
        lines += [f"{name}: {path}" for path in sorted(paths)]
    return "\n".join(lines)

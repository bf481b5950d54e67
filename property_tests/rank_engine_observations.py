"""What a rank sees of DeepSpeed's engine, in a process that rank_driver.py starts.

    WORLD_SIZE=2 RANK=0 ... python rank_engine_observations.py FOLDER deepspeed

The result is written to the folder as `WORLD-RANK.pt`.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from programs import EXAMPLES
from rank_driver import DEEPSPEED, RUNS, Run, make_trainer, rank, strategy, world_size
from torch import Tensor
from transformers import TrainerCallback

sys.path.append(str(EXAMPLES / "benchmarks"))

# Each runs with whole layers, and without.
WHOLE_LAYER_RUNS = {
    "lora": Run({"learning_rate": 0.5, "gradient_checkpointing": True}, adapter="lora"),
    "generated from parts": Run({"gradient_checkpointing": True, "ds3_gather_for_generation": False}),
    "generated": Run({"gradient_checkpointing": True}),
    **{
        name: RUNS[name]
        for name in (
            "untied",
            "whole logits",
            "the second rank has nothing to learn",
            "a GRPO part with masks and ratios of rows",
            "trust region",
            "several forwards",
        )
    },
}


FAILING = ("model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj")


def observe(
    folder: Path, run: Run = RUNS["untied"], *, generates: bool = False, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Losses of every step, and student and teacher afterwards. `generates`: completions are TRL's own."""
    from sdpo_rl.teacher import shards

    trainer = make_trainer(folder, run, **DEEPSPEED["zero3"])
    for callback in callbacks:
        trainer.add_callback(callback)
    if generates:
        del trainer._generate_single_turn
    trainer.train()
    own = shards.local_shards(trainer._unwrapped)
    return {
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "student": {name: shard.clone() for name, shard in own.items()},
        "teacher": {name: shard.clone() for name, shard in trainer._teacher.state.params.items()},
    }


def observe_late_writes(folder: Path) -> dict[str, Any]:
    """A run in which copies of the teacher's weights get their values only when the host waits.

    A GPU may be as late: DeepSpeed gathers weights in a stream of its own, which does not wait for the copies.
    """
    from sdpo_rl.teacher import partitions

    late: list[tuple[Tensor, Tensor]] = []

    def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        late.extend(zip(targets, values, strict=True))

    def wait(*_: Any) -> None:
        while late:
            target, value = late.pop(0)
            target.copy_(value)

    with patch.object(partitions, "_write", write), patch.object(partitions, "_wait_for_writes", wait):
        return observe(folder)


def observe_layers(folder: Path, name: str, *, whole: bool) -> dict[str, Any]:
    """A run, and how many modules DeepSpeed gathered weights for."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetch, modules = PartitionedParameterCoordinator.fetch_sub_module, 0

    def count_module(*args: Any, **kwargs: Any) -> None:
        nonlocal modules
        modules += 1
        fetch(*args, **kwargs)

    variables = {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Qwen2DecoderLayer"} if whole else {}
    with (
        patch.dict(os.environ, variables),
        patch.object(PartitionedParameterCoordinator, "fetch_sub_module", count_module),
    ):
        return {
            **observe(folder, WHOLE_LAYER_RUNS[name], generates=name.startswith("generated")),
            "modules": modules,
        }


def observe_steps(folder: Path) -> dict[str, list[int]]:
    """How often each step of a run dropped DeepSpeed's trace, and how many gathered parameters it released."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from sdpo_rl.teacher import partitions

    drop, dropped = PartitionedParameterCoordinator._invalidate_trace, [0]
    release, released = partitions._release, [0]

    def count_dropped(coordinator: Any) -> None:
        dropped[-1] += 1
        drop(coordinator)

    def count_released(parameters: Sequence[Any]) -> None:
        released[-1] += sum(map(partitions._is_gathered, parameters))
        release(parameters)

    class Steps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            dropped.append(0)
            released.append(0)

    with (
        patch.object(PartitionedParameterCoordinator, "_invalidate_trace", count_dropped),
        patch.object(partitions, "_release", count_released),
    ):
        observe(folder, Run({"gradient_checkpointing": True, "max_steps": 6}), callbacks=[Steps()])
    return {"dropped": dropped[:-1], "released": released[:-1]}


def observe_error(folder: Path, module: str) -> dict[str, Any]:
    """A run whose second teacher's forward fails within a module.

    Seen: the error, the student before and after, and the parameters that DeepSpeed would refuse to release.
    """
    from sdpo_rl.teacher import shards

    trainer = make_trainer(folder, RUNS["untied"], **DEEPSPEED["zero3"])
    seen: dict[str, Any] = {}

    def student() -> dict[str, Tensor]:
        return {name: shard.clone() for name, shard in shards.local_shards(trainer._unwrapped).items()}

    def fail(*_: Any) -> None:
        if not torch.is_grad_enabled():
            raise MemoryError(module)

    class SecondStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                seen["before"] = student()
                trainer._unwrapped.get_submodule(module).register_forward_pre_hook(fail)

    trainer.add_callback(SecondStep())
    try:
        trainer.train()
    except MemoryError as error:
        seen["error"] = str(error)
    active = [name for name, p in trainer._unwrapped.named_parameters() if p.ds_active_sub_modules]
    return {**seen, "after": student(), "active": active}


def observe_freed(folder: Path, kind: str) -> dict[str, set[str]]:
    """What of a run is still there after its trainer, without and with the benchmark's `free_engine`."""
    import ranks

    seen: dict[str, set[str]] = {}
    for name in ("kept", "freed"):
        trainer = make_trainer(folder / name, RUNS["untied"], max_steps=2, **DEEPSPEED[kind])
        trainer.train()
        engine = trainer.model_wrapped
        parts = {
            "engine": weakref.ref(engine),
            "optimizer": weakref.ref(engine.optimizer),
            "weight": weakref.ref(trainer._unwrapped.get_output_embeddings().weight),
            "teacher": weakref.ref(trainer._teacher),
        }
        if name == "freed":
            ranks.free_engine(trainer)
        del trainer, engine
        gc.collect()
        seen[name] = {part for part, reference in parts.items() if reference() is not None}
    return seen


def main(folder: Path) -> None:
    if world_size() == 1:
        return
    seen: dict[str, Any] = {}
    for name, run in {"plain": observe, "late writes": observe_late_writes}.items():
        with strategy("zero3"):
            seen[name] = run(folder / name)
    with strategy("zero3"):
        seen["steps"] = observe_steps(folder / "steps")
    for module in FAILING:
        with strategy("zero3"):
            seen["error", module] = observe_error(folder / module, module)
    for name in WHOLE_LAYER_RUNS:
        for whole in (False, True):
            with strategy("zero3"):
                seen[name, whole] = observe_layers(folder / f"{name}-{whole}", name, whole=whole)
    for kind in DEEPSPEED:
        with strategy(kind):
            seen["freed", kind] = observe_freed(folder / kind, kind)
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

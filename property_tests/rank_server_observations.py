"""What a vLLM server would receive from several processes, in one that rank_driver.py starts.

    WORLD_SIZE=2 RANK=0 ... python rank_server_observations.py FOLDER torch|deepspeed

The result is written to the folder as `WORLD-RANK.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rank_driver import DEEPSPEED, RUNS, make_trainer, rank, strategy, world_size
from torch import Tensor
from vllm_server_client import expected_weights, largest_difference, replaced

SCALE = 2.0  # of the adapters of rank_driver.py
NAMES = ("untied", "lora with a trained head")
KINDS = {"torch": ("ddp", "fsdp2"), "deepspeed": ("zero3",)}


def whole(trainer: Any) -> dict[str, Tensor]:
    """All parameters, whole; every process calls it."""
    model = trainer._unwrapped
    with trainer.vllm_generation._dist.gather_params(list(model.parameters())):
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in model.named_parameters()
        }


def observe(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """A step, and two syncs after it."""
    with replaced():
        trainer = make_trainer(
            folder,
            RUNS[name],
            use_vllm=True,
            vllm_mode="server",
            vllm_importance_sampling_correction=False,
            max_steps=1,
            **DEEPSPEED.get(kind, {}),
        )
    client = getattr(trainer.vllm_generation, "vllm_client", None)
    start = expected_weights(whole(trainer), SCALE)
    trainer.train()
    before = whole(trainer)
    for _ in range(2):  # the second from what the first has left
        trainer.vllm_generation.sync_weights()
    seen: dict[str, Any] = {"sends": client is not None, "before": before, "after": whole(trainer)}
    if client is not None:
        seen["syncs"] = client.calls.count("sync")
        seen["changed"] = largest_difference(client.received, start)
        seen["difference"] = largest_difference(client.received, expected_weights(before, SCALE))
    return seen


def main(folder: Path, library: str) -> None:
    if world_size() == 1:
        return
    seen: dict[tuple[str, str], Any] = {}
    for kind in KINDS[library]:
        for name in NAMES:
            with strategy(kind):
                seen[kind, name] = observe(folder / kind / name, name, kind)
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""How often a step reads a value from the device: each time it waits for all the work that was queued."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "equal",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}


class Reads(TorchFunctionMode):
    """Counts the functions whose result the host needs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(function, "__name__", "")) in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def reads_of_losses(output: Path) -> list[Counter[str]]:
    """Of each micro-batch's loss after the first, which tests the model."""
    trainer = tiny.trainer(output, max_steps=3)
    compute, found = trainer.compute_loss, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        with Reads() as reads:
            loss = compute(*args, **kwargs)
        found.append(reads.counts)
        return loss

    trainer.compute_loss = counted
    trainer.train()
    assert len(found) > 1
    return found[1:]


def test_a_loss_reads_the_rows_and_the_active_tokens(tmp_path: Path) -> None:
    for counts in reads_of_losses(tmp_path):
        assert counts == {"tolist": 1, "nonzero": 1}


@pytest.mark.parametrize("read", [float, int, bool, Tensor.tolist, Tensor.item, Tensor.nonzero])
def test_every_read_is_counted(read: Any) -> None:
    with Reads() as reads:
        read(torch.ones(()))
    assert sum(reads.counts.values()) == 1

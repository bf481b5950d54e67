"""One denominator per optimizer step, for any micro-batches, accumulation and generation schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_rl.step.denominator import StepWindow


@dataclass(frozen=True)
class Schedule:
    slots: int  # micro-batches per generation batch
    iterations: int  # passes over each
    steps: list[list[int]]  # of each optimizer step the length that is said at each of its micro-batches
    counts: list[list[int]]  # active tokens, by generation batch and slot

    @property
    def generate_every(self) -> int:
        return self.slots * self.iterations


LENGTH = st.integers(1, 5)
# The last micro-batches of a stream's pass belong to the first step of the next pass, whose length is said again.
STEP = LENGTH.map(lambda length: [length] * length) | st.lists(LENGTH, min_size=1, max_size=6)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    slots, iterations = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    steps = draw(st.lists(STEP, min_size=1, max_size=6))
    batches = -(-sum(map(len, steps)) // (slots * iterations))
    row = st.lists(st.integers(0, 6), min_size=slots, max_size=slots)
    return Schedule(slots, iterations, steps, draw(st.lists(row, min_size=batches, max_size=batches)))


DIVERGENCE_ALONE = (0.0, 1.0)


def run(window: Any, schedule: Schedule, value: float) -> tuple[list[float], list[float]]:
    """The accumulated gradient of each step, where every active token contributes `value`; and the true counts."""
    gradients, counts, micro = [], [], 0
    for lengths in schedule.steps:
        gradient, logs, count = 0.0, 0.0, 0
        for index, length in enumerate(lengths):
            generation, slot = micro // schedule.generate_every, micro % schedule.slots
            if micro % schedule.generate_every == 0:
                distilled = torch.tensor(schedule.counts[generation])
                window.set_counts(distilled, torch.stack([torch.zeros_like(distilled), distilled], dim=1))
            denominator = window.denominator(
                step=micro,
                length=length,
                generate_every=schedule.generate_every,
                part_weights=DIVERGENCE_ALONE,
            )
            assert denominator >= 1
            here = schedule.counts[generation][slot]
            loss = value * here / denominator
            logged, correction = window.end_micro_batch(loss, ends_step=index == len(lengths) - 1)
            gradient += float(loss)
            logs += float(logged)
            count += here
            micro += 1
        gradients.append(gradient * (1.0 if correction is None else float(correction)))
        assert logs == pytest.approx(gradients[-1], rel=1e-5), "logged losses add up to the loss of the step"
        counts.append(float(count))
        assert window.has_signal == (count > 0)
    return gradients, counts


def property_a_step_is_a_mean_over_its_active_tokens(window: Any, schedule: Schedule) -> None:
    gradients, counts = run(window(), schedule, 3.0)
    assert gradients == pytest.approx([3.0 if count else 0.0 for count in counts], rel=1e-5)


def property_no_correction_where_all_counts_are_known(window: Any, schedule: Schedule) -> None:
    tracked = window()
    run(tracked, schedule, 1.0)
    *before, last = schedule.steps
    begin = sum(map(len, before))
    is_known = begin // schedule.generate_every == (begin + len(last) - 1) // schedule.generate_every
    if is_known and last[0] == len(last):
        assert tracked.correction() is None


class PerMicroBatch(StepWindow):
    """Each micro-batch over its own count, then averaged: depends on how the step was split."""

    def denominator(self, *, step: int, length: int, **arguments: Any) -> Tensor:
        super().denominator(step=step, length=length, **arguments)
        assert self._counts is not None
        return self._counts[step % len(self._counts)].clamp(min=1.0) * length


class BelievesTheLength(StepWindow):
    """Exact also where the step has more micro-batches than was said at its beginning."""

    def end_micro_batch(self, loss: Tensor, *, ends_step: bool) -> tuple[Tensor, Tensor | None]:
        self._length = self.index + 1
        return super().end_micro_batch(loss, ends_step=ends_step)


class AlwaysCorrects(StepWindow):
    def correction(self) -> Tensor | None:
        return torch.ones(())


CLAIMS = [
    *(
        Claim(
            property_a_step_is_a_mean_over_its_active_tokens,
            StepWindow,
            wrong,
            {"schedule": schedules()},
        )
        for wrong in (PerMicroBatch, BelievesTheLength)
    ),
    Claim(
        property_no_correction_where_all_counts_are_known,
        StepWindow,
        AlwaysCorrects,
        {"schedule": schedules()},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_counts_come_first() -> None:
    with pytest.raises(RuntimeError, match="set_counts"):
        StepWindow().denominator(step=0, length=1, generate_every=1, part_weights=DIVERGENCE_ALONE)


class Transfers(TorchDispatchMode):
    """Records operations that copy values to the device, or wait for values on it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("index", "lift_fresh", "nonzero", "_local_scalar_dense"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_the_denominator_does_not_synchronize() -> None:
    """It is computed while the forwards are queued, and would wait for all of them."""
    window, counts = StepWindow(), torch.tensor([1, 2, 3, 4])
    window.set_counts(counts, torch.stack([counts, counts], dim=1))
    arguments = {"generate_every": 4, "part_weights": DIVERGENCE_ALONE}
    with Transfers() as transfers:
        known = window.denominator(step=2, length=2, **arguments)
        window.end_micro_batch(known, ends_step=False)
        window.denominator(step=3, length=4, **arguments)
        window.end_micro_batch(known, ends_step=True)
    assert transfers.seen == []
    assert known.tolist() == 7.0
    with Transfers() as transfers:
        counts[[2, 3]].sum()
    assert transfers.seen

"""Teacher weights against closed forms in float64, with counter-examples that each property rejects."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sdpo
from sdpo.teacher import (
    Teacher,
    TeacherState,
    ema,
    frozen,
    live,
    rate_per_tick,
    teacher_distance,
    trust_region_hidden,
    trust_region_logits,
)

Params = dict[str, Tensor]
SHAPES = {"embed": (7, 3), "norm": (5,), "scale": ()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RATES = st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.5, 0.7, 1.0]) | st.floats(0.0, 1.0)
SEEDS = st.integers(0, 10_000)


def students_of(
    seed: int, steps: int, dtype: torch.dtype, shapes: Mapping[str, tuple] = SHAPES
) -> list[Params]:
    """A student's parameters θ_0, ..., θ_steps."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(steps + 1)
    ]


def run(teacher: Teacher, students: list[Params]) -> TeacherState:
    state = teacher.init(students[0])
    for student in students[1:]:
        state = teacher.update(state, student)
    return state


def equal(left: Params, right: Params) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def closed_form(students: list[Params], rate: float) -> Params:
    """θ'_n = (1−r)^n θ_0 + r Σ_k (1−r)^(n−k) θ_k in float64, with no recursion."""
    n = len(students) - 1
    weights = [(1 - rate) ** n, *(rate * (1 - rate) ** (n - k) for k in range(1, n + 1))]
    return {
        name: sum((w * s[name].double() for w, s in zip(weights, students, strict=True)), torch.tensor(0.0))
        for name in students[0]
    }


# Counter-examples -----------------------------------------------------------------------------------------


def by_rule(
    rule: Callable[[Tensor, Tensor], Tensor], start: Callable[[Tensor], Tensor] | None = None
) -> Teacher:
    """A teacher that applies `rule` parameter by parameter, without a single check."""
    start = start or (lambda p: p.detach().float().clone())
    return Teacher(
        init=lambda params: TeacherState({name: start(param) for name, param in params.items()}, 0),
        update=lambda state, params: TeacherState(
            {name: rule(old, params[name]) for name, old in state.params.items()}, state.ticks + 1
        ),
    )


def plain_bf16(rate: float) -> Teacher:
    return by_rule(lambda old, new: torch.lerp(old, new.bfloat16(), rate), lambda p: p.detach().bfloat16())


def swapped(rate: float) -> Teacher:
    return by_rule(lambda old, new: torch.lerp(new.float(), old, rate))


def by_position(rate: float) -> Teacher:
    def update(state: TeacherState, params: Mapping[str, Tensor]) -> TeacherState:
        pairs = zip(state.params.items(), params.values(), strict=True)
        return TeacherState(
            {n: torch.lerp(old, new.float(), rate) for (n, old), new in pairs}, state.ticks + 1
        )

    return Teacher(init=ema(update_rate=rate).init, update=update)


def zero_start(rate: float) -> Teacher:
    return by_rule(
        lambda old, new: torch.lerp(old, new.float(), rate),
        lambda p: torch.zeros_like(p, dtype=torch.float32),
    )


def aliasing(rate: float) -> Teacher:
    return by_rule(lambda old, new: torch.lerp(old, new.float(), rate), lambda p: p.detach())


def overwriting(rate: float) -> Teacher:
    return by_rule(lambda old, new: old.lerp_(new.float(), rate))


def rejects(property_: Callable[..., None], *args: Any) -> bool:
    try:
        property_(*args)
    except AssertionError:
        return True
    return False


# Closed forms ------------------------------------------------------------------------------------------------


def follows_the_closed_form(teacher: Teacher, students: list[Params], rate: float) -> None:
    state, ideal = run(teacher, students), closed_form(students, rate)
    assert state.ticks == len(students) - 1
    for name, expected in ideal.items():
        double = students[0][name].dtype == torch.float64
        assert state.params[name].dtype == (torch.float64 if double else torch.float32)
        torch.testing.assert_close(
            state.params[name].double(), expected, rtol=0, atol=1e-13 if double else 3e-6, check_dtype=False
        )


@given(SEEDS, st.integers(0, 12), st.sampled_from(DTYPES), RATES)
def test_ema_follows_the_closed_form(seed: int, steps: int, dtype: torch.dtype, rate: float) -> None:
    students = students_of(seed, steps, dtype)
    follows_the_closed_form(ema(update_rate=rate), students, rate)
    follows_the_closed_form(ema(update_rate=rate, inplace=True), students, rate)


@pytest.mark.parametrize("counter_example", [swapped, zero_start, plain_bf16])
def test_the_closed_form_rejects(counter_example: Callable[[float], Teacher]) -> None:
    assert rejects(follows_the_closed_form, counter_example(0.05), students_of(0, 12, torch.bfloat16), 0.05)


def averages_by_name(teacher: Teacher, rate: float) -> None:
    students = students_of(1, 1, torch.float32, {"a": (4,), "b": (4,)})
    reordered = [students[0], dict(reversed(students[1].items()))]
    assert equal(run(teacher, reordered).params, run(ema(update_rate=rate), students).params)


def simple_rate(rate: float, *, samples: float, per_samples: float) -> float:
    """A counter-example: in proportion to the samples."""
    return rate * samples / per_samples


def gap_of_composition(rule: Callable[..., float], rate: float, samples: int, per_samples: int) -> float:
    """How far two updates of n samples are from one of 2n, in the weight that the start keeps."""
    once = rule(rate, samples=samples, per_samples=per_samples)
    twice = rule(rate, samples=2 * samples, per_samples=per_samples)
    return abs((1 - once) ** 2 - (1 - twice))


@given(st.floats(0.0, 1.0), st.integers(1, 10_000), st.integers(1, 10_000))
def test_two_updates_of_n_samples_are_one_of_twice_as_many(
    rate: float, samples: int, per_samples: int
) -> None:
    assert gap_of_composition(rate_per_tick, rate, samples, per_samples) < 1e-12
    assert rate_per_tick(rate, samples=samples, per_samples=samples) == rate


def test_the_composition_rejects_a_rate_in_proportion() -> None:
    assert gap_of_composition(simple_rate, 0.05, 64, 256) > 1e-4


def test_a_rate_for_more_samples_is_a_smaller_one_per_update() -> None:
    assert rate_per_tick(0.05, samples=64, per_samples=256) == pytest.approx(0.0127, abs=5e-5)
    assert rate_per_tick(0.05, samples=256, per_samples=64) == pytest.approx(0.1855, abs=5e-5)
    assert rate_per_tick(1e-12, samples=1, per_samples=1000) == pytest.approx(1e-15, rel=1e-6)
    assert [rate_per_tick(rate, samples=1e300, per_samples=1e-300) for rate in (0.0, 1.0)] == [0.0, 1.0]


def test_parameters_are_matched_by_name() -> None:
    averages_by_name(ema(update_rate=0.3), 0.3)
    averages_by_name(ema(update_rate=0.3, dtype="float32", inplace=True), 0.3)
    assert rejects(averages_by_name, by_position(0.3), 0.3)


def starts_as_the_student_and_rests_there(teacher: Teacher, student: Params) -> None:
    state = teacher.init(student)
    assert state.ticks == 0
    for _ in range(3):
        for name, kept in state.params.items():
            assert torch.equal(kept.double(), student[name].double())
        state = teacher.update(state, student)


@given(SEEDS, st.sampled_from(DTYPES), RATES)
def test_an_unmoved_student_is_a_fixed_point(seed: int, dtype: torch.dtype, rate: float) -> None:
    student = students_of(seed, 0, dtype)[0]
    for teacher in (ema(update_rate=rate), frozen(), live()):
        starts_as_the_student_and_rests_there(teacher, student)
    if dtype == torch.bfloat16:
        starts_as_the_student_and_rests_there(ema(update_rate=rate, dtype="bfloat16"), student)


def test_the_fixed_point_rejects() -> None:
    student = students_of(0, 0, torch.float32)[0]
    forgetting = by_rule(lambda old, new: 0.9 * old + 0.05 * new)
    # The two-product form of the average: right in exact arithmetic, adrift by a rounding every tick.
    two_products = by_rule(lambda old, new: 0.95 * old + 0.05 * new)
    for counter_example in (zero_start(0.05), forgetting, two_products):
        assert rejects(starts_as_the_student_and_rests_there, counter_example, student)


@given(SEEDS, st.integers(1, 6), st.sampled_from(DTYPES))
def test_rate_0_is_frozen_and_rate_1_is_the_last_student(seed: int, steps: int, dtype: torch.dtype) -> None:
    students = students_of(seed, steps, dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert equal(run(ema(update_rate=0), students).params, {n: p.to(kept) for n, p in students[0].items()})
    assert equal(run(frozen(), students).params, students[0])
    assert equal(run(ema(update_rate=1), students).params, {n: p.to(kept) for n, p in students[-1].items()})
    assert not equal(run(swapped(0.0), students).params, run(frozen(), students).params)
    assert run(live(), students) == TeacherState({}, steps)


def stays_in_the_hull(teacher: Teacher, students: list[Params]) -> None:
    for name, kept in run(teacher, students).params.items():
        past = torch.stack([student[name].to(kept.dtype) for student in students])
        assert bool((past.amin(0) <= kept).all())
        assert bool((kept <= past.amax(0)).all())


@given(SEEDS, st.integers(0, 6), st.sampled_from([torch.float32, torch.bfloat16]), RATES)
def test_the_average_never_leaves_the_range_of_the_past(
    seed: int, steps: int, dtype: torch.dtype, rate: float
) -> None:
    students = students_of(seed, steps, dtype)
    stays_in_the_hull(ema(update_rate=rate), students)
    if dtype == torch.bfloat16:
        stays_in_the_hull(ema(update_rate=rate, dtype="bfloat16", seed=seed), students)


def test_the_hull_rejects_an_extrapolating_average() -> None:
    students = students_of(0, 3, torch.float32)
    assert rejects(stays_in_the_hull, by_rule(lambda old, new: torch.lerp(old, new, 1.5)), students)


# Low precision -----------------------------------------------------------------------------------------------


def drifting(dtype: torch.dtype, steps: int = 200) -> list[Params]:
    """Weights of the usual size under the drift of an optimizer: 1e-5 per step."""
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.02
    return [{"w": (start + 1e-5 * step).to(dtype)} for step in range(steps + 1)]


def moved(teacher: Teacher, students: list[Params], rate: float) -> float:
    """The movement of the teacher as a fraction of the ideal one."""
    ideal, start = closed_form(students, rate)["w"], students[0]["w"].double()
    return float((run(teacher, students).params["w"].double() - start).mean() / (ideal - start).mean())


@pytest.mark.parametrize("rate", [0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slow_drift_is_followed(rate: float, dtype: torch.dtype) -> None:
    students = drifting(dtype)
    assert moved(ema(update_rate=rate), students, rate) == pytest.approx(1.0, abs=1e-3)
    assert moved(ema(update_rate=rate, dtype="bfloat16"), students, rate) == pytest.approx(1.0, abs=2e-2)
    assert moved(plain_bf16(rate), students, rate) < (0.7 if rate == 0.05 else 0.4)


def test_bfloat16_parameters_still_move_their_teacher() -> None:
    # One representable step of the student, which bfloat16 arithmetic at r = 0.05 would round away for good.
    before, after = ({"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (1.0, 1.0078125))
    students = [before, *[after] * 100]
    assert run(ema(update_rate=0.05), students).params["w"].item() == pytest.approx(
        1.0 + 0.0078125 * (1 - 0.95**100), abs=1e-6
    )
    assert run(plain_bf16(0.05), students).params["w"].item() == 1.0
    assert run(ema(update_rate=0.05, dtype="bfloat16"), students).params["w"].item() == 1.0078125


def stays_within_the_bound(teacher: Teacher, rate: float) -> None:
    """Azuma-Hoeffding for every element, at δ = 1e-12 each."""
    students = [{"w": torch.full((5000,), 0.5 + 4e-4 * step)} for step in range(301)]
    stray = run(teacher, students).params["w"].double() - closed_form(students, rate)["w"]
    spacing = 2.0**-8
    bound = spacing * math.sqrt(math.log(2 / 1e-12) / (2 * rate * (2 - rate)))
    assert stray.abs().max() < bound
    # Unbiased: the mean of independent elements gets closer as their number grows, the counter-example's does not.
    assert stray.mean().abs() < bound / math.sqrt(stray.numel())


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_stochastic_rounding_stays_within_the_stated_bound(rate: float) -> None:
    stays_within_the_bound(ema(update_rate=rate, dtype="bfloat16"), rate)
    stays_within_the_bound(ema(update_rate=rate, dtype="bfloat16", seed=9, inplace=True), rate)
    stays_within_the_bound(ema(update_rate=rate), rate)
    assert rejects(stays_within_the_bound, plain_bf16(rate), rate)


def rounds_to_a_neighbour_with_the_value_as_mean(value: float, draw: Callable[[int], Tensor]) -> None:
    draws = torch.stack([draw(seed) for seed in range(8)]).double().flatten()
    low = math.floor(value * 256) / 256
    assert set(draws.tolist()) <= {low, low + 1 / 256}
    sigma = 1 / 256 / 2 / math.sqrt(draws.numel())
    assert abs(float(draws.mean()) - value) < 6 * sigma


@given(st.floats(0.5, 0.9375, width=32), st.sampled_from([1.0, -1.0]))
def test_rounding_is_unbiased_on_both_sides_of_zero(value: float, sign: float) -> None:
    def draw(seed: int) -> Tensor:
        teacher = ema(update_rate=1.0, dtype="bfloat16", seed=seed)
        state = teacher.init({"w": torch.zeros(2000)})
        return sign * teacher.update(state, {"w": torch.full((2000,), sign * value)}).params["w"]

    rounds_to_a_neighbour_with_the_value_as_mean(value, draw)


def test_unbiasedness_rejects_other_roundings() -> None:
    value = 0.5 + 0.3 / 256
    full = torch.full((2000,), value)
    for counter_example in (lambda seed: full.bfloat16(), lambda seed: full.bfloat16() + 1 / 256):
        assert rejects(rounds_to_a_neighbour_with_the_value_as_mean, value, counter_example)


def test_rounding_depends_on_seed_tick_and_name_and_on_nothing_else() -> None:
    student = {"a": torch.full((500,), 0.7001), "b": torch.full((500,), 0.7001)}

    def rounded(seed: int, ticks: int) -> Params:
        zeros = {name: torch.zeros(500, dtype=torch.bfloat16) for name in student}
        return (
            ema(update_rate=1.0, dtype="bfloat16", seed=seed)
            .update(TeacherState(zeros, ticks), student)
            .params
        )

    torch.manual_seed(0)
    generator_state = torch.get_rng_state()
    base = rounded(0, 0)
    assert torch.equal(torch.get_rng_state(), generator_state)
    torch.manual_seed(1)
    assert equal(rounded(0, 0), base)
    assert not torch.equal(base["a"], base["b"])
    assert not torch.equal(rounded(1, 0)["a"], base["a"])
    assert not torch.equal(rounded(0, 1)["a"], base["a"])


def test_non_finite_values_survive_rounding() -> None:
    # A NaN with every bit of its payload set is the one that a carry turns into −0.
    full_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    value = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), full_nan.expand(20)])
    teacher = ema(update_rate=0.25, dtype="bfloat16")
    kept = teacher.update(teacher.init({"w": torch.zeros(23)}), {"w": value}).params["w"]
    torch.testing.assert_close(kept.float(), value, equal_nan=True)


# Purity ------------------------------------------------------------------------------------------------------


def leaves_its_inputs_alone(teacher: Teacher, students: list[Params]) -> None:
    student = copy.deepcopy(students[0])
    state = teacher.init(student)
    start = copy.deepcopy(state)
    for param in student.values():
        param.add_(1)  # an optimizer step after init
    assert equal(state.params, start.params)
    before = copy.deepcopy(students[1])
    after = teacher.update(state, students[1])
    assert equal(state.params, start.params)
    assert state.ticks == 0
    assert after.ticks == 1
    assert equal(students[1], before)


@given(SEEDS, st.sampled_from(DTYPES), RATES)
def test_update_and_init_leave_their_inputs_alone(seed: int, dtype: torch.dtype, rate: float) -> None:
    for teacher in (ema(update_rate=rate), ema(update_rate=rate, dtype="bfloat16"), frozen(), live()):
        leaves_its_inputs_alone(teacher, students_of(seed, 1, dtype))


@pytest.mark.parametrize("counter_example", [aliasing, overwriting])
def test_purity_rejects(counter_example: Callable[[float], Teacher]) -> None:
    assert rejects(leaves_its_inputs_alone, counter_example(0.05), students_of(0, 1, torch.float32))


def reuses_the_memory_of_the_state(spent: Teacher, fresh: Teacher, students: list[Params]) -> None:
    state = spent.init(students[0])
    addresses = {name: tensor.data_ptr() for name, tensor in state.params.items()}
    for student in students[1:]:
        state = spent.update(state, student)
    assert {name: tensor.data_ptr() for name, tensor in state.params.items()} == addresses
    assert equal(state.params, run(fresh, students).params)
    assert addresses["embed"] not in {p["embed"].data_ptr() for p in students}


@given(SEEDS, st.sampled_from(DTYPES), RATES, st.sampled_from(["float32", "bfloat16"]))
def test_inplace_gives_the_same_bits_in_the_memory_of_the_state(
    seed: int, dtype: torch.dtype, rate: float, kept: Any
) -> None:
    fresh, spent = (ema(update_rate=rate, dtype=kept, inplace=inplace) for inplace in (False, True))
    reuses_the_memory_of_the_state(spent, fresh, students_of(seed, 3, dtype))


def test_inplace_rejects() -> None:
    students, fresh = students_of(0, 3, torch.float32), ema(update_rate=0.05)
    for counter_example in (fresh, overwriting(0.06), aliasing(0.05)):
        assert rejects(reuses_the_memory_of_the_state, counter_example, fresh, students)


def peak(action: Callable[[], Any], trace: Path) -> int:
    """Bytes that an action allocates on the CPU at once, above those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        action()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    found = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    if not found:
        return 0
    before = found[0][1]["Total Allocated"] - found[0][1]["Bytes"]
    return max(arguments["Total Allocated"] for _, arguments in found) - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kept", "sizes", "units"), [("float32", [1] * 6, 1), ("float32", [3], 3), ("bfloat16", [5], 4)]
)
def test_an_update_in_place_allocates_no_more_than_it_says(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: torch.dtype,
    kept: Any,
    sizes: list[int],
    units: int,
) -> None:
    """In units of the numbers that are averaged at once, in float32."""
    together = 2**16
    monkeypatch.setattr(sdpo.teacher, "_TOGETHER", together)
    params = {str(i): torch.randn(size * together, dtype=dtype) for i, size in enumerate(sizes)}

    def allocated(inplace: bool) -> float:
        teacher = ema(update_rate=0.1, dtype=kept, inplace=inplace)
        state = teacher.init(params)
        return peak(lambda: teacher.update(state, params), tmp_path / "trace.json") / (4 * together)

    assert allocated(inplace=True) <= 1.01 * units
    if len(sizes) > 1:
        assert allocated(inplace=False) > 2 * units


def test_a_refused_update_in_place_changes_nothing() -> None:
    teacher = ema(update_rate=0.5, inplace=True)
    state = teacher.init({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="missing 'b'"):
        teacher.update(state, {"a": torch.ones(2)})
    assert equal(state.params, {"a": torch.zeros(2), "b": torch.zeros(2)})


def continues_after(save_and_load: Callable[[TeacherState], TeacherState], teacher: Teacher) -> None:
    students = students_of(3, 6, torch.bfloat16)
    state = save_and_load(run(teacher, students[:4]))
    for student in students[4:]:
        state = teacher.update(state, student)
    whole = run(teacher, students)
    assert state.ticks == whole.ticks
    assert equal(state.params, whole.params)


def through_a_file(state: TeacherState) -> TeacherState:
    file = io.BytesIO()
    torch.save(state._asdict(), file)
    file.seek(0)
    return TeacherState(**torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    "teacher",
    [ema(update_rate=0.3), ema(update_rate=0.3, dtype="bfloat16"), frozen(), live()],
)
def test_save_then_load_is_the_identity(teacher: Teacher) -> None:
    state = run(teacher, students_of(3, 4, torch.bfloat16))
    loaded = through_a_file(state)
    assert loaded.ticks == state.ticks
    assert equal(loaded.params, state.params)
    continues_after(through_a_file, teacher)


def test_continuation_rejects_checkpoints_that_forget() -> None:
    def without_ticks(state: TeacherState) -> TeacherState:
        return through_a_file(state)._replace(ticks=0)

    def in_half(state: TeacherState) -> TeacherState:
        return state._replace(params={n: p.bfloat16().float() for n, p in state.params.items()})

    for counter_example in (without_ticks, in_half):
        assert rejects(continues_after, counter_example, ema(update_rate=0.3))
    assert rejects(continues_after, without_ticks, ema(update_rate=0.3, dtype="bfloat16"))


# torch.func, modules, sharded tensors ------------------------------------------------------------------------


def test_update_works_under_vmap() -> None:
    teacher = ema(update_rate=0.3)
    first, second = (students_of(5, 1, torch.float32, {"w": (6, 4), "b": (6,)})[step] for step in range(2))

    def tick(old: Params, new: Params) -> Params:
        return teacher.update(TeacherState(old, 0), new).params

    stacked = torch.func.vmap(tick)(first, second)
    for member in range(6):
        alone = tick({n: t[member] for n, t in first.items()}, {n: t[member] for n, t in second.items()})
        assert equal({name: tensor[member] for name, tensor in stacked.items()}, alone)


def test_no_gradient_reaches_the_student_through_its_teacher() -> None:
    def loss(weight: Tensor, teacher_of: Callable[[Params], Params]) -> Tensor:
        return (weight * teacher_of({"w": weight})["w"]).sum()

    def state(student: Params) -> Params:
        teacher = ema(update_rate=0.5)
        return teacher.update(teacher.init(student), student).params

    weight = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.func.grad(loss)(weight, state), weight)
    assert torch.equal(torch.func.grad(loss)(weight, lambda student: student), 2 * weight)
    kept = ema(update_rate=0.5).init({"w": torch.nn.Parameter(weight)}).params["w"]
    assert not kept.requires_grad
    assert type(kept) is Tensor


def test_a_module_runs_as_its_own_teacher() -> None:
    model = torch.nn.Linear(3, 2)
    teacher = ema(update_rate=0.5)
    state = teacher.init(dict(model.named_parameters()))
    start = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    state = teacher.update(state, dict(model.named_parameters()))
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    shown = torch.func.functional_call(model, state.params, (inputs,))
    torch.testing.assert_close(shown, 0.5 * (start(inputs) + model(inputs)))
    assert not torch.equal(shown, model(inputs))


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not distributed.is_gloo_available() or distributed.is_initialized():
        pytest.skip("needs a fresh gloo process group")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield tensor.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_parameters_keep_their_sharding(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    plain = students_of(2, 3, torch.bfloat16, {"w": (6, 4)})
    shards = [{"w": distribute_tensor(student["w"], mesh, [Shard(0)])} for student in plain]
    for options in ({}, {"inplace": True}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "inplace": True}):
        teacher = ema(update_rate=0.3, **options)
        sharded, whole = run(teacher, shards), run(teacher, plain)
        assert isinstance(sharded.params["w"], DTensor)
        assert torch.equal(sharded.params["w"].full_tensor(), whole.params["w"])
        torch.testing.assert_close(
            teacher_distance(sharded, shards[-1]).full_tensor(), teacher_distance(whole, plain[-1])
        )


# Distance ----------------------------------------------------------------------------------------------------


def naive_distance(state: TeacherState, params: Params) -> float:
    gap = [
        (float(a) - float(b))
        for n in params
        for a, b in zip(state.params[n].flatten(), params[n].flatten(), strict=True)
    ]
    size = [float(b) for n in params for b in params[n].flatten()]
    return math.hypot(*gap) / math.hypot(*size)


@given(SEEDS, st.sampled_from(DTYPES), RATES)
def test_distance_is_the_ratio_of_the_two_norms(seed: int, dtype: torch.dtype, rate: float) -> None:
    students = students_of(seed, 2, dtype)
    state = run(ema(update_rate=rate), students)
    distance = teacher_distance(state, students[-1])
    assert distance.shape == ()
    assert float(distance) == pytest.approx(naive_distance(state, students[-1]), rel=1e-5, abs=1e-7)
    assert float(teacher_distance(run(live(), students), students[-1])) == 0.0


def test_the_naive_distance_rejects_other_ratios() -> None:
    student = {"large": torch.full((9,), 10.0), "small": torch.full((4,), 0.1, dtype=torch.float64)}
    state = TeacherState({"large": torch.full((9,), 11.0), "small": torch.full((4,), 0.3).double()}, 1)
    expected = pytest.approx(naive_distance(state, student), rel=1e-6)
    assert float(teacher_distance(state, student)) == expected
    gaps = {name: (state.params[name].double() - param.double()) for name, param in student.items()}
    mean_of_ratios = sum(gaps[name].norm() / param.double().norm() for name, param in student.items()) / 2
    sum_of_norms = sum(g.norm() for g in gaps.values()) / sum(p.double().norm() for p in student.values())
    assert float(mean_of_ratios) != expected
    assert float(sum_of_norms) != expected


def test_distance_of_zero_weights_is_finite_or_large_but_never_nan() -> None:
    zero = {"w": torch.zeros(3)}
    assert float(teacher_distance(frozen().init(zero), zero)) == 0.0
    assert float(teacher_distance(frozen().init({"w": torch.ones(3)}), zero)) > 1e30


# Trust region ------------------------------------------------------------------------------------------------


def is_the_geometric_mixture(
    mix: Callable[..., Tensor], reference: Tensor, live_: Tensor, coef: float
) -> None:
    """q ∝ q_ref^(1−c)·q_θ^c over the vocabulary, token by token in float64; 0^0 = 1 at the ends."""
    q_ref, q_live = (logits.double().softmax(-1) for logits in (reference, live_))
    weights = q_ref ** (1 - coef) * q_live**coef
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(
        mix(reference, live_, coef=coef).double().softmax(-1), expected, rtol=1e-4, atol=1e-6
    )


COEFS = st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0.0, 1.0)


@given(SEEDS, COEFS, st.sampled_from(DTYPES), st.booleans())
def test_trust_region_logits_are_the_geometric_mixture(
    seed: int, coef: float, dtype: torch.dtype, masked: bool
) -> None:
    reference, live_ = (3 * p["z"] for p in students_of(seed, 1, dtype, {"z": (4, 6)}))
    if masked:
        reference[:, 0], live_[:, 0], live_[:, 1] = -math.inf, -math.inf, -math.inf
    mixed = trust_region_logits(reference, live_, coef=coef)
    assert mixed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not mixed.isnan().any()
    is_the_geometric_mixture(trust_region_logits, reference, live_, coef)


def test_the_ends_of_the_trust_region_are_exact_even_where_the_other_side_is_impossible() -> None:
    reference, live_ = torch.tensor([-math.inf, 1.0, 2.0]), torch.tensor([1.0, -math.inf, 0.1])
    assert torch.equal(trust_region_logits(reference, live_, coef=0), reference)
    assert torch.equal(trust_region_logits(reference, live_, coef=1), live_)
    middle = trust_region_logits(reference, live_, coef=0.5)
    torch.testing.assert_close(middle, torch.tensor([-math.inf, -math.inf, 1.05]))


def test_the_geometric_mixture_rejects() -> None:
    reference, live_ = (p["z"] for p in students_of(0, 1, torch.float32, {"z": (4, 6)}))

    def arithmetic(reference: Tensor, live_: Tensor, *, coef: float) -> Tensor:
        return torch.lerp(reference.softmax(-1), live_.softmax(-1), coef).log()

    def exchanged(reference: Tensor, live_: Tensor, *, coef: float) -> Tensor:
        return torch.lerp(live_, reference, coef)

    for counter_example in (arithmetic, exchanged):
        assert rejects(is_the_geometric_mixture, counter_example, reference, live_, 0.2)
    reference[:, 0], live_[:, 0] = -math.inf, -math.inf
    is_the_geometric_mixture(trust_region_logits, reference, live_, 0.2)
    assert torch.lerp(reference, live_, 0.2).isnan().any(), "why it is not torch.lerp"


@given(SEEDS, COEFS)
def test_mixing_hidden_states_equals_mixing_logits_of_a_shared_linear_head(seed: int, coef: float) -> None:
    hidden = students_of(seed, 1, torch.float64, {"h": (5, 8)})
    head = torch.nn.Linear(8, 11, dtype=torch.float64)
    left = head(trust_region_hidden(hidden[0]["h"], hidden[1]["h"], coef=coef))
    right = trust_region_logits(head(hidden[0]["h"]), head(hidden[1]["h"]), coef=coef)
    torch.testing.assert_close(left, right)
    assert trust_region_hidden(hidden[0]["h"].bfloat16(), hidden[1]["h"], coef=coef).dtype == torch.bfloat16


def test_mixing_hidden_states_is_wrong_under_soft_capping() -> None:
    hidden = students_of(0, 1, torch.float64, {"h": (5, 8)})
    weight = students_of(1, 0, torch.float64, {"w": (11, 8)})[0]["w"]

    def capped(h: Tensor) -> Tensor:
        return torch.tanh(h @ weight.T)

    left = capped(trust_region_hidden(hidden[0]["h"], hidden[1]["h"], coef=0.5))
    right = trust_region_logits(capped(hidden[0]["h"]), capped(hidden[1]["h"]), coef=0.5)
    assert (left - right).abs().max() > 0.01


@pytest.mark.parametrize("coef", [0.0, 0.3, 1.0])
def test_the_trust_region_carries_no_gradient(coef: float) -> None:
    reference, live_ = (torch.zeros(3, requires_grad=True) for _ in range(2))
    assert not trust_region_logits(reference, live_, coef=coef).requires_grad
    assert not trust_region_hidden(reference, live_, coef=coef).requires_grad


# Refusals ----------------------------------------------------------------------------------------------------


def quantized() -> Tensor:
    packed = torch.zeros(8, dtype=torch.bfloat16)
    packed.quant_state = object()  # type: ignore[attr-defined]
    return packed


@pytest.mark.parametrize("teacher", [ema(update_rate=0.1), frozen()])
def test_what_cannot_be_averaged_is_refused_by_name(teacher: Teacher) -> None:
    params = {"lora": torch.zeros(2), "base": torch.zeros(2, dtype=torch.uint8), "packed": quantized()}
    with pytest.raises(
        TypeError, match=r"'base' \(torch.uint8\), 'packed' \(torch.bfloat16\); pass only"
    ) as caught:
        teacher.init(params)
    assert "lora" not in str(caught.value)
    with pytest.raises(ValueError, match=r"at least one parameter, got none; .* adapter"):
        teacher.init({})
    with pytest.raises(TypeError, match=r"got generator; pass dict\(model.named_parameters\(\)\)"):
        teacher.init(torch.nn.Linear(1, 1).named_parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("teacher", [ema(update_rate=0.1), frozen()])
def test_differences_are_refused_by_name_and_all_listed(teacher: Teacher) -> None:
    state = teacher.init({"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(2)})
    student = {
        "a": torch.zeros(2),
        "c": torch.zeros(3),
        "d": torch.zeros(2, 1),
        "e": torch.zeros(2),
        "f": torch.zeros(1),
    }
    for call in (teacher.update, teacher_distance):
        with pytest.raises(
            ValueError, match="params: expected the parameters of the teacher's state"
        ) as caught:
            call(state, student)
        for part in (
            "missing 'b'",
            "unexpected 'e'",
            "unexpected 'f'",
            "'c' has shape (3,), not (2,)",
            "'d' has",
        ):
            assert part in str(caught.value)
        assert "'a'" not in str(caught.value)


@pytest.mark.parametrize("call", [ema(update_rate=0.1).update, frozen().update, teacher_distance])
def test_what_is_no_state_is_refused(call: Callable[..., Any]) -> None:
    student = {"w": torch.zeros(2)}
    for wrong, name in ((None, "NoneType"), (student, "dict"), ((student, 0), "tuple")):
        with pytest.raises(TypeError, match=rf"state: expected a TeacherState, got {name}; pass what init"):
            call(wrong, student)


def test_a_state_of_another_precision_is_refused_by_name() -> None:
    student = {"w": torch.zeros(2)}
    coarse = ema(update_rate=0.1, dtype="bfloat16").init(student)
    with pytest.raises(ValueError, match=r"the state of 'w' is torch.bfloat16, not torch.float32"):
        ema(update_rate=0.1).update(coarse, student)
    fine = ema(update_rate=0.1).init(student)
    with pytest.raises(ValueError, match=r"the state of 'w' is torch.float32, not torch.bfloat16"):
        ema(update_rate=0.1, dtype="bfloat16").update(fine, student)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ema(update_rate=1.5), ValueError, "update_rate: expected a number in .*1.5"),
        (lambda: ema(update_rate=math.nan), ValueError, "update_rate"),
        (lambda: ema(update_rate="0.1"), TypeError, "update_rate: expected a number"),  # type: ignore[arg-type]
        (lambda: ema(update_rate=0.1, dtype="float16"), ValueError, "dtype: .*float16"),  # type: ignore[arg-type]
        (lambda: ema(update_rate=0.1, seed=-1), ValueError, "seed"),
        (lambda: ema(update_rate=0.1, inplace=1), TypeError, "inplace: expected a bool"),  # type: ignore[arg-type]
        (lambda: rate_per_tick(1.1, samples=1, per_samples=1), ValueError, "update_rate: expected a number"),
        (
            lambda: rate_per_tick(0.1, samples=0, per_samples=1),
            ValueError,
            r"samples: expected .*\(0, .*got 0",
        ),
        (lambda: rate_per_tick(0.1, samples=1, per_samples=math.inf), ValueError, "per_samples: .*got inf"),
        (
            lambda: trust_region_logits(torch.zeros(2), torch.zeros(2), coef=-0.1),
            ValueError,
            "coef: expected a number in .*-0.1",
        ),
        (lambda: trust_region_logits(torch.zeros(2), torch.zeros(3), coef=0.1), ValueError, "live_logits"),
        (
            lambda: trust_region_logits(torch.zeros(2), torch.ones(2).long(), coef=0.1),
            TypeError,
            "live_logits",
        ),
        (lambda: trust_region_hidden(torch.zeros(2), torch.zeros(2), coef=2), ValueError, "coef"),
    ],
)
def test_bad_options_are_refused_by_name(make: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_torch_load_reads_a_state_with_its_defaults(tmp_path: Path) -> None:
    teacher = ema(update_rate=0.5)
    state = teacher.update(teacher.init({"w": torch.zeros(2)}), {"w": torch.ones(2)})
    torch.save(state, tmp_path / "teacher.pt")
    loaded = torch.load(tmp_path / "teacher.pt")
    assert isinstance(loaded, TeacherState)
    assert (loaded.params["w"].tolist(), loaded.ticks) == ([0.5, 0.5], 1)


def test_tied_weights_named_in_two_ways_are_explained() -> None:
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)}
    )
    model["b"].weight = model["a"].weight
    teacher = ema(update_rate=0.5)
    state = teacher.init(model.state_dict())
    with pytest.raises(
        ValueError, match=r"missing 'b.weight'.*named_parameters\(\)\) names tied weights once"
    ):
        teacher.update(state, dict(model.named_parameters()))
    assert (
        teacher.update(teacher.init(dict(model.named_parameters())), dict(model.named_parameters())).ticks
        == 1
    )

"""Padding: every token is found again in its row, and only padding is removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of
from torch import Tensor

from sdpo_rl.step.batch import compact, completion_loss_mask, left_pad, position_ids, select_rows

PAD = 0
CPU = torch.device("cpu")
id_rows = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5)  # PAD may be a token like any other


def property_rows_come_back(pad: Any, rows: list[list[int]]) -> None:
    ids, mask = pad(rows, pad_id=PAD, device=CPU)
    width = max(map(len, rows), default=0)
    assert ids.shape == mask.shape == (len(rows), width)
    assert ids.dtype == mask.dtype == torch.long
    assert [i[m.bool()].tolist() for i, m in zip(ids, mask, strict=True)] == rows
    assert all((m[1:] >= m[:-1]).all() for m in mask)
    assert (ids[mask == 0] == PAD).all()


def right_pad(rows: list[list[int]], *, pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([row[::-1] for row in rows], pad_id=pad_id, device=device)
    return ids.flip(-1), mask.flip(-1)


def property_positions_count_tokens(positions: Any, rows: list[list[int]], columns: int) -> None:
    """A row's tokens have positions 0, 1, 2, … whatever the padding."""
    _, mask = left_pad(rows, pad_id=PAD, device=CPU)
    mask = torch.cat([torch.zeros(len(mask), columns, dtype=torch.long), mask], dim=1)
    got = positions(mask)
    assert [p[m.bool()].tolist() for p, m in zip(got, mask, strict=True)] == [
        list(range(len(r))) for r in rows
    ]
    assert (got >= 0).all()


def batch(rows: list[tuple[list[int], list[int]]], left: int, right: int) -> tuple[Tensor, ...]:
    """Prompts and completions with extra columns of padding, as in a slice of a larger batch."""
    prompt, prompt_mask = left_pad([p for p, _ in rows], pad_id=PAD, device=CPU)
    completion, completion_mask = right_pad([c for _, c in rows], pad_id=PAD, device=CPU)
    wider = torch.nn.functional.pad
    return (
        wider(prompt, (left, 0)),
        wider(prompt_mask, (left, 0)),
        wider(completion, (0, right)),
        wider(completion_mask, (0, right)),
    )


def property_compact_keeps_the_tokens(squeeze: Any, rows: Any, left: int, right: int) -> None:
    sizes = [(len(prompt), len(completion)) for prompt, completion in rows]
    ids, mask, kept, *_ = squeeze(*batch(rows, left, right), sizes)
    longest = [max(max(len(row[i]) for row in rows), 1) for i in (0, 1)]
    length = longest[1]
    assert kept == sizes
    assert ids.shape == mask.shape == (len(rows), sum(longest))
    for row_ids, row_mask, (prompt, completion) in zip(ids, mask, rows, strict=True):
        assert row_ids[row_mask.bool()].tolist() == [*prompt, *completion]
        assert row_ids[-length:][row_mask[-length:].bool()].tolist() == completion


def keeps_the_head(
    prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor, sizes: Any
) -> Any:
    """Cuts the prompt from the wrong side."""
    width = max(int(prompt_mask.sum(-1).max()), 1)
    length = max(int(completion_mask.sum(-1).max()), 1)
    return (
        torch.cat([prompt[:, :width], completion[:, :length]], 1),
        torch.cat([prompt_mask[:, :width], completion_mask[:, :length]], 1),
        sizes,
    )


def rows_of_a_batch(
    prompts: list[list[int]],
    teachers: list[list[int]],
    completions: list[list[int]],
    masks: dict[str, list[bool]],
) -> dict[str, Any]:
    """A micro-batch, with the rows in which each mask has the completion's tokens."""
    prompt, prompt_mask, completion, completion_mask = batch(
        list(zip(prompts, completions, strict=True)), 1, 2
    )
    teacher, teacher_mask = left_pad(teachers, pad_id=PAD, device=CPU)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "teacher_prompt_ids": teacher,
        "teacher_prompt_mask": teacher_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        **{name: completion_loss_mask(completion_mask, torch.tensor(rows)) for name, rows in masks.items()},
    }


def property_rows_with_a_loss_run(
    select: Any, rows: list[tuple[list[int], list[int], list[int], bool]], at_least_one: bool
) -> None:
    """Rows are (prompt, teacher's prompt, completion, whether it has a loss)."""
    prompts, teachers, completed, signal = map(list, zip(*rows, strict=True))
    inputs = rows_of_a_batch(prompts, teachers, completed, {"loss_mask": signal}) | {
        "importance_sampling_ratio": torch.arange(len(rows))[:, None],
        "old_per_token_logps": None,
        "max_left_pad": torch.zeros((), device="meta"),
    }
    selected = select(inputs, at_least_one=at_least_one)
    active = [index for index, row in enumerate(rows) if row[-1]]
    if not active and not at_least_one:
        assert selected is None
        return
    if not active:
        active, rows = [0], [(rows[0][0], *rows[0][:1], *rows[0][2:])]
    for tokens, part in ((selected.student, 0), (selected.teacher, 1)):
        expected = [[*rows[i][part], *rows[i][2]] for i in active]
        assert [row[m.bool()].tolist() for row, m in zip(tokens.ids, tokens.mask, strict=True)] == expected
        assert tokens.completion_length == max(len(rows[i][2]) for i in active)
    completions = selected.completions
    assert completions.keys() == {"completion_ids", "loss_mask", "importance_sampling_ratio"}
    assert completions["importance_sampling_ratio"].flatten().tolist() == active
    assert completions["loss_mask"].sum(-1).tolist() == [len(rows[i][2]) * rows[i][3] for i in active]


@pytest.mark.parametrize("signal", [[True, True, False], [False, False, False]])
def test_prompts_are_read_with_the_sizes(signal: list[bool]) -> None:
    prompts, teachers = [[5, 6, 7], [8], [9, 5]], [[6], [7, 8, 9, 5], [5, 5]]
    inputs = rows_of_a_batch(prompts, teachers, [[5, 6]] * 3, {"loss_mask": signal})
    found = select_rows(inputs, at_least_one=True, read_prompts=True)
    assert found is not None
    assert found.teacher is not None
    # Without a signal the first row runs, with its own prompt as the teacher's.
    assert found.student.prompts == (prompts[:2] if any(signal) else prompts[:1])
    assert found.teacher.prompts == (teachers[:2] if any(signal) else prompts[:1])
    plain = select_rows(inputs, at_least_one=True)
    assert plain is not None
    assert plain.student.prompts is None
    assert plain.student.sizes == found.student.sizes


@pytest.mark.parametrize("size", [(3, 2), (20, 2), (3, 20), (20, 20)])
def test_few_tokens_of_a_row_without_a_loss_run(size: tuple[int, int]) -> None:
    """The row may be longer than the model can process."""
    prompt, completion = list(range(5, 5 + size[0])), list(range(50, 50 + size[1]))
    inputs = rows_of_a_batch([prompt, [8]], [[6], [7]], [completion, [8]], {"loss_mask": [False, False]})
    found = select_rows(inputs, at_least_one=True, read_prompts=True)
    assert found is not None
    assert found.teacher is not None
    for tokens in (found.student, found.teacher):
        assert tokens.sizes == [(min(size[0], 8), min(size[1], 8))]
        assert tokens.prompts == [prompt[-8:]]
        assert unpadded(tokens) == [[*prompt[-8:], *completion[:8]]]
    assert found.completions["loss_mask"].tolist() == [[False] * min(size[1], 8)]


def property_a_policy_loss_needs_no_teacher(
    select: Any, rows: list[tuple[list[int], list[int], list[int], bool, bool]], at_least_one: bool
) -> None:
    """Rows are (prompt, teacher's prompt, completion, whether it has a divergence, and a policy loss)."""
    prompts, teachers, completed, distilled_rows, policy_rows = map(list, zip(*rows, strict=True))
    masks = {"loss_mask": distilled_rows, "policy_mask": policy_rows}
    inputs = rows_of_a_batch(prompts, teachers, completed, masks)
    selected = select(inputs, at_least_one=at_least_one)
    active = [i for i, row in enumerate(rows) if row[3] or row[4]] or [0] * at_least_one
    distilled = [i for i, row in enumerate(rows) if row[3]]
    contexts = [rows[i][1] for i in distilled]
    if at_least_one and not distilled:
        distilled, contexts = active[:1], [rows[active[0]][0]]
    if not active:
        assert selected is None
        return
    assert unpadded(selected.student) == [[*rows[i][0], *rows[i][2]] for i in active]
    assert selected.completions["policy_mask"].any(-1).tolist() == [rows[i][4] for i in active]
    if not distilled:
        assert selected.teacher is None
        return
    texts = [[*context, *rows[i][2]] for context, i in zip(contexts, distilled, strict=True)]
    assert unpadded(selected.teacher) == texts
    places = range(len(active)) if selected.teacher_rows is None else selected.teacher_rows.tolist()
    assert [active[place] for place in places] == distilled


def unpadded(tokens: Any) -> list[list[int]]:
    return [row[m.bool()].tolist() for row, m in zip(tokens.ids, tokens.mask, strict=True)]


def a_teacher_for_every_row(inputs: Any, *, at_least_one: bool) -> Any:
    return select_rows(
        {**inputs, "loss_mask": inputs["loss_mask"] | inputs["policy_mask"]}, at_least_one=at_least_one
    )


def weights_of_other_rows(inputs: Any, *, at_least_one: bool) -> Any:
    ratio = "importance_sampling_ratio"
    return select_rows({**inputs, ratio: inputs[ratio].roll(1, 0)}, at_least_one=at_least_one)


def every_row(inputs: Any, *, at_least_one: bool) -> Any:
    return select_rows({**inputs, "loss_mask": inputs["completion_mask"].bool()}, at_least_one=at_least_one)


tokens = st.lists(st.integers(1, 9), min_size=1, max_size=4)
SELECTION = {
    "rows": st.lists(st.tuples(tokens, tokens, tokens, st.booleans()), min_size=1, max_size=4),
    "at_least_one": st.booleans(),
}

CLAIMS = [
    Claim(property_rows_with_a_loss_run, select_rows, weights_of_other_rows, SELECTION),
    Claim(property_rows_with_a_loss_run, select_rows, every_row, SELECTION),
    Claim(
        property_a_policy_loss_needs_no_teacher,
        select_rows,
        a_teacher_for_every_row,
        {
            "rows": st.lists(
                st.tuples(tokens, tokens, tokens, st.booleans(), st.booleans()), min_size=1, max_size=4
            ),
            "at_least_one": st.booleans(),
        },
    ),
    Claim(property_rows_come_back, left_pad, right_pad, {"rows": id_rows}),
    Claim(
        property_positions_count_tokens,
        position_ids,
        lambda mask: torch.arange(mask.shape[1]).expand(mask.shape),
        {"rows": id_rows, "columns": st.integers(0, 3)},
    ),
    Claim(
        property_compact_keeps_the_tokens,
        compact,
        keeps_the_head,
        {
            "rows": st.lists(
                st.tuples(st.lists(st.integers(1, 9), max_size=5), st.lists(st.integers(1, 9), max_size=5)),
                min_size=1,
                max_size=4,
            ),
            "left": st.integers(1, 3),
            "right": st.integers(1, 3),
        },
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()

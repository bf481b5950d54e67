"""Token sequences as padded batches: the loss mask, the rows that run, their columns and their groups.

Every row is ``[left padding | prompt | completion | right padding]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

Sizes = Sequence[tuple[int, int]]  # prompt and completion tokens of each row

# Inputs with a column for each completion token, or one for the whole completion.
_COMPLETION_INPUTS = (
    "completion_ids",
    "loss_mask",
    "row_weights",
    "rollout_row",
    "policy_mask",
    "policy_advantages",
    "policy_weights",
    "policy_kl_weights",
    "policy_entropy_weights",
    "ref_per_token_logps",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)

# Tokens of the prompt, and of the completion, of a row that runs only for other processes. So many are enough for
# the tests of the model at the first step.
_TOKENS_WITHOUT_LOSS = 8


class TokenBatch(NamedTuple):
    """Prompts, padded on the left, beside completions, padded on the right."""

    ids: Tensor  # [B, P+T] int64
    mask: Tensor  # [B, P+T] int64
    sizes: Sizes
    prompts: list[list[int]] | None = None  # ids of each row's prompt, if they are on the host

    @property
    def completion_length(self) -> int:
        """T, the number of completion columns."""
        return columns(self.sizes)[1]


class MicroBatch(NamedTuple):
    """The rows of a micro-batch that run, for both models, without columns that are padding in every row."""

    student: TokenBatch
    teacher: TokenBatch | None  # `None`: no row has a teacher
    teacher_rows: Tensor | None  # [B'] int64, rows of the student that the teacher has; `None`: all, in order
    completions: dict[str, Tensor]  # [B, T], by the names of the inputs
    has_loss: bool = True  # `False`: its row runs only for the collectives of other processes


class RowGroup(NamedTuple):
    """Rows that run together, and the columns that any of them attends."""

    rows: slice
    columns: slice
    right: int  # completion columns cut off on the right


def completion_loss_mask(
    completion_mask: Tensor, row_mask: Tensor, tool_mask: Tensor | None = None
) -> Tensor:
    """Tokens with a loss [B, T] bool: of the completion, not from a tool, in a row with a teacher signal.

    Args:
        completion_mask: [B, T], 0 for padding.
        row_mask: [B] bool, whether the row has a reprompt.
        tool_mask: [B, T], 0 for tokens from a tool; `None` without tools.

    Examples:
        >>> completion_loss_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([True, False])).tolist()
        [[True, True, False], [False, False, False]]
    """
    mask = completion_mask.bool() & row_mask[:, None]
    return mask if tool_mask is None else mask & tool_mask.bool()


def sampled_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Completion tokens [B, T] bool that the model sampled, in rows with a teacher signal and without."""
    mask: Tensor = inputs["completion_mask"].bool()
    tool_mask = inputs.get("tool_mask")
    return mask if tool_mask is None else mask & tool_mask.bool()


def teacher_inputs(
    output: Mapping[str, Any],
    prompt_ids: Sequence[Sequence[int]],
    row_mask: Sequence[bool],
    *,
    row_weights: Sequence[float] | None,
    pad_id: int,
) -> dict[str, Tensor]:
    """What a generation batch needs for its loss: the teacher's prompts, and which rows and tokens have a loss.

    Args:
        output: the generation batch, with `completion_mask` [B, T] and perhaps `tool_mask` [B, T].
        prompt_ids: tokens of each row's reprompt, B lists.
        row_mask: whether the row has a reprompt, B flags.
        row_weights: one per row; `None`: all weigh the same, and the batch gets none.
        pad_id: token id of the padding.
    """
    completion_mask = output["completion_mask"]
    ids, mask = left_pad(prompt_ids, pad_id=pad_id, device=completion_mask.device)
    rows = torch.tensor(row_mask, device=completion_mask.device)
    loss_mask = completion_loss_mask(completion_mask, rows, output.get("tool_mask"))
    inputs = {
        "teacher_prompt_ids": ids,
        "teacher_prompt_mask": mask,
        "row_mask": rows,
        "loss_mask": loss_mask,
    }
    if row_weights is not None:
        inputs["row_weights"] = torch.tensor(row_weights, device=ids.device)[:, None]
    return inputs


def left_pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P] of rows of different lengths, padded on the left.

    Examples:
        >>> ids, mask = left_pad([[5], [6, 7]], pad_id=0, device=torch.device("cpu"))
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    """
    width = max(map(len, rows), default=0)
    padding = torch.tensor([width - len(row) for row in rows], dtype=torch.long)
    mask = (torch.arange(width) >= padding[:, None]).long()
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    return ids.view(len(rows), width).to(device), mask.to(device)


def last_tokens(mask: Tensor, count: float | None) -> Tensor:
    """The mask of the last tokens of each row.

    Args:
        mask: [B, L], 0 for padding.
        count: tokens of a row at most; `None` or 0: all.

    Returns:
        [B, L], 0 for padding and for tokens with at least `count` tokens of their row after them.

    Examples:
        >>> last_tokens(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]]), 2).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    if not count:
        return mask
    following = mask.flip(-1).cumsum(-1).flip(-1)
    return mask * (following <= count)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] that count attended tokens only, so that left padding shifts none of them.

    Examples:
        >>> position_ids(torch.tensor([[0, 0, 1, 1]])).tolist()
        [[0, 0, 0, 1]]
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def columns(sizes: Sizes) -> tuple[int, int]:
    """Columns P and T for rows of these sizes; at least one of each.

    Examples:
        >>> columns([(3, 0), (2, 5)])
        (3, 5)
    """
    prompts, completions = zip(*sizes, strict=True)
    return max(1, *prompts), max(1, *completions)


def row_bounds(sizes: Sizes) -> list[tuple[int, int]]:
    """Prompt and completion columns of each row that run, at least one of each, as in `columns`."""
    return [(max(prompt, 1), max(completion, 1)) for prompt, completion in sizes]


def joined_ranges(bounds: Sequence[tuple[int, int]]) -> Tensor:
    """The numbers of several ranges one after another, int64, in as many operations as for one.

    Examples:
        >>> joined_ranges([(3, 5), (0, 3)]).tolist()
        [3, 4, 0, 1, 2]
    """
    total = sum(stop - start for start, stop in bounds)
    starts, stops = torch.tensor(bounds).T
    lengths = stops - starts
    shifts = stops - lengths.cumsum(0)
    return torch.arange(total) + shifts.repeat_interleave(lengths, output_size=total)


def compact(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    sizes: Sizes,
    prompts: list[list[int]] | None = None,
) -> TokenBatch:
    """Prompt and completion side by side, without the columns that are padding in every row.

    The prompt is left-padded and the completion right-padded, so what remains is a suffix of the prompt's columns
    and a prefix of the completion's.
    """
    prompt, completion = columns(sizes)
    ids = torch.cat([prompt_ids[:, -prompt:], completion_ids[:, :completion]], dim=1)
    mask = torch.cat([prompt_mask[:, -prompt:], completion_mask[:, :completion]], dim=1)
    return TokenBatch(ids, mask, sizes, prompts)


def token_batch(ids: Tensor, mask: Tensor, length: int) -> TokenBatch:
    """Rows [B, P+T] of prompts and of completions in the last `length` columns, as `compact` returns them."""
    before, after = mask[:, :-length], mask[:, -length:]
    counts = torch.stack([before.sum(-1), after.sum(-1)], dim=1).tolist()
    sizes = [(prompt, completion) for prompt, completion in counts]
    return compact(ids[:, :-length], before, ids[:, -length:], after, sizes)


def select_rows(
    inputs: Mapping[str, Any], *, at_least_one: bool, read_prompts: bool = False
) -> MicroBatch | None:
    """The rows of a micro-batch that have a loss, and those of them that have a teacher.

    Args:
        inputs: of the micro-batch, from `teacher_inputs` and TRL.
        at_least_one: whether a row must run, because other processes may have rows with a loss, and the collectives
            of their forwards need this one. A few tokens of the first row run where none has a loss. Where none has
            a teacher, the first that runs gets its own prompt as the teacher's.
        read_prompts: whether the batches have their prompts on the host.

    Returns:
        The rows; `None` if none has a loss and none must run.
    """
    names = ("loss_mask", "prompt_mask", "teacher_prompt_mask", "completion_mask")
    masks = [inputs[name] for name in names]
    masks.append(inputs.get("policy_mask", masks[0]))
    # The only read of a micro-batch from the device: each one waits for all the work that was queued.
    counts, prompts = _read(inputs, masks, read_prompts=read_prompts)
    distilled = [row for row, (tokens, *_) in enumerate(counts) if tokens]
    active = [row for row, (tokens, *_, policy_tokens) in enumerate(counts) if tokens or policy_tokens]
    has_loss = bool(active)
    if not has_loss:
        if not at_least_one:
            return None
        active = [0]
        # Its size does not matter, and the whole row may be longer than the model can process.
        counts[0] = [min(count, _TOKENS_WITHOUT_LOSS) for count in counts[0]]
        prompts = {prefix: [rows[0][-_TOKENS_WITHOUT_LOSS:], *rows[1:]] for prefix, rows in prompts.items()}
    if at_least_one and not distilled:
        distilled = active[:1]
        inputs = {
            **inputs,
            **{f"teacher_prompt_{part}": inputs[f"prompt_{part}"] for part in ("ids", "mask")},
        }
        counts = [[0, prompt, prompt, *others] for _, prompt, _, *others in counts]
        prompts = dict.fromkeys(prompts, prompts.get("", []))
    device = masks[0].device

    def take(name: str, index: Sequence[int]) -> Tensor:
        value: Tensor = inputs[name]
        return value if len(index) == len(counts) else value[torch.tensor(index, device=device)]

    def batch(prefix: str, column: int, index: Sequence[int]) -> TokenBatch:
        return compact(
            take(f"{prefix}prompt_ids", index),
            take(f"{prefix}prompt_mask", index),
            take("completion_ids", index),
            take("completion_mask", index),
            [(counts[row][column], counts[row][3]) for row in index],
            [prompts[prefix][row] for row in index] if read_prompts else None,
        )

    student = batch("", 1, active)
    teacher_rows = None
    if distilled != active:
        teacher_rows = torch.tensor([active.index(row) for row in distilled], device=device)
    length = student.completion_length
    present = [name for name in _COMPLETION_INPUTS if inputs.get(name) is not None]
    return MicroBatch(
        student,
        batch("teacher_", 2, distilled) if distilled else None,
        teacher_rows,
        {name: take(name, active)[:, :length] for name in present},
        has_loss,
    )


def _read(
    inputs: Mapping[str, Any], masks: Sequence[Tensor], *, read_prompts: bool
) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """The tokens of each row in each mask and, by the prefix of their name, its prompts, in one read."""
    counts = torch.stack([mask.sum(-1) for mask in masks], dim=1)
    prefixes = ("", "teacher_") if read_prompts else ()
    parts = [counts, *(inputs[f"{prefix}prompt_ids"] for prefix in prefixes)]
    values = torch.cat([part.flatten() for part in parts]).tolist()
    rows, tables = len(counts), []
    for part in parts:
        width = part.shape[1]
        tables.append([values[row * width : (row + 1) * width] for row in range(rows)])
        values = values[rows * width :]
    lengths = {"": 1, "teacher_": 2}  # columns of the counts
    prompts = {
        # Prompts are padded on the left.
        prefix: [
            ids[len(ids) - count[lengths[prefix]] :] for ids, count in zip(table, tables[0], strict=True)
        ]
        for prefix, table in zip(prefixes, tables[1:], strict=True)
    }
    return tables[0], prompts


def equal_groups(sizes: Sizes) -> list[RowGroup]:
    """Consecutive rows of a `compact` batch, in groups without padding before any row.

    Args:
        sizes: prompt and completion tokens of each row.

    Examples:
        >>> [group.rows for group in equal_groups([(2, 1), (2, 1), (1, 2)])]
        [slice(0, 2, None), slice(2, 3, None)]
    """
    prompt, length = columns(sizes)
    groups: list[RowGroup] = []
    start = 0
    for (before, after), rows in groupby(sizes):
        stop, right = start + len(list(rows)), length - max(after, 1)
        groups.append(RowGroup(slice(start, stop), slice(prompt - before, prompt + length - right), right))
        start = stop
    return groups


def row_groups(sizes: Sizes, *, width_limit: float, token_limit: float) -> list[RowGroup]:
    """Consecutive rows of a `compact` batch, in groups of similar size, each within both limits.

    One row with a long prompt and another with a long completion make a batch that is wider than either; a model
    with `max_seq_length` then truncates it silently. A forward without gradient also stores one layer's
    activations of all its tokens, and more tokens than fill the device save no time.

    Args:
        sizes: prompt and completion tokens of each row.
        width_limit: columns of a group, tokens.
        token_limit: rows times columns of a group, tokens. A single row may exceed both limits.

    Examples:
        >>> row_groups([(2, 1), (0, 2)], width_limit=3, token_limit=100)
        [RowGroup(rows=slice(0, 1, None), columns=slice(0, 3, None), right=1), \
RowGroup(rows=slice(1, 2, None), columns=slice(2, 4, None), right=0)]
    """
    count, (prompt, length) = len(sizes), columns(sizes)
    width = prompt + length
    if width <= width_limit and count * width <= token_limit:
        return [RowGroup(slice(0, count), slice(0, width), 0)]
    # At least one completion column remains, also in a row without a completion.
    bounds = [(prompt - before, prompt + max(after, 1)) for before, after in sizes]
    # Similar numbers of rows in each group: a last one of few rows would leave the device idle.
    tokens = sum(last - first for first, last in bounds)
    most = math.ceil(count / max(1, math.ceil(tokens / token_limit)))
    groups: list[RowGroup] = []
    start, (first, last) = 0, bounds[0]
    for row in range(1, count + 1):
        if row < count:
            low, high = min(first, bounds[row][0]), max(last, bounds[row][1])
            rows = row + 1 - start
            if rows <= most and high - low <= width_limit and rows * (high - low) <= token_limit:
                first, last = low, high
                continue
        groups.append(RowGroup(slice(start, row), slice(first, last), width - last))
        if row < count:
            start, (first, last) = row, bounds[row]
    return groups

"""What a model's own forward shows about the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import TokenBatch, left_pad, position_ids
from .forward import accepts, call_arguments, forward_arguments
from .modules import all_modules
from .packing import Layout, ModelCall, group, pack, pack_prefixes
from .prefixes import place_rows, shared_prefixes

# `reads_padding` runs this many tokens, beside this much padding on the left.
_TOKENS, _PADDING = 8, 4
_PREFIX = 5  # tokens that the rows of `autoregression_problem` have in common
# Some models mask entries of the logits with the smallest number of their dtype, or with -inf.
_MASKED = -6e4
# Differences below these, relative to the largest logit, are rounding: between rows of one shape, and between rows
# that are shifted. Multiples of the precision count where they are larger.
_SAME_SHAPE, _SHIFTED = (1e-4, 4), (1e-3, 8)
# Attention to all earlier tokens of a row, or to the nearest. Other layers may depend on a token's place in the
# packed sequence at distances that a short test does not reach.
_LAYERS = {"full_attention", "sliding_attention"}
_LENGTHS = (7, 9)  # tokens of the two rows of `supported_layout`
# Largest relative change of a row's hidden states when another row's tokens change: 0, but for rounding in layers
# whose products depend on how many tokens they get (experts). A row that attends another changes by far more.
_LEAK = 1e-5
_SHORT_WINDOW = 4  # of `row_attention_problem`, shorter than its rows
_WINDOW_SETTINGS = {"sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern"}
_ROPE_BY_LENGTH = {"dynamic", "longrope"}  # frequencies that change with the length of a sequence
# Largest mean relative difference between packed and separate rows, for which attention uses other kernels.
_DIFFERENCE = 5e-3


@torch.no_grad()
def autoregression_problem(model: Any, batch: TokenBatch) -> str:
    """Why a model's next-token losses are wrong even for rows that run without padding; "" if they are not.

    Two short rows with a common prefix run in one call, and again without positions. Later tokens must not change
    the logits of the prefix, and positions from 0 must give the logits of the model's own positions. Both rows are
    in one call, so that what depends on all of its tokens, such as products of experts, is the same for both.

    Every process makes the same calls of the model.

    Args:
        model: in evaluation mode, not wrapped for several processes.
        batch: any batch of the run; its tokens make up the rows.

    Returns:
        What was found and what to do: a clause that follows the model's name in an error message.
    """
    row = _test_rows(batch)[1]
    changed = [*row[:_PREFIX], *_other_tokens(row, batch)[_PREFIX:]]
    ids, mask = left_pad([row, changed], pad_id=0, device=batch.ids.device)
    arguments = forward_arguments(model, ids, mask, position_ids(mask), len(row))
    logits = with_own_positions = model(**arguments).logits
    if arguments.pop("position_ids", None) is not None:
        with_own_positions = model(**arguments).logits
    precision = max(torch.finfo(dtype).eps for dtype in _dtypes(model, logits))
    first, second = logits[:, -len(row) :][:, :_PREFIX].double()
    change = _relative_gap(second, first)
    if not (change <= _bound(_SAME_SHAPE, precision)).all():  # also if it is not a number
        decoder = getattr(model.config.get_text_config(), "is_decoder", None)
        fix = (
            "set is_decoder=True in its configuration"
            if decoder is False
            else "such a model cannot be trained by next-token losses"
        )
        return f"whose logits change by {change.max():.1e} with later tokens of a row; {fix}"
    # Without positions a model may run other kernels.
    difference = _relative_gap(with_own_positions.double(), logits.double())
    if (difference > _bound(_SHIFTED, precision)).float().mean() > 0.5:
        return (
            f"whose logits change by {difference.max():.1e} without position_ids: it does not number positions "
            "from 0; such a model is not supported"
        )
    return ""


@torch.no_grad()
def reads_padding(model: Any, unwrapped: Any, ids: Tensor) -> bool:
    """Whether the logits of a row depend on the padding beside it, which the attention mask hides.

    A recurrent layer without a mask carries padding into its state, positions that count padding shift the row, and
    a model may have another mask where there is padding. One forward of three short rows, of which two differ in
    the ids of their padding alone and the third has none on the left, and one without padding.

    Args:
        model: what runs, wrapped for several processes or not, in evaluation mode.
        unwrapped: the model inside `model`.
        ids: [n] int64, the tokens of a row without padding.

    Returns:
        Whether rows of different lengths must not run together.
    """
    row = ids[:_TOKENS]
    padded = [pad(row, (_PADDING, 0), value=token) for token in (0, 1)]
    attended = pad(torch.ones_like(row), (_PADDING, 0))
    mask = torch.stack([attended, attended, attended.roll(-_PADDING)])
    rows = torch.stack([*padded, padded[0].roll(-_PADDING)])

    def run(rows: Tensor, mask: Tensor) -> Tensor:
        arguments = forward_arguments(unwrapped, rows, mask, position_ids(mask), rows.shape[1])
        logits: Tensor = model(**arguments).logits
        return logits

    logits = run(rows, mask)
    # Twice, because a compiled model has another graph for a batch of one row.
    alone = run(row.expand(2, -1), mask[:2, _PADDING:])[0].double()
    precision = max(torch.finfo(dtype).eps for dtype in _dtypes(unwrapped, logits))
    first, second = logits[:2, _PADDING:].double()
    on_the_right = logits[2, : len(row)].double()
    # Rounding may send a token of a shifted row to another expert, which changes it and few others.
    shifted = [
        (_relative_gap(first, other) > _bound(_SHIFTED, precision)).float().mean() > 0.5
        for other in (on_the_right, alone)
    ]
    same_shape = _relative_gap(second, first) > _bound(_SAME_SHAPE, precision)
    return bool(same_shape.any() | shifted[0] | shifted[1])


def _relative_gap(logits: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of the logits [..., V] of each position, relative to the largest logit of all."""
    gaps = torch.where(logits == expected, 0.0, logits - expected).abs().amax(dim=-1)
    return gaps / torch.where(expected > _MASKED, expected, 0.0).abs().amax()


def _bound(bounds: tuple[float, int], precision: float) -> float:
    return max(bounds[0], bounds[1] * precision)


def _dtypes(model: Any, logits: Tensor) -> list[torch.dtype]:
    """Those in which the model computes."""
    device = logits.device.type
    weight = model.get_input_embeddings().weight
    dtypes = [logits.dtype, *([weight.dtype] if weight.is_floating_point() else [])]
    return [*dtypes, torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else dtypes


class LayoutSupport(NamedTuple):
    """The densest layout that a model computes right, and why not a denser one."""

    layout: Layout
    reason: str  # "" for `packed`


def supported_layout(model: Any, batch: TokenBatch) -> LayoutSupport:
    """The densest layout that the model computes right.

    Two short rows run packed, packed with other tokens in the first or in the second row, and each alone. A row's
    hidden states must not change with the other's tokens, and packed rows must equal separate ones. `groups` needs
    hidden states of every position before the head.

    Every process makes the same calls of the model, because what the result depends on is the same for all.

    Args:
        model: in evaluation mode, not wrapped for several processes.
        batch: any batch of the run; its tokens make up the rows.
    """
    first, second = rows = _test_rows(batch)
    alone = [_hidden_states(model, [row], group) for row in rows]
    if any(states is None for states in alone):
        return LayoutSupport(
            "padded", "it does not call its head once with the hidden states of every position"
        )
    reason = _declared_problem(model)
    if reason is not None:
        return LayoutSupport("groups", reason)
    others = [_other_tokens(row, batch) for row in rows]
    packed, other_first, other_second = (
        _hidden_states(model, each, pack) for each in (rows, [others[0], second], [first, others[1]])
    )
    if any(states is None for states in (packed, other_first, other_second)):
        return LayoutSupport("groups", "it does not compute every position of packed rows")
    split, tolerance = len(first), max(torch.finfo(dtype).eps for dtype in _dtypes(model, packed))
    if _gap(packed[:split], other_first[:split]).mean() <= 10 * tolerance:
        return LayoutSupport(
            "groups", "its hidden states hardly depend on the tokens, so that nothing can be tested"
        )
    leak = max(
        _gap(other_first[split:], packed[split:]).max().item(),
        _gap(other_second[:split], packed[:split]).max().item(),
    )
    if not leak <= max(_LEAK, tolerance):
        return LayoutSupport(
            "groups", f"a row's hidden states change by {leak:.1e} with the tokens of another row"
        )
    difference = _gap(packed, torch.cat(alone)).mean().item()
    if not difference <= max(_DIFFERENCE, 10 * tolerance):
        return LayoutSupport(
            "groups", f"packed hidden states differ by {difference:.1e} from those of separate rows"
        )
    return LayoutSupport("packed", "")


def sequence_limit(model: Any, batch: TokenBatch) -> float:
    """The number of tokens of a packed sequence that the model computes correctly; infinity without a bound.

    A model that keeps its causal mask as a buffer, as GPT-Neo, takes no sequence that is longer than the mask.

    A model with `max_seq_length`, as Unsloth's, silently truncates longer sequences, unless it recognizes from the
    positions that a sequence is packed. This is tested with `max_seq_length` lowered below the length of two packed
    test rows: if these are still computed correctly, only `max_position_embeddings` limits a sequence. Where the
    frequencies of RoPE depend on the length of a sequence, `max_seq_length` stays the limit.

    Every process makes the same calls of the model, because what the result depends on is the same for all.

    Args:
        model: in evaluation mode, not wrapped for several processes; it can run packed rows.
        batch: any batch of the run; its tokens make up the rows.
    """
    masks = [buffer for buffer in model.buffers() if buffer.dtype == torch.bool and buffer.ndim > 1]
    longest_mask = min(
        (float(mask.shape[-1]) for mask in masks if mask.shape[-1] == mask.shape[-2]), default=math.inf
    )
    limit = getattr(model, "max_seq_length", None)
    if not limit:
        return longest_mask
    text = model.config.get_text_config()
    if _rope_types(text) & _ROPE_BY_LENGTH:
        return float(limit)
    with _short_sequences(model):
        if model.max_seq_length == limit or supported_layout(model, batch).layout != "packed":
            return float(limit)
    return float(max(limit, getattr(text, "max_position_embeddings", None) or limit))


def _rope_types(config: Any) -> set[str]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have separate parameters of RoPE for each type of layer.
    each = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    return {str(part.get("rope_type", part.get("type"))) for part in each}


@contextmanager
def _short_sequences(model: Any) -> Iterator[None]:
    """Temporarily set `max_seq_length` of the model and its submodules to the length of the longest test row."""
    modules = [vars(module) for module in all_modules(model) if "max_seq_length" in vars(module)]
    limits = [attributes["max_seq_length"] for attributes in modules]
    try:
        for attributes in modules:
            attributes["max_seq_length"] = max(_LENGTHS)
        yield
    finally:
        for attributes, limit in zip(modules, limits, strict=True):
            attributes["max_seq_length"] = limit


def row_attention_problem(model: Any, batch: TokenBatch) -> str:
    """Why a model must not compute packed rows by `row_attention`; "" if it may.

    Three short rows whose first tokens are the same run packed, packed with another end of each row in turn, and
    each alone with the model's own mask. A window of the model is made shorter than the rows for the test.

    Every process makes the same calls of the model, because what the result depends on is the same for all.

    Args:
        model: in evaluation mode, not wrapped for several processes; it can run packed rows.
        batch: any batch of the run; its tokens make up the rows.
    """
    reason = _declared_row_problem(model)
    if reason:
        return reason
    whole = _test_rows(batch)[1]
    replaced = _other_tokens(whole, batch)
    rows = [whole, *(whole[:cut] + replaced[cut:] for cut in (3, 6))]
    ends = [[*row[:-1], _other_tokens(row, batch)[-1]] for row in rows]
    with _short_window(model.config.get_text_config()):
        alone = [_hidden_states(model, [row], group) for row in rows]
        try:
            packed = _row_states(model, rows)
            others = [_row_states(model, [*rows[:i], end, *rows[i + 1 :]]) for i, end in enumerate(ends)]
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            return f"its forward does not take such a mask: {error}"
    tolerance = max(torch.finfo(dtype).eps for dtype in _dtypes(model, packed[0]))
    leak = max(
        _gap(states, packed[row]).max().item()
        for changed, other in enumerate(others)
        for row, states in enumerate(other)
        if row != changed
    )
    if not leak <= max(_LEAK, tolerance):
        return f"a row's hidden states change by {leak:.1e} with the tokens of another row"
    difference = _gap(torch.cat(packed), torch.cat(alone)).mean().item()
    if not difference <= max(_DIFFERENCE, 10 * tolerance):
        return f"its hidden states differ by {difference:.1e} from those of separate rows"
    return ""


def _declared_row_problem(model: Any) -> str:
    text = model.config.get_text_config()
    implementation = getattr(text, "_attn_implementation", None)
    if implementation != "sdpa":
        return f"its attention is {implementation!r}, not 'sdpa'"
    if getattr(model, "max_seq_length", None) is not None:
        return "its forward is not that of transformers"
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return "it is compiled"
    names = {name.lstrip("_") for name, value in text.to_dict().items() if "window" in name and value}
    if others := names - _WINDOW_SETTINGS:
        return f"its configuration has {', '.join(sorted(others))}"
    return ""


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    window = getattr(config, "sliding_window", None)
    if window is not None:
        config.sliding_window = _SHORT_WINDOW
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window


def _row_states(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Hidden states [n, D] of each row, of one sequence that holds the first tokens in common once."""
    places: list[Tensor] = []

    def build(batch: TokenBatch, _: Sequence[int]) -> ModelCall:
        prefixes = shared_prefixes(batch)
        placed = place_rows(batch.sizes, prefixes, prefixes.order)
        places.extend(placed.places[list(prefixes.order).index(row)] for row in range(len(rows)))
        return pack_prefixes(batch, prefixes.order, prefixes)

    packed = _hidden_states(model, rows, build)
    return [packed[each.to(packed.device)] for each in places]


def _declared_problem(model: Any) -> str | None:
    text = model.config.get_text_config()
    if not accepts(model, "position_ids"):
        return "its forward takes no position_ids"
    others = set(map(str, getattr(text, "layer_types", None) or ())) - _LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if getattr(text, "attention_chunk_size", None) is not None:
        return "its attention sees fixed chunks of a sequence"
    return None


def _test_rows(batch: TokenBatch) -> list[list[int]]:
    """Two short rows of the batch's first tokens, repeated where it has fewer."""
    tokens = batch.ids[batch.mask.bool()][: sum(_LENGTHS)].tolist()
    tokens = (tokens * sum(_LENGTHS))[: sum(_LENGTHS)]
    return [tokens[: _LENGTHS[0]], tokens[_LENGTHS[0] :]]


def _other_tokens(row: Sequence[int], batch: TokenBatch) -> list[int]:
    """Another token at every place, of those that occur in the batch if it has two."""
    known = batch.ids[batch.mask.bool()].unique().tolist()
    if len(known) == 1:
        known = [known[0], known[0] - 1 if known[0] else 1]
    after = dict(zip(known, known[1:] + known[:1], strict=True))
    return [after[token] for token in row]


def _hidden_states(
    model: Any, rows: Sequence[Sequence[int]], build: Callable[[TokenBatch, Sequence[int]], ModelCall]
) -> Any:
    """Hidden states [N, D] before the head; `None` unless the head gets all positions in one call."""
    ids, mask = left_pad(rows, pad_id=0, device=model.get_input_embeddings().weight.device)
    call = build(TokenBatch(ids, mask, [(len(row) - 1, 1) for row in rows]), range(len(rows)))
    captured: list[Tensor] = []

    def capture(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(args[0])
        return (args[0][:, -1:], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        with torch.no_grad():
            model(**call_arguments(model, call))
    finally:
        handle.remove()
    if len(captured) != 1 or captured[0].shape[:2] != call.ids.shape:
        return None
    states: Tensor = captured[0][0]
    return states


def _gap(states: Tensor, expected: Tensor) -> Tensor:
    """The difference of each position's states [N, D], relative to their norm, [N]."""
    states, expected = states.double(), expected.double()
    return (states - expected).norm(dim=-1) / expected.norm(dim=-1)

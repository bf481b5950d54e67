"""The calls of the model over the rows of a micro-batch: the layout of the run, and the limits of a call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from . import forward as step_forward
from . import packing
from .batch import MicroBatch, RowGroup, Sizes, TokenBatch, equal_groups, position_ids, row_bounds, row_groups
from .call_cost import call_cost
from .model_check import LayoutSupport, row_attention_problem, sequence_limit, supported_layout
from .packing import CallLimits, Layout, ModelCall
from .prefixes import Prefixes, packed_tokens, prefix_rows, shared_prefixes

if TYPE_CHECKING:
    from .micro_batch import StepContext

logger = logging.getLogger("sdpo_rl")

# With a model of hidden size 3584 (7B), a teacher forward of 8192 tokens keeps a GPU busy; more tokens would only
# cost memory for activations. The number of tokens grows as the hidden size falls.
_TEACHER_TOKENS, _TEACHER_WIDTH = 8192, 3584
# A batch with less padding runs padded: attention without packed rows is faster.
_FULL = 0.9
# Of a call, where several must not be made.
_FORBIDDING = 1e15


class Runner(NamedTuple):
    """Runs a forward over a batch, in one call of the model or in several."""

    run: Callable[[Callable[..., Any]], Any]
    weights: Sequence[float]  # of the calls in a mean over them
    padding: int  # positions that are padding
    positions: int  # positions that the model computes

    def __call__(self, forward: Callable[..., Any]) -> Any:
        """What `forward` returns, for the tokens [B, T] of the completions."""
        return self.run(forward)

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """The mean [] of one value for each call, weighted by its tokens."""
        weighted = [value * weight for value, weight in zip(values, self.weights, strict=True)]
        return torch.stack(weighted).sum() / sum(self.weights)


class ChosenLayout(NamedTuple):
    """The layout of a run's forwards."""

    layout: Layout
    reason: str = ""  # why not a denser one that the configuration allows
    by_row: bool = False  # packed rows get `row_attention`, and read a prompt in common once
    by_row_reason: str = ""  # why packed rows do not
    sequence_limit: float = math.inf  # tokens of a packed sequence that the model runs right

    @property
    def note(self) -> str:
        """For the log and the report."""
        if self.layout != "packed":
            return self.reason
        if self.by_row:
            return "a prompt in common is read once"
        bound = "" if self.sequence_limit == math.inf else f"at most {self.sequence_limit:.0f} tokens, and "
        return f"{bound}a prompt in common is read for every row, because {self.by_row_reason}"


def choose_layout(context: StepContext, tokens: TokenBatch) -> ChosenLayout:
    """The layout of a run's forwards by `SDPOConfig.packing` and a test of the model; logs it.

    All processes must call it.

    Raises:
        ValueError: `packing="packed"` or `"groups"`, and the model cannot.
    """
    wanted = context.config.packing
    if wanted == "padded":
        return ChosenLayout("padded")
    with context.accelerator.autocast(), step_forward.evaluating(context.unwrapped):
        found = supported_layout(context.unwrapped, tokens)
    if context.embedding_noise and found.layout == "packed":
        # In proportion to 1/√width: in a packed sequence it would shrink with the number of rows.
        found = LayoutSupport(
            "groups", "neftune_noise_alpha scales its noise by the width of a call, not of a row"
        )
    # Rounding may decide a close case; one layout for all.
    able = torch.tensor([found.layout == "packed", found.layout != "padded"], device=tokens.ids.device)
    packed, groups = (context.accelerator.gather(able.int()).view(-1, 2).min(0).values > 0).tolist()
    layout: Layout = "packed" if packed else "groups" if groups else "padded"
    reason = "" if packed else found.reason or "the test failed on another process"
    if (wanted, layout) in (("packed", "groups"), ("packed", "padded"), ("groups", "padded")):
        raise ValueError(
            f"packing: expected a model that can run {wanted!r}, got {type(context.unwrapped).__name__}: {reason}; "
            "set SDPOConfig(packing='auto')"
        )
    if wanted == "groups":
        layout, reason = "groups", ""
    chosen = ChosenLayout(layout, reason)
    if layout == "packed":
        with context.accelerator.autocast(), step_forward.evaluating(context.unwrapped):
            problem = (
                "it is compiled"
                if _will_compile(context.accelerator)
                else row_attention_problem(context.unwrapped, tokens)
            )
            longest = sequence_limit(context.unwrapped, tokens)
        fits = torch.tensor([not problem], device=tokens.ids.device)
        by_row = bool(context.accelerator.gather(fits.int()).min() > 0)
        bound = torch.tensor([longest], dtype=torch.float32, device=tokens.ids.device)
        chosen = chosen._replace(
            by_row=by_row,
            by_row_reason="" if by_row else problem or "the test failed on another process",
            sequence_limit=context.accelerator.gather(bound).min().item(),
        )
    logger.info("Forwards run with packing=%r%s.", layout, chosen.note and f": {chosen.note}")
    return chosen


def _will_compile(accelerator: Any) -> bool:
    """Whether the model runs compiled, by `torch_compile` or the launcher; the unwrapped model is not."""
    return bool(accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)


def make_runners(context: StepContext, batch: MicroBatch) -> tuple[Runner, Runner | None]:
    """For the rows of the student and for those of the teacher, if any; all processes must call it.

    In lockstep all processes make the same number of calls of the model.
    """
    text = context.unwrapped.config.get_text_config()
    teacher_tokens: float = _TEACHER_TOKENS * _TEACHER_WIDTH // getattr(text, "hidden_size", _TEACHER_WIDTH)
    if context.in_lockstep:
        teacher_tokens = math.inf
    averages = context.router_loss_coef is not None
    wanted = [_Wanted(batch.student, math.inf, averages)]
    if batch.teacher is not None:
        wanted.append(_Wanted(batch.teacher, teacher_tokens, averages=False))
    runners = _build_runners(context, wanted)
    return runners[0], runners[1] if len(runners) > 1 else None


def make_runner(context: StepContext, tokens: TokenBatch) -> Runner:
    """For the rows of one batch, otherwise as `make_runners`."""
    return _build_runners(context, [_Wanted(tokens, math.inf, averages=False)])[0]


class _Wanted(NamedTuple):
    """A batch, the largest number of tokens of a call, and whether a loss averages over all tokens of a call."""

    tokens: TokenBatch
    token_limit: float
    averages: bool


def _build_runners(context: StepContext, wanted: Sequence[_Wanted]) -> list[Runner]:
    _check_lengths(context.unwrapped, [size for each in wanted for size in each.tokens.sizes])
    if context.layout == "padded":
        return [_padded_runner(context, each.tokens, each.token_limit) for each in wanted]
    plans = [_plan(context, each) for each in wanted]
    counts = [len(plan.calls) for plan in plans]
    if context.in_lockstep:
        mine = torch.tensor(counts, device=wanted[0].tokens.ids.device)
        counts = context.accelerator.gather(mine).view(-1, len(counts)).max(0).values.tolist()
    return [
        _call_runner(
            context,
            each.tokens,
            packing.model_calls(each.tokens, plan.layout, plan.calls, count=count, prefixes=plan.prefixes),
        )
        for each, plan, count in zip(wanted, plans, counts, strict=True)
    ]


def _check_lengths(model: Any, sizes: Sizes) -> None:
    limit = getattr(model, "max_seq_length", None)
    longest = max(map(sum, sizes), default=0)
    if limit and longest > limit:
        raise ValueError(
            f"batch: expected rows of at most max_seq_length={limit} tokens, got a prompt and completion of "
            f"{longest}, which the model would truncate without a message; load it with a larger max_seq_length, "
            "remove long prompts, or lower max_completion_length"
        )


class _Plan(NamedTuple):
    """The layout of a batch, the rows of each call, and the prompts that rows read once, if they do."""

    layout: Layout
    calls: list[list[int]]
    prefixes: Prefixes | None = None


def _plan(context: StepContext, wanted: _Wanted) -> _Plan:
    """How a batch runs.

    A batch with little padding runs in groups. What is averaged over all tokens of a call needs one call that reads
    every prompt as often as the padded batch, so that no layout changes it, unless the configuration has a limit.
    """
    config, text = context.config, context.unwrapped.config.get_text_config()
    tokens, token_limit, averages = wanted
    layout = context.layout
    cost = call_cost(context.unwrapped)
    dense = packing.default_token_limit(text)
    if config.max_tokens_per_forward is not None:
        token_limit = dense = config.max_tokens_per_forward
    elif averages:
        token_limit, cost = math.inf, cost._replace(overhead_tokens=_FORBIDDING)
        if config.packing == "auto" and sum(map(sum, row_bounds(tokens.sizes))) > dense:
            layout = "groups"
        dense = math.inf
    prefixes = shared_prefixes(tokens) if context.by_row and not averages else None
    read = None if prefixes is None else packed_tokens(tokens.sizes, prefixes, prefixes.order)
    if config.packing == "auto" and packing.fill(tokens.sizes, read) >= _FULL:
        layout = "groups"
    if layout == "packed" and prefixes is not None:
        return _Plan(layout, prefix_rows(tokens.sizes, prefixes, token_limit=token_limit), prefixes)
    if layout == "packed":
        limit = min(token_limit, dense, context.sequence_limit)
        return _Plan(layout, packing.packed_rows(tokens.sizes, token_limit=limit))
    if context.reads_padding:
        return _Plan(layout, packing.equal_rows(tokens.sizes, token_limit=token_limit))
    limits = CallLimits(step_forward.context_length(context.unwrapped), token_limit, *cost)
    return _Plan(layout, packing.alike_rows(tokens.sizes, limits))


def _call_runner(context: StepContext, tokens: TokenBatch, calls: Sequence[ModelCall]) -> Runner:
    positions = sum(call.ids.numel() for call in calls)
    # An empty prompt or completion has one column of padding.
    empty = sum(map(sum, row_bounds(tokens.sizes))) - sum(map(sum, tokens.sizes))
    padding = positions - sum(call.tokens for call in calls if not call.repeats) + empty
    run = partial(
        packing.run_calls,
        calls=calls,
        # Made here: a mask copied to the device after the teacher's forward would wait for it.
        arguments=[step_forward.call_arguments(context.unwrapped, call) for call in calls],
        rows=len(tokens.sizes),
        length=tokens.completion_length,
    )
    weights = [0.0 if call.repeats else float(call.tokens) for call in calls]
    return Runner(run, weights, padding, positions)


def _padded_runner(context: StepContext, tokens: TokenBatch, token_limit: float) -> Runner:
    """Rows in groups within context length and token limit, each as wide as its widest row.

    In lockstep all rows are one group: processes could form different numbers of groups.
    """
    width_limit = step_forward.context_length(context.unwrapped)
    if context.in_lockstep and (width := tokens.ids.shape[1]) > width_limit:
        raise ValueError(
            f"batch: expected at most {width_limit} columns, the model's context length, got {width}; on "
            "several processes its rows cannot run separately: set per_device_train_batch_size=1, or raise "
            "max_seq_length"
        )
    if context.reads_padding and not context.in_lockstep:
        groups = equal_groups(tokens.sizes)
    else:
        groups = row_groups(tokens.sizes, width_limit=width_limit, token_limit=token_limit)
    arguments, length = padded_arguments(context.unwrapped, tokens), tokens.completion_length
    positions = sum(_size(group) for group in groups)
    run = partial(step_forward.run_groups, arguments=arguments, groups=groups, length=length)
    weights = [float(sum(map(sum, row_bounds(tokens.sizes[group.rows])))) for group in groups]
    return Runner(run, weights, positions - sum(map(sum, tokens.sizes)), positions)


def _size(group: RowGroup) -> int:
    rows, columns = group.rows, group.columns
    return int((rows.stop - rows.start) * (columns.stop - columns.start))


def padded_arguments(model: nn.Module, tokens: TokenBatch) -> dict[str, Any]:
    """Keyword arguments of a forward over all rows whose head gets what predicts completions, and one more."""
    positions, kept = position_ids(tokens.mask), tokens.completion_length + 1
    return step_forward.forward_arguments(model, tokens.ids, tokens.mask, positions, kept)

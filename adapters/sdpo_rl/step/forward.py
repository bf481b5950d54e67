"""Forwards of student and teacher: hidden states before the LM head, or logits, of the completion tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import sdpo

from ..teacher import shards
from .batch import RowGroup
from .head import linear_head
from .modules import all_modules, replaced_parameters
from .packing import ModelCall
from .row_attention import row_masks


def forward_arguments(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, logits_to_keep: int
) -> dict[str, Any]:
    """Keyword arguments of a training forward whose head gets the last `logits_to_keep` positions."""
    arguments = _arguments(model, ids, mask, positions)
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = logits_to_keep
    return arguments


def call_arguments(model: nn.Module, call: ModelCall) -> dict[str, Any]:
    """Keyword arguments of a training forward whose head gets all positions of a call."""
    mask: Any = call.mask
    if call.rows is not None:
        mask = row_masks(cast(Any, model).config.get_text_config(), call.rows, call.ids.device)
    return _arguments(model, call.ids, mask, call.positions)


def _arguments(model: nn.Module, ids: Tensor, mask: Any, positions: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = positions
    return arguments


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward, below any PEFT wrapper, has a parameter of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(type(base).forward).parameters


def context_length(model: Any) -> float:
    """The number of tokens that the model can process; infinity where it declares none, or -1 as XLNet does."""
    limits = (
        getattr(model, "max_seq_length", None),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    return min((limit for limit in limits if limit is not None and limit > 0), default=float("inf"))


# --- modes of a model -------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is restored afterwards."""
    # Written past `nn.Module.__setattr__`, which checks for parameters: there are thousands of modules.
    modes = [(vars(module), module.training) for module in all_modules(model)]
    for attributes, _ in modes:
        # On a CPU bitsandbytes repacks a 4-bit layer in evaluation mode for good, and it passes no gradient then.
        if getattr(attributes["_parameters"].get("weight"), "quant_state", None) is None:
            attributes["training"] = False
    try:
        yield
    finally:
        for attributes, mode in modes:
            attributes["training"] = mode


@contextmanager
def checkpointing_disabled(model: nn.Module) -> Iterator[None]:
    """The model without gradient checkpointing; it is restored afterwards with its arguments and hooks.

    Transformers' own way to disable and enable it traverses all modules several times and loses the arguments.
    """
    attributes = [vars(module) for module in all_modules(model)]
    checkpointed = [each for each in attributes if each.get("gradient_checkpointing") is True]
    # PEFT's wrappers pass this property on to the base model, which searches all modules each time that it is read.
    passed_on = "is_gradient_checkpointing"
    own = {} if hasattr(type(model), passed_on) else vars(model)
    before = {name: own[name] for name in (passed_on,) if name in own}  # of a region around this one
    for each in checkpointed:
        each["gradient_checkpointing"] = False
    own[passed_on] = False
    try:
        yield
    finally:
        for each in checkpointed:
            each["gradient_checkpointing"] = True
        own.pop(passed_on, None)
        own.update(before)


# --- forwards ---------------------------------------------------------------------------------------------


def completion_head(
    model: Any,
    unwrapped: Any,
    arguments: Mapping[str, Any],
    *,
    length: int | None = None,
    index: Tensor | None = None,
    params: Mapping[str, Tensor] | None = None,
    router_losses: list[Tensor] | None = None,
) -> sdpo.LMHead:
    """The LM head's own tensors with the hidden states [B, T, D] that predict the last T tokens.

    The head gets a single position, so the whole logits are never computed. Under DeepSpeed ZeRO-3 the tensors of a
    head that is not replaced are empty afterwards, except within a call of the head (see `call_with`).

    Args:
        model: the model that runs, wrapped for several processes or not.
        unwrapped: the model inside `model`.
        arguments: of the forward, by name; see `forward_arguments` and `call_arguments`.
        length: T; this or `index`.
        index: [A] int64, entries of B·L; the hidden states are then those of these positions [A, D].
        params: tensors by parameter name that replace the model's for this forward; `None` for its own.
        router_losses: the load-balancing loss of a Mixture-of-Experts model is appended; `None` computes none.

    Raises:
        ValueError: the head is not one linear layer.
        RuntimeError: the model calls its head more than once.
    """
    # The layer itself, which may be inside PEFT's wrapper: under ZeRO-3 its weight exists only during its own call.
    linear = linear_head(unwrapped.get_output_embeddings())
    captured: list[sdpo.LMHead] = []

    def capture(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Read inside the forward, where replaced and gathered parameters are in place.
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        if params is not None and shards.is_sharded(unwrapped):
            weight, bias = _copy(weight), None if bias is None else _copy(bias)
        captured.append(sdpo.LMHead(_predicting(args[0], length, index), weight, bias))
        return (args[0][:, -1:], *args[1:])

    handle = linear.register_forward_pre_hook(capture)
    try:
        _run(model, unwrapped, arguments, params, router_losses)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise RuntimeError(
            f"output embeddings: expected one call per forward, got {len(captured)}; set "
            "SDPOConfig(loss_backend='logits') for such a model"
        )
    return captured[0]


def _predicting(values: Tensor, length: int | None, index: Tensor | None) -> Tensor:
    """Of values [B, L, D], those [B, T, D] that predict the last T tokens, or [A, D] at the index."""
    if index is not None:
        return values.flatten(0, 1)[index]
    assert length is not None
    return values[:, -(length + 1) : -1]


def _copy(tensor: Tensor) -> Tensor:
    """A copy of a trainable tensor: its memory is gathered again, with other values, for the next forward."""
    return tensor.detach().clone() if tensor.requires_grad else tensor


def completion_logits(
    model: Any,
    unwrapped: Any,
    arguments: Mapping[str, Any],
    *,
    length: int | None = None,
    index: Tensor | None = None,
    params: Mapping[str, Tensor] | None = None,
    router_losses: list[Tensor] | None = None,
) -> Tensor:
    """The logits [B, T, V] that predict the last T tokens, for heads that cannot be fused.

    Args:
        model: as in `completion_head`, like the other arguments.
        unwrapped: the model inside `model`.
        arguments: of the forward, by name.
        length: T; this or `index`.
        index: [A]; the head then gets these positions alone, and the logits are [A, V].
        params: tensors that replace the model's.
        router_losses: takes the load-balancing loss.
    """
    if index is None:
        logits = _run(model, unwrapped, arguments, params, router_losses).logits
        return _predicting(logits, length, index)

    def select(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_predicting(args[0], length, index)[None], *args[1:])

    handle = unwrapped.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return _run(model, unwrapped, arguments, params, router_losses).logits[0]
    finally:
        handle.remove()


def run_groups(
    forward: Callable[..., Any], arguments: Mapping[str, Any], groups: Sequence[RowGroup], *, length: int
) -> Any:
    """`forward(arguments, length=T)` group by group: an `LMHead` or logits [B, T, V], concatenated.

    Columns that a group cut off are zero; none of them has a loss.
    """
    if len(groups) == 1 and groups[0].right == 0:
        return forward(arguments, length=length)
    outputs: list[Any] = []
    for group in groups:
        group_length = length - group.right
        group_arguments = {
            name: value[group.rows, group.columns] if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        if "logits_to_keep" in group_arguments:
            group_arguments["logits_to_keep"] = group_length + 1
        outputs.append(forward(group_arguments, length=group_length))
    padding = [(0, 0, 0, group.right) for group in groups]
    if not isinstance(outputs[0], sdpo.LMHead):
        return torch.cat([pad(logits, columns) for logits, columns in zip(outputs, padding, strict=True)])
    hidden = [pad(head.hidden, columns) for head, columns in zip(outputs, padding, strict=True)]
    return outputs[0]._replace(hidden=torch.cat(hidden))


def among_rows(output: Any, rows: Tensor, shape: tuple[int, int]) -> Any:
    """The `LMHead` or logits [B', T', V] of some rows among all rows, `shape` (B, T), with zeros elsewhere."""
    if isinstance(output, sdpo.LMHead):
        return output._replace(hidden=among_rows(output.hidden, rows, shape))
    full = output.new_zeros(*shape, output.shape[-1])
    full[rows, : output.shape[1]] = output
    return full


def _run(
    model: Any,
    unwrapped: Any,
    arguments: Mapping[str, Any],
    params: Mapping[str, Tensor] | None,
    router_losses: list[Tensor] | None = None,
) -> Any:
    if router_losses is not None:
        outputs = model(**arguments, output_router_logits=True)
        router_losses.append(router_loss(outputs))
        return outputs
    if params is None:
        return model(**arguments)
    if shards.is_sharded(unwrapped):
        with shards.swap_shards(unwrapped, params):
            return model(**arguments)
    with replaced_parameters(unwrapped, params):
        return unwrapped(**arguments)


def router_loss(outputs: Any) -> Tensor:
    """The load-balancing loss [] float32 of a Mixture-of-Experts model's forward.

    Raises:
        ValueError: the model returned none although its router logits were requested.
    """
    loss = getattr(outputs, "aux_loss", None)
    if loss is None:
        raise ValueError(
            "router_aux_loss_coef: expected a model whose forward returns aux_loss, got none; set "
            "GRPOConfig(router_aux_loss_coef=0.0)"
        )
    # A model without Mixture-of-Experts layers returns the number 0.
    return torch.as_tensor(loss, dtype=torch.float32)

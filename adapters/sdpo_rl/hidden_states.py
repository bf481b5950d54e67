"""Hidden states before the LM head, without private API and without whole logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import ranks


class Head(NamedTuple):
    """An LM head as the loss needs it: logits = softcap(scale · (hidden @ weightᵀ + bias))."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class HeadTransform(NamedTuple):
    """What a model does to its logits after the head."""

    logit_scale: float
    softcap: float | None


class CompletionStates(NamedTuple):
    """Hidden states [B, T, D] that predict the T completion tokens, and the head they feed."""

    hidden: Tensor
    head: Head


def head_transform(config: Any) -> HeadTransform:
    """The scale and soft-cap that a model's configuration declares for its logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = next(
        (
            float(value)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)
    softcap = getattr(text, "final_logit_softcapping", None)
    return HeadTransform(1.0 if scale is None else scale, None if softcap is None else float(softcap))


def linear_head(module: Any) -> Any:
    """The linear layer behind an output-embedding module, through PEFT's `modules_to_save` wrapper.

    Raises:
        ValueError: a head that is not one linear map (an adapter layer, a quantized layer), with the way out.
    """
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        adapters = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", "default")]
        name = adapters[0]
        module = saved[name] if name in saved else module.original_module  # noqa: SIM401 - no get() there
    weight = getattr(module, "weight", None)
    if hasattr(module, "lora_A") or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"the LM head is a {type(module).__name__}, not a plain linear layer, so its product with the hidden "
            "states cannot be fused; set SDPOConfig(loss_backend='logits'), or keep 'lm_head' out of the "
            "adapter's target_modules and out of quantization"
        )
    return module


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward, below any PEFT wrapper, has a parameter of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(type(base).forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # On a CPU bitsandbytes repacks a 4-bit layer in evaluation mode for good, and it passes no gradient then.
        if getattr(module.__dict__["_parameters"].get("weight"), "quant_state", None) is None:
            # Past `__setattr__`, which looks for parameters: there are thousands of modules.
            module.__dict__["training"] = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.__dict__["training"] = mode


def forward_arguments(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, keep: int
) -> dict[str, Any]:
    """Keyword arguments of a training forward whose head sees the last `keep` positions."""
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if accepts(model, "position_ids"):
        arguments["position_ids"] = positions
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = keep
    return arguments


def completion_states(
    model: Any,
    unwrapped: Any,
    arguments: Mapping[str, Any],
    *,
    length: int,
    params: Mapping[str, Tensor] | None = None,
) -> CompletionStates:
    """Hidden states [B, T, D] that predict the last `length` tokens, with the head's own tensors.

    `model` is what runs (it may be wrapped for several ranks), `unwrapped` the model inside it. With `params`
    the forward uses these tensors in place of the parameters of the same names, and `model` is left as it
    was. The head sees a single position: its whole product is never formed.
    """
    head_module = unwrapped.get_output_embeddings()
    found: list[CompletionStates] = []

    def capture(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        linear = linear_head(module)
        # Read here, inside the forward: this is where swapped and gathered parameters are in place.
        head = Head(linear.weight, linear.bias)
        if params is not None and ranks.is_sharded(unwrapped):
            head = Head(_lasting(head.weight), None if head.bias is None else _lasting(head.bias))
        found.append(CompletionStates(args[0][:, -(length + 1) : -1], head))
        return (args[0][:, -1:], *args[1:])

    handle = head_module.register_forward_pre_hook(capture)
    try:
        _run(model, unwrapped, arguments, params)
    finally:
        handle.remove()
    if len(found) != 1:
        raise RuntimeError(
            f"the model called its output embeddings {len(found)} times in one forward; expected once. "
            "Set SDPOConfig(loss_backend='logits') for such a model"
        )
    return found[0]


def completion_logits(
    model: Any,
    unwrapped: Any,
    arguments: Mapping[str, Any],
    *,
    length: int,
    params: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Whole logits [B, T, V] that predict the last `length` tokens, for heads that cannot be fused."""
    return _run(model, unwrapped, arguments, params).logits[:, -(length + 1) : -1]


def _run(
    model: Any, unwrapped: Any, arguments: Mapping[str, Any], params: Mapping[str, Tensor] | None
) -> Any:
    if params is None:
        return model(**arguments)
    if ranks.is_sharded(unwrapped):
        with ranks.exchanged(unwrapped, params):
            return model(**arguments)
    return functional_call(unwrapped, dict(params), args=(), kwargs=dict(arguments))


def _lasting(tensor: Tensor) -> Tensor:
    """A copy of a trainable tensor: its memory is gathered anew, with other contents, for the next forward."""
    return tensor.detach().clone() if tensor.requires_grad else tensor


def transform_matches(model: Any, arguments: Mapping[str, Any], transform: HeadTransform) -> bool:
    """Whether `transform` reproduces the model's own logits at the last position of the first row.

    A model that changes its logits in an undeclared way would otherwise be distilled on other numbers than it
    samples from.
    """
    one_row = {
        name: value[:1] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if name != "logits_to_keep"
    }
    if "logits_to_keep" in arguments:
        one_row["logits_to_keep"] = 2
    seen: list[tuple[Tensor, Head]] = []

    def peek(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        linear = linear_head(module)
        seen.append((args[0][:, -1:], Head(linear.weight, linear.bias)))
        return (args[0][:, -1:], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(peek)
    try:
        with torch.no_grad():
            expected = model(**one_row).logits[:, -1].float()
    finally:
        handle.remove()
    hidden, head = seen[0]
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    logits = nn.functional.linear(
        hidden[:, -1].to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    ).float()
    logits = logits * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    scale = expected.abs().max().clamp(min=1.0)
    return bool(((logits - expected).abs().max() / scale) < 0.03)

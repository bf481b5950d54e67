"""Hidden states before the LM head, without private API and without whole logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..teacher import shards
from ..teacher.swap import all_modules, replaced

# The declared transform is compared with the model's logits at so many positions, and up to so much of their size,
# or to twice their precision where that is more: scaling and capping round a few times.
_POSITIONS, _TOLERANCE = 8, 1e-4


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
    softcap = next(
        (
            value
            for name in ("final_logit_softcapping", "logits_soft_cap")
            if (value := getattr(text, name, None)) is not None
        ),
        None,
    )
    return HeadTransform(1.0 if scale is None else scale, None if softcap is None else float(softcap))


def plain_head(module: Any) -> nn.Linear | None:
    """The linear layer behind an output-embedding module, through PEFT's `modules_to_save` wrapper.

    `None` for a head that is more than one linear map of floating-point tensors.
    """
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        adapters = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", "default")]
        name = adapters[0]
        module = saved[name] if name in saved else module.original_module  # noqa: SIM401 - no get() there
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return None
    # Adapters of some libraries are linear layers too, with more to them.
    return module if {name for name, _ in module.named_parameters()} <= {"weight", "bias"} else None


def linear_head(module: Any) -> nn.Linear:
    """`plain_head`, or an error.

    Raises:
        ValueError: a head that is not one linear map (an adapter layer, a quantized layer), with the way out.
    """
    linear = plain_head(module)
    if linear is None:
        raise ValueError(
            f"the LM head is a {kind_of(module)}, not a plain linear layer, so its product with the hidden "
            "states cannot be fused; set SDPOConfig(loss_backend='logits'), or keep 'lm_head' out of the "
            "adapter's target_modules (and a tied embedding out of its trainable_token_indices) and out of "
            "quantization"
        )
    return linear


def kind_of(module: Any) -> str:
    """The class of a module with its home: adapters call their layers Linear, too."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def accepts(model: Any, name: str) -> bool:
    """Whether the model's forward, below any PEFT wrapper, has a parameter of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(type(base).forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode comes back afterwards."""
    # Past `__setattr__`, which looks for parameters: there are thousands of modules.
    modes = [(module.__dict__, module.training) for module in all_modules(model)]
    for own, _ in modes:
        # On a CPU bitsandbytes repacks a 4-bit layer in evaluation mode for good, and it passes no gradient then.
        if getattr(own["_parameters"].get("weight"), "quant_state", None) is None:
            own["training"] = False
    try:
        yield
    finally:
        for own, mode in modes:
            own["training"] = mode


@contextmanager
def activations_kept(model: nn.Module) -> Iterator[None]:
    """The model without gradient checkpointing; it is as it was afterwards, arguments and hooks included.

    Transformers' own way to switch it off and on again goes through all modules several times, and the arguments
    that it was switched on with are gone.
    """
    own = [vars(module) for module in all_modules(model)]
    checkpointed = [held for held in own if held.get("gradient_checkpointing") is True]
    for held in checkpointed:
        held["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for held in checkpointed:
            held["gradient_checkpointing"] = True


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
    router_losses: list[Tensor] | None = None,
) -> CompletionStates:
    """Hidden states [B, T, D] that predict the last `length` tokens, with the head's own tensors.

    `model` is what runs (it may be wrapped for several ranks), `unwrapped` the model inside it. With `params`
    the forward uses these tensors in place of the parameters of the same names, and `model` is left as it
    was. The head sees a single position: its whole product is never formed. `router_losses` takes the loss by
    which the forward would balance the load of its experts.
    """
    head_module = unwrapped.get_output_embeddings()
    found: list[CompletionStates] = []

    def capture(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        linear = linear_head(module)
        # Read here, inside the forward: this is where swapped and gathered parameters are in place.
        head = Head(linear.weight, linear.bias)
        if params is not None and shards.is_sharded(unwrapped):
            head = Head(_lasting(head.weight), None if head.bias is None else _lasting(head.bias))
        found.append(CompletionStates(args[0][:, -(length + 1) : -1], head))
        return (args[0][:, -1:], *args[1:])

    handle = head_module.register_forward_pre_hook(capture)
    try:
        _run(model, unwrapped, arguments, params, router_losses)
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
    router_losses: list[Tensor] | None = None,
) -> Tensor:
    """Whole logits [B, T, V] that predict the last `length` tokens, for heads that cannot be fused."""
    return _run(model, unwrapped, arguments, params, router_losses).logits[:, -(length + 1) : -1]


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
    with replaced(unwrapped, params):
        return unwrapped(**arguments)


def router_loss(outputs: Any) -> Tensor:
    """The load-balancing loss [] of a Mixture-of-Experts model's forward, in float32.

    Raises:
        ValueError: the model returned none although its router logits were asked for.
    """
    loss = getattr(outputs, "aux_loss", None)
    if loss is None:
        raise ValueError(
            "router_aux_loss_coef asks for the model's load-balancing loss, and its forward returns no aux_loss; "
            "set GRPOConfig(router_aux_loss_coef=0.0)"
        )
    # A configuration without experts gives the number 0.
    return torch.as_tensor(loss, dtype=torch.float32)


def _lasting(tensor: Tensor) -> Tensor:
    """A copy of a trainable tensor: its memory is gathered anew, with other contents, for the next forward."""
    return tensor.detach().clone() if tensor.requires_grad else tensor


def transform_matches(model: Any, arguments: Mapping[str, Any], transform: HeadTransform) -> bool:
    """Whether `transform` reproduces the model's own logits at the last positions of the first row.

    A model that changes its logits in an undeclared way would otherwise be distilled on other numbers than it
    samples from.
    """
    attended = arguments["attention_mask"][0].nonzero()
    columns = slice(int(attended[0]), int(attended[-1]) + 1)
    one_row = {
        name: value[:1, columns] if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    if "logits_to_keep" in one_row:
        one_row["logits_to_keep"] = _POSITIONS
    products: list[Tensor] = []

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -_POSITIONS:], *args[1:])

    def multiply(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        linear, dtype = linear_head(module), output.dtype
        bias = None if linear.bias is None else linear.bias.to(dtype)
        # As the head rounded, under autocast or not.
        with torch.autocast(output.device.type, enabled=False):
            products.append(nn.functional.linear(args[0].to(dtype), linear.weight.to(dtype), bias))

    head = model.get_output_embeddings()
    # Prepended: before gathered parameters are given back.
    handles = [head.register_forward_pre_hook(cut), head.register_forward_hook(multiply, prepend=True)]
    try:
        with torch.no_grad():
            expected = model(**one_row).logits[:, -_POSITIONS:]
    finally:
        for handle in handles:
            handle.remove()
    if len(products) != 1 or products[0].shape != expected.shape:
        return False
    logits = products[0].float() * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    precision = max(torch.finfo(products[0].dtype).eps, torch.finfo(expected.dtype).eps)
    return _equal(logits, expected.float(), tolerance=max(2 * precision, _TOLERANCE))


def _equal(logits: Tensor, expected: Tensor, *, tolerance: float) -> bool:
    """Equal where −∞, and elsewhere up to `tolerance`, relative to each logit and a tenth to the largest.

    Scaling and capping round each logit by its own size. Whatever rounds by the size of the largest is hidden by
    no more than a tenth, lest a wrong scale pass.
    """
    impossible = expected.isneginf()
    size = expected.masked_fill(impossible, 0.0).abs()
    close = (logits - expected).abs() <= tolerance * (size + size.max() / 10)
    return bool(torch.where(impossible, logits.isneginf(), close).all())

"""The LM head of a model: its linear layer, and what the model does to the logits after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# `transform_matches` compares this many positions, up to this relative error or twice the precision of the logits,
# whichever is larger: scaling and capping round a few times.
_POSITIONS, _TOLERANCE = 8, 1e-4


class HeadTransform(NamedTuple):
    """``softcap * tanh(logit_scale * logits / softcap)``; without `softcap`, ``logit_scale * logits``."""

    logit_scale: float
    softcap: float | None


def head_transform(config: Any) -> HeadTransform:
    """The scale and soft-cap that a model's configuration declares for its logits."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = _first(text, "logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = _first(text, "logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    return HeadTransform(
        1.0 if scale is None else scale, _first(text, "final_logit_softcapping", "logits_soft_cap")
    )


def _first(config: Any, *names: str) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def plain_head(module: Any) -> nn.Linear | None:
    """The linear layer behind an output-embedding module: in PEFT's `modules_to_save` wrapper the one it calls now.

    `None` for a head that is more than one linear map of floating-point tensors.
    """
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):
        adapters = getattr(module, "active_adapters", None) or [getattr(module, "active_adapter", "default")]
        name = adapters[0]
        is_saved = name in saved and not module.disable_adapters
        module = saved[name] if is_saved else module.original_module
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return None
    # Adapter layers of some libraries are subclasses of nn.Linear with further parameters.
    return module if {name for name, _ in module.named_parameters()} <= {"weight", "bias"} else None


def linear_head(module: Any) -> nn.Linear:
    """`plain_head`, or an error.

    Raises:
        ValueError: a head that is not one linear map (an adapter layer, a quantized layer), with the fix.
    """
    linear = plain_head(module)
    if linear is None:
        raise ValueError(
            f"LM head: expected a plain linear layer, got {class_name(module)}, whose product with the hidden "
            "states cannot be fused; set SDPOConfig(loss_backend='logits'), or exclude 'lm_head' from the "
            "adapter's target_modules (and a tied embedding from its trainable_token_indices) and from "
            "quantization"
        )
    return linear


def never_autocast(module: Any, device: torch.device) -> None:
    """Run the module's forward outside autocast: GRPO's float32 head is a product that autocast would round."""
    module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def call_with(module: Any, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`compute(hidden)` in place of the head's own product, within a call of the head.

    DeepSpeed ZeRO-3 gathers the weight around a call of the head and, where the output has a gradient, around the
    head's backward pass. All processes must call it.

    Args:
        module: the output embeddings, whose weight and bias `compute` reads.
        compute: returns one tensor, the only result with a gradient.
        hidden: hidden states that the head projects. They are an argument so that DeepSpeed sees where the head's
            backward pass ends.

    Returns:
        What `compute` returns, with its gradient.

    Raises:
        ValueError: the head is not one linear layer.
    """
    attributes = vars(linear_head(module))
    replaced = {name: attributes[name] for name in ("forward",) if name in attributes}
    attributes["forward"] = compute
    try:
        # The module and not the layer inside: with PEFT's wrapper DeepSpeed expects backward passes of both.
        output: Tensor = module(hidden)
    finally:
        del attributes["forward"]
        attributes.update(replaced)
    return output


def class_name(module: Any) -> str:
    """The class of a module with its package: adapter layers are called Linear, too."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def transform_matches(model: Any, arguments: Mapping[str, Any], transform: HeadTransform) -> bool:
    """Whether `transform` reproduces the model's own logits at the last positions of the first row.

    Otherwise the model changes its logits in a way that its configuration does not declare, and the fused loss
    would compare other distributions than those it samples from.
    """
    attended = arguments["attention_mask"][0].nonzero()
    columns = slice(int(attended[0]), int(attended[-1]) + 1)
    one_row = {
        name: value[:1, columns] if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    if "logits_to_keep" in one_row:
        one_row["logits_to_keep"] = _POSITIONS
    products: list[Tensor] = []
    # The layer itself, which may be inside PEFT's wrapper: under ZeRO-3 its weight exists only during its own call.
    head = linear_head(model.get_output_embeddings())

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -_POSITIONS:], *args[1:])

    def multiply(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        dtype = output.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        # In the head's own precision, with or without autocast.
        with torch.autocast(output.device.type, enabled=False):
            products.append(nn.functional.linear(args[0].to(dtype), head.weight.to(dtype), bias))

    # Prepended: before a hook that frees gathered parameters.
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
    return _all_close(logits, expected.float(), tolerance=max(2 * precision, _TOLERANCE))


def _all_close(logits: Tensor, expected: Tensor, *, tolerance: float) -> bool:
    """Equal where −∞, and elsewhere up to `tolerance`, relative to each logit plus a tenth of the largest.

    Scaling and capping round each logit relative to its own size, the product relative to the largest. The tenth
    allows for the latter and still rejects a wrong scale.
    """
    impossible = expected.isneginf()
    size = expected.masked_fill(impossible, 0.0).abs()
    close = (logits - expected).abs() <= tolerance * (size + size.max() / 10)
    return bool(torch.where(impossible, logits.isneginf(), close).all())

"""Multimodal models that are trained on text: what text does not reach is frozen."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("sdpo_rl")


def freeze_unreached_by_text(model: Any) -> list[str]:
    """In a multimodal model, freeze the trainable parameters outside of the language model: encoders, projectors.

    Text never gives them a gradient: DDP would wait for one, and the teacher would store an average of them. A
    model whose configuration is that of a language model is left as it is.

    Args:
        model: the unwrapped model, with adapters or without.

    Returns:
        The names of the parameters, as in `model.get_base_model()` for a PEFT model.

    Raises:
        ValueError: all trainable parameters are outside of the language model.
    """
    # Not the parameters of the PEFT wrapper, such as a tuned prompt: they are inputs of the language model.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config() is base.config:
        return []
    decoder = base.get_decoder()
    reached = filter(None, (decoder, base.get_input_embeddings(), base.get_output_embeddings()))
    reached_ids = {id(parameter) for module in reached for parameter in module.parameters()}
    unreached = {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached_ids
    }
    if not unreached:
        return []
    depth = next(name for name, module in base.named_modules() if module is decoder).count(".") + 1
    parts = sorted({".".join(name.split(".")[:depth]) for name in unreached})
    if len(unreached) == sum(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model: expected trainable parameters in its language model, got {len(unreached)} in "
            f"{', '.join(parts)} alone, which text does not reach; unfreeze the language model, or name its "
            "modules in target_modules"
        )
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    found = f"Text does not reach {', '.join(parts)}: {len(unreached)} trainable tensors there are frozen"
    if base is model:
        logger.info("%s.", found)
    else:
        logger.warning(
            "%s. To put no adapters there, set exclude_modules=%r in their configuration, and name none of these "
            "modules in modules_to_save.",
            found,
            f"({'|'.join(parts)}).*",
        )
    return list(unreached)

"""Compare every weight of vLLM's engine with the trainer's, for `rollout.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sdpo_rl import SDPOTrainer

STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def trained_weight(model: Any, parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter by its name in a model without adapters, float32: W, or W + (α/r)·B·A (plain LoRA)."""
    layer, _, kind = name.rpartition(".")
    base = parameters.get(f"{layer}.base_layer.{kind}")
    if base is None:
        return parameters[name].float()
    if kind != "weight":
        return base.float()
    lora = model.peft_config["default"]
    a, b = (parameters[f"{layer}.lora_{half}.default.weight"].float() for half in "AB")
    return base.float() + lora.lora_alpha / lora.r * (b @ a)


def both_sides(trainer: SDPOTrainer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, the engine's weight, and the trainer's in float32."""
    model = trainer._unwrapped
    parameters = {
        name.removeprefix("base_model.model."): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    for name, theirs in runner.model.named_parameters():
        stack = next((stack for stack in STACKED if stack in name), None)
        names = [name] if stack is None else [name.replace(stack, part) for part in STACKED[stack]]
        ours = torch.cat([trained_weight(model, parameters, each) for each in names])
        # The engine's embeddings may have more rows than the vocabulary.
        yield name, theirs.detach()[: len(ours)], ours


@torch.no_grad()
def compare_weights(trainer: SDPOTrainer, before: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare all weights, and put those of the engine in `before`.

    Returns:
        `difference`: the largest difference of a weight, over the largest weight of its matrix. `unequal`: the
        share of the engine's weights that are not the trainer's, rounded. `changed`: the share of the engine's
        weights that are not those in `before`; 0 where it is empty.
    """
    largest, unequal, changed, total = 0.0, 0, 0, 0
    for name, theirs, ours in both_sides(trainer):
        error = (theirs.float() - ours).abs().max() / ours.abs().max().clamp(min=1e-9)
        # `max` of Python would drop a NaN.
        largest = max(largest, torch.nan_to_num(error, nan=torch.inf).item())
        unequal += int((theirs != ours.to(theirs.dtype)).sum())
        if name in before:
            changed += int((theirs != before[name].to(theirs.device)).sum())
        before[name] = theirs.to("cpu", copy=True)
        total += ours.numel()
    return {"difference": largest, "unequal": unequal / total, "changed": changed / total}


def check_weights(engine: str, found: list[dict[str, float]]) -> None:
    """Stop where a comparison shows other weights than rounding makes.

    Raises:
        SystemExit: a difference above twice the machine epsilon of bfloat16, or weights that a later sync
            left as they were.
    """
    if any(each["difference"] > 2 * torch.finfo(torch.bfloat16).eps for each in found):
        raise SystemExit(f"{engine}: the engine's weights are not the trainer's: {found}")
    if any(each["changed"] == 0 or each["unequal"] > each["changed"] / 2 for each in found[1:]):
        raise SystemExit(f"{engine}: the engine has the weights before the step: {found}")

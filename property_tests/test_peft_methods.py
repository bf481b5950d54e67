"""A step of the trainer with each method of PEFT is that of `reference_step`, which runs every row alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from programs import ROOT
from reference_step import Method, compare

TOLERANCE = 5e-6
MODULES = ["q_proj", "v_proj", "down_proj"]
VIRTUAL = 3  # tokens


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, **changes)


METHODS: dict[str, PeftConfig] = {
    "LoRA": lora(),
    "rank-stabilized LoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "biases": lora(bias="all"),
    "`modules_to_save`": lora(modules_to_save=["lm_head"]),
    "`trainable_token_indices`": lora(trainable_token_indices=[5, 6, 7]),
    "`target_parameters`": LoraConfig(r=4, target_parameters=["mlp.down_proj.weight"], target_modules=[]),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=MODULES, total_step=20),
    "IA³": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=MODULES),
    "LoKr": peft.LoKrConfig(r=4, target_modules=MODULES),
    "OFT": peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
}


def adapted(config: PeftConfig) -> Any:
    """A model that returns the logits of a row's own tokens."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), copy.deepcopy(config))
    if isinstance(config, peft.PromptTuningConfig | peft.PromptEncoderConfig):

        def without_virtual_tokens(module: Any, arguments: Any, output: Any) -> Any:
            output.logits = output.logits[:, VIRTUAL:]
            return output

        model.register_forward_hook(without_virtual_tokens)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_a_method(tmp_path: Path, method: str) -> None:
    config = copy.deepcopy(METHODS[method])
    config.task_type = "CAUSAL_LM"
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend="auto"),
        peft_config=copy.deepcopy(config),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        learning_rate=0.05,
    )
    difference = compare(trainer, adapted(config), Method())
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE


def test_the_page_lists_every_method() -> None:
    (row,) = re.findall(r"^\| (LoRA, .*?) \|", (ROOT / "docs" / "lora.md").read_text(), re.MULTILINE)
    assert row.split(", ") == list(METHODS)

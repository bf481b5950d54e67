"""A step of the trainer on many architectures is that of `reference_step`, which runs every row alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import model_families
import pytest
import tiny
import torch
from model_families import FAMILIES, Way
from programs import ROOT
from reference_step import Method, compare
from transformers import AutoConfig

TOLERANCE = 5e-5
PAGE = (ROOT / "docs" / "models.md").read_text()
KINDS = {kind: way for way, kinds in FAMILIES.items() for kind in kinds}
MULTIMODAL = [kind for kind in sorted(KINDS) if model_families.is_multimodal(AutoConfig.for_model(kind))]


def give_completions(model: Any) -> None:
    """Make `generate` return completions of different lengths, which it need not sample then."""
    tokenizer = tiny.tokenizer()

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(6, len(tokenizer), (len(input_ids), 10), generator=generator)
        for row, length in zip(tokens, itertools.cycle([5, 9, 3, 7, 8, 6, 4, 2])):
            row[length - 1], row[length:] = tokenizer.eos_token_id, tokenizer.pad_token_id
        return torch.cat([input_ids, tokens], dim=1)

    model.generate = generate


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_family(tmp_path: Path, kind: str) -> None:
    blank = model_families.build(kind)
    # Of a multimodal model `compare` asserts that the trainer freezes what has no gradient.
    model = (model_families.random_model if kind in MULTIMODAL else model_families.build)(kind)
    give_completions(model)
    trainer = tiny.trainer(
        tmp_path,
        start=model,
        sdpo_config=tiny.config(loss_backend="auto"),
        max_completion_length=10,
        optim="sgd",
        router_aux_loss_coef=0.0,
    )
    difference = compare(trainer, blank, Method())
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    mode = trainer._forward_mode
    assert mode.fused
    assert Way(mode.layout.layout, mode.layout.by_row, mode.reads_padding) == KINDS[kind]


def test_the_page_lists_every_family() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    listed = [row.split(" | ")[1].strip(" |") for row in rows[1:]]
    assert listed == [", ".join(f"`{kind}`" for kind in sorted(kinds)) for kinds in FAMILIES.values()]


def test_the_page_names_the_multimodal_models() -> None:
    named = f"**Multimodal models** in the table: {', '.join(f'`{kind}`' for kind in MULTIMODAL)}. "
    assert named in " ".join(PAGE.split())

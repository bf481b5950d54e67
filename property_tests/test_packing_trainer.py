"""An optimizer step with packed or grouped rows is the step of `reference_step`, which runs every row alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reference_step import Method, compare
from test_trainer_step import tool_tokens
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from sdpo_rl import SDPOTrainer, training_report
from sdpo_rl.step import forward, packing, prefixes, runner

TOLERANCE = 5e-6
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
DORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True)
FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

Case = tuple[dict[str, Any], dict[str, Any], Method]
CASES: dict[str, Case] = {
    "one micro-batch": ({}, {}, Method()),
    "four micro-batches": (FOUR, {}, Method()),
    "checkpointed": ({"gradient_checkpointing": True, **FOUR}, {}, Method()),
    "two passes": ({"num_iterations": 2}, {}, Method()),
    "trust region": ({}, {"teacher_mode": "trust_region"}, Method(teacher="trust_region")),
    "sequence mean": (FOUR, {"loss_aggregation": "sequence-mean"}, Method(sequence_mean=True)),
    "weights of tokens": ({}, {"token_weights": "confidence"}, Method(confidence=1.0)),
    "whole logits": ({}, {"loss_backend": "logits"}, Method()),
    "several forwards": ({}, {"max_tokens_per_forward": 60}, Method()),
    "a forward for each row": (FOUR, {"max_tokens_per_forward": 1, "loss_backend": "logits"}, Method()),
}


def fresh_model(lora: bool) -> nn.Module:
    return get_peft_model(tiny.model(), copy.deepcopy(LORA)) if lora else tiny.model()


def make(
    folder: Path, layout: str, lora: bool, changes: dict[str, Any], config: dict[str, Any]
) -> SDPOTrainer:
    return tiny.trainer(
        folder,
        sdpo_config=tiny.config(packing=layout, **config),
        peft_config=copy.deepcopy(LORA) if lora else None,
        **{"max_steps": 3, "learning_rate": 0.05, **changes},
    )


@pytest.mark.parametrize("layout", ["packed", "groups"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_without_padding(tmp_path: Path, case: str, lora: bool, layout: str) -> None:
    changes, config, method = CASES[case]
    trainer = make(tmp_path, layout, lora, changes, config)
    difference = compare(trainer, fresh_model(lora), method)
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    assert trainer._forward_mode.layout.layout == layout


@pytest.mark.parametrize("layout", ["packed", "groups", "padded"])
@pytest.mark.parametrize("case", ["one micro-batch", "four micro-batches", "checkpointed", "whole logits"])
def test_a_step_with_dora_is_the_same_in_every_layout(tmp_path: Path, case: str, layout: str) -> None:
    """Each layout within half of 1e-5 of rows that run alone, so that any two are within 1e-5 of each other."""
    changes, config, method = CASES[case]
    settings = {"max_steps": 3, "learning_rate": 0.05, **changes}
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(packing=layout, **config),
        peft_config=copy.deepcopy(DORA),
        **settings,
    )
    difference = compare(trainer, get_peft_model(tiny.model(), copy.deepcopy(DORA)), method)
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    assert trainer._forward_mode.layout.layout == layout


def prompts_with_every_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner, "row_attention_problem", lambda *_: "of a test")


@pytest.mark.parametrize("case", ["four micro-batches", "checkpointed", "whole logits", "several forwards"])
def test_a_step_is_the_same_where_every_row_has_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    changes, config, method = CASES[case]
    prompts_with_every_row(monkeypatch)
    trainer = make(tmp_path, "packed", True, changes, config)
    difference = compare(trainer, fresh_model(True), method)
    assert max(difference.gradient, difference.loss) < TOLERANCE
    assert (
        "forwards: packed (a prompt in common is read for every row, because of a test)\n"
        in training_report(trainer)
    )


@pytest.mark.parametrize("layout", ["packed", "groups", "padded"])
def test_tokens_from_tools_have_no_loss(tmp_path: Path, layout: str) -> None:
    difference = compare(make(tmp_path, layout, False, FOUR, {}), fresh_model(False), alter=tool_tokens)
    assert max(difference.gradient, difference.loss) < TOLERANCE


def test_all_rows_padded_is_still_an_option(tmp_path: Path) -> None:
    trainer = make(tmp_path, "padded", False, FOUR, {})
    assert compare(trainer, fresh_model(False)).gradient < TOLERANCE
    assert trainer._forward_mode.layout.layout == "padded"


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_rows_without_signal(tmp_path: Path, layout: str) -> None:
    """Only some rows of a micro-batch run."""
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(packing=layout), num_generations=2, max_steps=3)
    assert compare(trainer, fresh_model(False)).gradient < TOLERANCE
    fractions = logs(trainer, "self_distillation/reprompt_sample_fraction")
    assert any(0 < fraction < 1 for fraction in fractions)


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


Plant = Callable[[pytest.MonkeyPatch], None]


def plant_in_packs(
    patch: pytest.MonkeyPatch, change: Callable[[packing.ModelCall], packing.ModelCall]
) -> None:
    for name in ("pack", "pack_prefixes"):
        true = getattr(packing, name)

        def pack(*args: Any, true: Any = true, **options: Any) -> packing.ModelCall:
            return change(true(*args, **options))

        patch.setattr(packing, name, pack)


def rows_run_on(patch: pytest.MonkeyPatch) -> None:
    plant_in_packs(patch, lambda call: call._replace(positions=torch.arange(call.ids.numel())[None]))


def one_position_late(patch: pytest.MonkeyPatch) -> None:
    # The last token has none after it.
    plant_in_packs(
        patch, lambda call: call._replace(predictors=(call.predictors + 1).clamp(max=call.ids.numel() - 1))
    )


def tokens_of_the_teacher_exchanged(patch: pytest.MonkeyPatch) -> None:
    students: list[bool] = []

    def change(call: packing.ModelCall) -> packing.ModelCall:
        students.append(len(students) % 2 == 0)
        return call if students[-1] else call._replace(targets=call.targets.flip(0))

    plant_in_packs(patch, change)


def rows_see_all_before(patch: pytest.MonkeyPatch) -> None:
    def causal(config: Any, rows: Any, device: Any) -> Any:
        return torch.ones(sum(rows.own), sum(rows.own), dtype=torch.bool).tril()[None, None]

    patch.setattr(forward, "row_masks", causal)


PLANTS = [rows_run_on, one_position_late, tokens_of_the_teacher_exchanged]


@pytest.mark.parametrize("plant", [*PLANTS, rows_see_all_before])
def test_the_comparison_detects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    monkeypatch.setattr(runner, "row_attention_problem", lambda *_: "")
    plant(monkeypatch)
    difference = compare(make(tmp_path, "packed", False, {}, {}), fresh_model(False))
    assert difference.gradient > 1000 * TOLERANCE


@pytest.mark.parametrize("plant", PLANTS)
def test_the_comparison_detects_it_in_rows_with_their_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    prompts_with_every_row(monkeypatch)
    plant(monkeypatch)
    difference = compare(make(tmp_path, "packed", False, {}, {}), fresh_model(False))
    assert difference.gradient > 1000 * TOLERANCE


def test_the_router_loss_is_that_of_padded_rows(tmp_path: Path) -> None:
    def train(layout: Any, **config: Any) -> Any:
        trainer = tiny.trainer(
            tmp_path,
            start=tiny.experts(),
            sdpo_config=tiny.config(packing=layout, **config),
            router_aux_loss_coef=0.5,
            max_steps=2,
        )
        trainer.train()
        return logs(trainer, "aux_loss"), [p.detach().clone() for p in trainer.model.parameters()]

    expected, weights = train("padded")
    for layout in ("packed", "groups"):
        got, after = train(layout)
        assert got == pytest.approx(expected, rel=1e-5)
        # Adam divides by the size of a gradient, so that small ones keep their rounding.
        assert max(float((a - b).abs().max()) for a, b in zip(weights, after, strict=True)) < 1e-4
    # The mean of several forwards is another number.
    assert train("packed", max_tokens_per_forward=1)[0] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_an_evaluation_has_the_same_loss(tmp_path: Path, layout: str) -> None:
    found = []
    for each in ("padded", layout):
        trainer = make(tmp_path, each, False, {"eval_dataset": tiny.conversations(2), "max_steps": 1}, {})
        found.append(trainer.evaluate()["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0] > 0


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_dropout_trains(tmp_path: Path, layout: str) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(packing=layout), peft_config=lora)
    trainer.train()
    assert all(loss > 0 for loss in logs(trainer, "loss"))


# --- the choice -------------------------------------------------------------------------------------------


def alibi() -> nn.Module:
    """Its forward takes no positions."""
    config = BloomConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return BloomForCausalLM(config)


def test_the_choice_is_made_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sdpo_rl"):
        trainer = tiny.trainer(tmp_path, max_steps=3)
        assert "forwards: auto, chosen at the first step\n" in training_report(trainer)
        trainer.train()
    assert "forwards: packed (a prompt in common is read once)\n" in training_report(trainer)
    assert [r.message for r in caplog.records if "packing" in r.message] == [
        "Forwards run with packing='packed': a prompt in common is read once."
    ]


def test_a_model_that_cannot_pack_takes_groups_or_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sdpo_rl"):
        trainer = tiny.trainer(tmp_path, start=alibi(), max_steps=1)
        trainer.train()
    assert "forwards: groups (its forward takes no position_ids)\n" in training_report(trainer)
    assert "packing='groups': its forward takes no position_ids" in caplog.text
    with pytest.raises(ValueError, match=r"packing: expected a model that can run 'packed'.*position_ids"):
        tiny.trainer(tmp_path, start=alibi(), sdpo_config=tiny.config(packing="packed")).train()


def test_the_share_of_padding_is_logged(tmp_path: Path) -> None:
    for layout, empty in (("packed", True), ("padded", False)):
        trainer = make(tmp_path, layout, False, {}, {})
        trainer.train()
        for name in ("student", "teacher"):
            fractions = logs(trainer, f"self_distillation/{name}_padding_fraction")
            assert len(fractions) == 3
            assert (max(fractions) == 0.0) == empty
            assert max(fractions) < 0.9


def test_the_number_of_forwards_is_logged(tmp_path: Path) -> None:
    for limit, several in ((None, False), (30, True)):
        trainer = make(tmp_path, "packed", False, {}, {"max_tokens_per_forward": limit})
        trainer.train()
        for name in ("student", "teacher"):
            forwards = logs(trainer, f"self_distillation/{name}_forwards")
            assert len(forwards) == 3
            assert min(forwards) >= (2 if several else 1)
            assert (max(forwards) == 1.0) != several


def test_a_batch_with_little_padding_runs_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = []
    true = packing.model_calls

    def watch(batch: Any, layout: Any, *args: Any, **kwargs: Any) -> Any:
        found = prefixes.shared_prefixes(batch)
        read = prefixes.packed_tokens(batch.sizes, found, found.order)
        layouts.append((packing.fill(batch.sizes, read) >= runner._FULL, layout))
        return true(batch, layout, *args, **kwargs)

    monkeypatch.setattr(packing, "model_calls", watch)
    tiny.trainer(tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4).train()
    assert set(layouts) == {(True, "groups"), (False, "packed")}

"""The options of the trainer's loss against `reference_step`, in one micro-batch and in four."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from reference_step import Method, Recorder, ReferenceStep, compare, reprompt, undecided
from torch import Tensor

import sdpo
from sdpo_rl.rollout import demonstrations
from sdpo_rl.step import token_weights

TOLERANCE = 5e-6
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
SPLITS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}
OPTIONS: dict[str, tuple[dict[str, Any], Method]] = {
    "batch-token-mean": ({"loss_aggregation": "batch-token-mean"}, Method(batch_token_mean=True)),
    "pass rate": ({"row_weights": "pass_rate"}, Method(pass_rate=True)),
    "confidence": ({"token_weights": "confidence"}, Method(confidence=1.0)),
    "confidence of a sequence mean": (
        {"token_weights": "confidence", "token_weights_beta": 0.3, "loss_aggregation": "sequence-mean"},
        Method(confidence=0.3, sequence_mean=True),
    ),
    "a GRPO part": ({"grpo_weight": 0.3}, Method(grpo=0.3)),
    "GRPO alone": ({"grpo_weight": 1.0}, Method(grpo=1.0)),
    "a changing GRPO part": (
        {"grpo_weight": 0.0, "grpo_weight_final": 0.8, "loss_aggregation": "batch-token-mean"},
        Method(grpo=0.0, grpo_final=0.8, batch_token_mean=True),
    ),
    "routing": (
        {"routing": "srpo", "loss_aggregation": "batch-token-mean", "token_weights": "confidence"},
        Method(routed=True, batch_token_mean=True, confidence=1.0),
    ),
    "gate": ({"grpo_weight": 0.5, "token_weights": "gate"}, Method(grpo=0.5, gate=5.0)),
    "evidence": (
        {"grpo_weight": 0.9, "token_weights": "evidence", "evidence_clip": 0.4},
        Method(grpo=0.9, evidence=(0.5, 0.4)),
    ),
    "credit of a sequence": (
        {"support": "sampled", "alpha": 1.0, "credit": "sequence"},
        Method(sampled=True, sequence_credit=True),
    ),
    "clipped entries": ({"support": "full", "entry_clip": 0.002}, Method(k=None, entry_clip=0.002)),
    "clipped entries, reverse": (
        {"support": "full", "alpha": 1.0, "entry_clip": 0.002},
        Method(k=None, alpha=1.0, entry_clip=0.002),
    ),
    "half of the tokens": ({"token_fraction": 0.5}, Method(fraction=0.5)),
    "both weights": (
        {"token_weights": "confidence", "row_weights": "pass_rate", "loss_aggregation": "batch-token-mean"},
        Method(confidence=1.0, pass_rate=True, batch_token_mean=True),
    ),
}


def sparse(method: Method) -> Method:
    """Without feedback: a group without a success has no teacher signal."""
    return replace(method, feedback=False)


WHOLE_LOGITS = {"credit of a sequence", "clipped entries", "clipped entries, reverse"}
BACKENDS = [
    (option, backend)
    for option in OPTIONS
    for backend in (["auto"] if option in WHOLE_LOGITS else ["torch", "logits"])
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("option", "backend"), BACKENDS)
def test_every_option(tmp_path: Path, option: str, split: str, backend: str) -> None:
    changes, method = OPTIONS[option]
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(**changes, loss_backend=backend),
        reward_funcs=tiny.parity,
        max_steps=3,
        **SPLITS[split],
    )
    difference = compare(trainer, tiny.model(), sparse(method))
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    assert trainer._forward_mode.fused == (backend == "torch")


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all weights"])
@pytest.mark.parametrize("split", SPLITS)
def test_an_anchor(tmp_path: Path, split: str, adapters: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The reference is the model at the start: of new adapters the model without them."""
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(anchor_weight=0.7, loss_backend="auto", is_clip=None),
        reward_funcs=tiny.parity,
        peft_config=copy.deepcopy(LORA) if adapters else None,
        learning_rate=0.1 if adapters else 0.02,
        max_steps=3,
        **SPLITS[split],
    )
    blank = get_peft_model(tiny.model(), copy.deepcopy(LORA)) if adapters else tiny.model()
    difference = compare(trainer, blank, Method(feedback=False, anchor=0.7, clip=None))
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    assert "anchor_weight=0.7 is computed from whole logits" in caplog.text
    assert "has no effect" not in caplog.text
    logged = [entry["self_distillation/anchor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.0, abs=1e-6)
    assert logged[2] > 1e-3


@pytest.mark.parametrize("start", ["trained before", "PiSSA"])
def test_an_anchor_of_an_adapter_that_is_not_zero(tmp_path: Path, start: str) -> None:
    """The model that training begins with is then another than the one without adapters."""

    def adapted() -> Any:
        method = "pissa" if start == "PiSSA" else False
        settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=method, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(tiny.model(), settings)

    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(anchor_weight=0.7, loss_backend="auto", is_clip=None),
        reward_funcs=tiny.parity,
        start=adapted(),
        learning_rate=0.1,
        max_steps=3,
    )
    first = adapted().eval()
    tokens = torch.arange(2, 10)[None]
    with torch.no_grad(), first.disable_adapter():
        without = first(tokens).logits
    with torch.no_grad():
        assert (first(tokens).logits - without).abs().max() > 1e-3, (
            "the counter-example: the model without it"
        )
    trainer.train()
    logged = [entry["self_distillation/anchor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.0, abs=1e-6)
    assert logged[2] > 1e-6


@pytest.mark.parametrize("option", OPTIONS)
def test_an_ignored_option_is_detected(tmp_path: Path, option: str) -> None:
    _, method = OPTIONS[option]
    trainer = tiny.trainer(tmp_path, max_steps=3, reward_funcs=tiny.parity)
    assert compare(trainer, tiny.model(), sparse(method)).gradient > 1000 * TOLERANCE


# --- planted errors ---------------------------------------------------------------------------------------


def pass_rate_of_pairs_of_groups(patch: pytest.MonkeyPatch) -> None:
    true = demonstrations.pass_rate_weights
    patch.setattr(demonstrations, "pass_rate_weights", lambda success, groups: true(success, groups // 2))


def confidence_over_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    def weigh(found: sdpo.TokenStatistics, kept: Tensor) -> Tensor:
        return sdpo.confidence_weights(found.teacher_entropy, kept, beta=1.0)

    patch.setattr(token_weights, "weights_of_kept", lambda config: weigh)


def confidence_of_the_student(patch: pytest.MonkeyPatch) -> None:
    true = token_weights.weights_of_kept

    def of_the_student(config: Any) -> Any:
        weigh = true(config)
        return lambda found, kept: weigh(found._replace(teacher_entropy=found.student_entropy), kept)

    patch.setattr(token_weights, "weights_of_kept", of_the_student)


ERRORS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (pass_rate_of_pairs_of_groups, "pass rate"),
    (confidence_over_the_micro_batch, "confidence"),
    (confidence_of_the_student, "confidence"),
]


@pytest.mark.parametrize(("plant", "option"), ERRORS, ids=[plant.__name__ for plant, _ in ERRORS])
def test_the_comparison_detects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], option: str
) -> None:
    plant(monkeypatch)
    changes, method = OPTIONS[option]
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(**changes), reward_funcs=tiny.parity, max_steps=2
    )
    assert compare(trainer, tiny.model(), sparse(method)).gradient > 1000 * TOLERANCE


# --- metrics ----------------------------------------------------------------------------------------------


def test_mean_weights_are_logged(tmp_path: Path) -> None:
    config = tiny.config(token_weights="confidence", row_weights="pass_rate")
    trainer = tiny.trainer(
        tmp_path, sdpo_config=config, reward_funcs=tiny.judge, **SPLITS["four micro-batches"]
    )
    recorder = Recorder(trainer)
    trainer.train()
    for step, entry in zip(recorder.steps, trainer.state.log_history, strict=False):
        rows = [row for row in step.rows if reprompt(row, Method()) is not None]
        scale = sum(undecided(row) for row in step.rows) / len(step.rows)
        weighted = sum(undecided(row) / scale * len(row.completion) for row in rows)
        expected = weighted / sum(len(row.completion) for row in rows)
        assert entry["self_distillation/row_weight"] == pytest.approx(expected, rel=1e-5)
        assert entry["self_distillation/token_weight"] == pytest.approx(1.0, rel=1e-5)


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 2])
def test_an_evaluation_counts_all_completion_tokens(tmp_path: Path, rows: int) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_aggregation="batch-token-mean"),
        reward_funcs=tiny.parity,
        eval_dataset=tiny.conversations(4),
        num_generations_eval=2,
        per_device_eval_batch_size=rows,
    )
    recorder = Recorder(trainer)
    result = trainer.evaluate()
    method = sparse(Method(batch_token_mean=True))
    silent = [row for row in recorder.evaluated if reprompt(row, method) is None]
    assert 0 < len(silent) < 8
    loss, _ = ReferenceStep(tiny.model(), method).step(recorder.evaluated, stale=False)
    assert result["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_share_of_grpo_that_changes_is_logged(tmp_path: Path) -> None:
    shares = {}
    for final in (1.0, None):
        run = tiny.trainer(
            tmp_path,
            sdpo_config=tiny.config(grpo_weight=0.5, grpo_weight_final=final),
            max_steps=3,
            logging_steps=1,
        )
        run.train()
        name = "self_distillation/grpo_weight"
        shares[final] = [entry[name] for entry in run.state.log_history if name in entry]
    assert shares == {1.0: [0.5, 0.75, 1.0], None: []}

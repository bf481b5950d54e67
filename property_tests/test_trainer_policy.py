"""GRPO's part of the loss against `GRPOTrainer`, and which rows run for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from reference_step import Recorder

from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import policy as step_policy

TOLERANCE = 1e-5
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "luspo": {},
    "sapo": {"sapo_temperature_neg": 2.0},
    "cispo": {"epsilon_high": 1.02},
    "vespo": {"vespo_k_pos": 1.5},
}
# Several steps of one generation batch: the ratios leave 1.
STALE: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 4,
    "epsilon": 0.02,
    "optim": "sgd",  # AdamW turns rounding of a gradient near 0 into a step
    "learning_rate": 0.1,
}


# As TRL's own batches are: another order of float32 sums grows over the steps of a run.
PADDED: dict[str, Any] = {"packing": "padded"}


def recorded(folder: Path, sdpo_config: Any, **changes: Any) -> tuple[Recorder, list[dict[str, float]]]:
    torch.manual_seed(0)
    trainer = tiny.trainer(folder, sdpo_config=sdpo_config, reward_funcs=tiny.parity, **changes)
    recorder = Recorder(trainer)
    trainer.train()
    return recorder, [entry for entry in trainer.state.log_history if "loss" in entry]


def gap(ours: Recorder, theirs: Recorder) -> float:
    """Of the gradients, relative to the norm over all parameters; the largest of all steps."""
    assert len(ours.steps) == len(theirs.steps)
    largest = 0.0
    for mine, reference in zip(ours.steps, theirs.steps, strict=True):
        assert [row.completion for row in mine.rows] == [row.completion for row in reference.rows]
        pairs = [(mine.gradients[name], g) for name, g in reference.gradients.items()]
        norm = torch.stack([g.norm() for _, g in pairs]).norm()
        assert norm > 0
        largest = max(largest, (torch.stack([(a - b).norm() for a, b in pairs]).norm() / norm).item())
    return largest


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_weight_of_one_is_grpo(tmp_path: Path, loss_type: str, backend: str) -> None:
    changes = {**STALE, "loss_type": loss_type, **LOSS_TYPES[loss_type]}
    ours, logs = recorded(tmp_path, tiny.config(grpo_weight=1.0, loss_backend=backend, **PADDED), **changes)
    theirs, expected = recorded(tmp_path, tiny.config(enabled=False), **changes)
    assert gap(ours, theirs) < TOLERANCE
    for entry, other in zip(logs, expected, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
    if loss_type not in ("sapo", "cispo", "vespo"):
        clipped = [entry["self_distillation/policy_clip_fraction"] for entry in logs]
        assert max(clipped) > 0.1


@pytest.mark.parametrize("backend", ["torch", "logits"])
def test_a_kl_penalty_is_grpo_s(tmp_path: Path, backend: str) -> None:
    # One micro-batch a step: TRL logs the mean over micro-batches of their means.
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    changes = {**STALE, **one, "beta": 0.3}
    ours, logs = recorded(
        tmp_path,
        tiny.config(grpo_weight=1.0, loss_backend=backend, **PADDED),
        peft_config=copy.deepcopy(LORA),
        **changes,
    )
    theirs, expected = recorded(
        tmp_path, tiny.config(enabled=False), peft_config=copy.deepcopy(LORA), **changes
    )
    assert gap(ours, theirs) < TOLERANCE
    assert [entry["self_distillation/policy_kl"] for entry in logs] == pytest.approx(
        [entry["kl"] for entry in expected], rel=1e-4
    )
    assert max(entry["kl"] for entry in expected) > 0.01


SPLITS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}
EVERY: dict[str, Any] = {
    "beta": 0.1,
    "delta": 1.05,
    "importance_sampling_level": "sequence",
    "off_policy_mask_threshold": 1e-3,
    "top_entropy_quantile": 0.47,
    "entropy_coef": 0.2,
    "use_adaptive_entropy": True,
    "entropy_coef_delta": 0.1,
    "entropy_coef_max": 0.35,
    "steps_per_generation": None,  # one step of a generation batch, and a second of its second pass
}


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("loss_type", "target"), [("grpo", 9.0), ("vespo", 1.0)])
def test_every_term_at_once_is_grpo_s(
    tmp_path: Path, loss_type: str, target: float, split: str, backend: str
) -> None:
    """The entropy is below the first target, so that its weight grows, and above the second."""
    changes = {**STALE, **SPLITS[split], **EVERY, "loss_type": loss_type, "entropy_target": target}
    runs = [
        recorded(tmp_path, config, peft_config=copy.deepcopy(LORA), **changes)
        for config in (tiny.config(grpo_weight=1.0, loss_backend=backend), tiny.config(enabled=False))
    ]
    (ours, logs), (theirs, expected) = runs
    assert gap(ours, theirs) < 5 * TOLERANCE  # ratios of whole rows are large
    assert [entry["loss"] for entry in logs] == pytest.approx(
        [entry["loss"] for entry in expected], rel=1e-4, abs=1e-6
    )
    coefs = [entry["entropy_coef"] for entry in expected]
    assert [entry["entropy_coef"] for entry in logs] == coefs
    assert coefs == pytest.approx([0.3, 0.35, 0.35, 0.35] if target == 9.0 else [0.1, 0.0, 0.0, 0.0])


def test_the_controller_of_the_entropy_is_resumed(tmp_path: Path) -> None:
    changes = {
        **STALE,
        **SPLITS["four micro-batches"],
        **{name: value for name, value in EVERY.items() if "entropy" in name or name.startswith("steps")},
        "entropy_target": 9.0,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    config = tiny.config(grpo_weight=0.5)
    _, whole = recorded(tmp_path, config, **changes)
    torch.manual_seed(0)
    trainer = tiny.trainer(tmp_path / "again", sdpo_config=config, reward_funcs=tiny.parity, **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("entropy_coef", "loss", "self_distillation/policy_entropy"):
        assert [entry[name] for entry in resumed] == [entry[name] for entry in whole], name


def test_other_loss_types_are_other_steps(tmp_path: Path) -> None:
    """Equality above would mean little if all had one gradient."""
    config = tiny.config(grpo_weight=1.0)
    runs = {
        loss_type: recorded(tmp_path, config, **{**STALE, "max_steps": 1, "loss_type": loss_type, **options})[
            0
        ]
        for loss_type, options in LOSS_TYPES.items()
        if loss_type
        not in ("sapo", "cispo", "vespo")  # the same gradient as another type where the ratios are 1
    }
    names = list(runs)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert gap(runs[one], runs[other]) > 100 * TOLERANCE, (one, other)


# --- which rows run ---------------------------------------------------------------------------------------


def test_each_model_runs_the_rows_of_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct rows have GRPO's loss, failed ones beside a success the teacher's; groups that agree have none."""
    rows: dict[str, list[int]] = {"student": [], "teacher": []}
    true = step_forward.completion_logits

    def look(model: Any, unwrapped: Any, arguments: Any, *, params: Any = None, **kwargs: Any) -> Any:
        rows["student" if torch.is_grad_enabled() else "teacher"].append(len(arguments["input_ids"]))
        return true(model, unwrapped, arguments, params=params, **kwargs)

    monkeypatch.setattr(step_forward, "completion_logits", look)
    config = tiny.config(routing="srpo", loss_backend="logits", packing="padded")
    recorder, logs = recorded(tmp_path, config, num_generations=2, max_steps=4)
    scores = [[tiny.score(row.text) for row in step.rows] for step in recorder.steps]
    undecided = [
        [a + b == 1 for row in step.rows for a, b in [[tiny.score(p.text) for p in (row, *row.peers)]]]
        for step in recorder.steps
    ]
    failed = [
        sum(one and not score for one, score in zip(*pair, strict=True))
        for pair in zip(undecided, scores, strict=True)
    ]
    assert 0 < sum(failed) < 16
    assert rows["student"] == [sum(each) for each in undecided if any(each)]
    assert rows["teacher"] == [count for count in failed if count]
    assert [entry["self_distillation/distilled_row_fraction"] for entry in logs] == [n / 8 for n in failed]


def test_a_batch_without_a_teacher_signal_still_has_grpo_s_part(tmp_path: Path) -> None:
    """No peer may be shown, and the failures get no feedback."""
    config = tiny.config(grpo_weight=0.5, include_environment_feedback=False, success_reward_threshold=2.0)
    ours, logs = recorded(tmp_path, config, max_steps=2, optim="sgd", loss_type="grpo")
    theirs, _ = recorded(
        tmp_path, tiny.config(enabled=False), max_steps=2, optim="sgd", loss_type="grpo", learning_rate=0.5e-2
    )
    assert [entry["self_distillation/empty_target_batch"] for entry in logs] == [1.0, 1.0]
    halves = [{name: g / 2 for name, g in step.gradients.items()} for step in theirs.steps]
    for mine, half in zip(ours.steps, halves, strict=True):
        torch.testing.assert_close(mine.gradients, half, rtol=1e-4, atol=1e-6)
    assert all((g != 0).any() for g in halves[0].values())


# --- planted errors ---------------------------------------------------------------------------------------


def advantages_of_the_next_row(patch: pytest.MonkeyPatch) -> None:
    true = step_policy.policy_inputs

    def rolled(config: Any, term: Any, inputs: Any, **kwargs: Any) -> Any:
        return true(config, term, {**inputs, "advantages": inputs["advantages"].roll(1)}, **kwargs)

    patch.setattr(step_policy, "policy_inputs", rolled)


def rows_without_a_teacher_are_dropped(patch: pytest.MonkeyPatch) -> None:
    true = step_policy.policy_inputs

    def dropped(config: Any, term: Any, inputs: Any, **kwargs: Any) -> Any:
        found = true(config, term, inputs, **kwargs)
        return found | {"policy_mask": found["policy_mask"] & inputs["loss_mask"]}

    patch.setattr(step_policy, "policy_inputs", dropped)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    true = step_policy.policy_term
    patch.setattr(step_policy, "policy_term", lambda args: replace(true(args), clip_low=1.0, clip_high=9.0))


def a_tenth_more(patch: pytest.MonkeyPatch) -> None:
    true = step_policy.token_weights

    def scaled(term: Any, mask: Any, **kwargs: Any) -> Any:
        return true(term, mask, **kwargs) * 1.1

    patch.setattr(step_policy, "token_weights", scaled)


@pytest.mark.parametrize(
    "plant",
    [advantages_of_the_next_row, rows_without_a_teacher_are_dropped, no_clipping, a_tenth_more],
)
def test_the_comparison_detects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any) -> None:
    theirs, _ = recorded(tmp_path, tiny.config(enabled=False), **STALE)
    plant(monkeypatch)
    # Steps are compared while the rows are the same: their sampling follows the weights.
    ours, _ = recorded(tmp_path, tiny.config(grpo_weight=1.0), **STALE)
    for step in range(len(theirs.steps)):
        if [r.completion for r in ours.steps[step].rows] != [r.completion for r in theirs.steps[step].rows]:
            break
        mine, others = ours.steps[step].gradients, theirs.steps[step].gradients
        if any(not torch.allclose(mine[n], g, rtol=1e-3, atol=1e-4) for n, g in others.items()):
            return
    pytest.fail("the steps are alike")


# --- evaluation -------------------------------------------------------------------------------------------


def test_an_evaluation_has_grpo_s_loss(tmp_path: Path) -> None:
    """TRL's is the mean over batches; at weight 1 the divergence adds nothing."""
    losses = []
    for config in (tiny.config(grpo_weight=1.0), tiny.config(enabled=False)):
        torch.manual_seed(0)
        trainer = tiny.trainer(
            tmp_path,
            sdpo_config=config,
            reward_funcs=tiny.parity,
            eval_dataset=tiny.conversations(4),
            num_generations_eval=2,
            per_device_eval_batch_size=4,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert abs(losses[1]) > 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

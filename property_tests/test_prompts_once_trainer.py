"""How often a step reads a prompt, and what never reads it once."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from reference_step import Method, compare
from test_packing import batch_of
from test_packing_trainer import LORA, fresh_model, logs

from sdpo_rl import SDPOTrainer
from sdpo_rl.step import packing, runner
from sdpo_rl.step.batch import row_bounds


def watch(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that run, with what their calls read."""
    seen: list[dict[str, Any]] = []
    true = packing.model_calls

    def model_calls(batch: Any, layout: Any, *args: Any, **options: Any) -> Any:
        calls = true(batch, layout, *args, **options)
        rows = sum(map(sum, row_bounds(batch.sizes)))
        read = sum(call.ids.numel() for call in calls)
        seen.append({"layout": layout, "rows": rows, "read": read, "batch": batch})
        return calls

    patch.setattr(packing, "model_calls", model_calls)
    return seen


def make(folder: Path, **changes: Any) -> SDPOTrainer:
    config = tiny.config(packing="packed", **changes.pop("config", {}))
    return tiny.trainer(folder, sdpo_config=config, **{"max_steps": 2, **changes})


def test_a_group_s_prompt_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    make(tmp_path).train()
    for step in seen:
        batch = step["batch"]
        width = batch.ids.shape[1] - batch.completion_length
        prompts = {
            tuple(ids[mask.bool()][: n + 1].tolist())
            for ids, mask in zip(batch.ids[:, :width], batch.mask[:, :width], strict=True)
            for n in range(int(mask.sum()))
        }
        assert step["read"] == len(prompts) + sum(completion for _, completion in row_bounds(batch.sizes))
        assert step["read"] < step["rows"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_grpo_s_part_of_the_loss_is_the_same(tmp_path: Path, lora: bool) -> None:
    """Rows without a teacher have the policy's part alone."""
    found = []
    for layout in ("padded", "packed"):
        trainer = tiny.trainer(
            tmp_path,
            sdpo_config=tiny.config(packing=layout, grpo_weight=0.5),
            peft_config=LORA if lora else None,
            num_generations=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=0.02,
            max_steps=3,
        )
        trainer.train()
        found.append((logs(trainer, "loss"), logs(trainer, "grad_norm")))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    assert compare(trainer, fresh_model(False), Method()).gradient < 5e-6


def test_router_losses_average_over_every_row_s_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the student; the teacher has no router loss."""
    seen = watch(monkeypatch)
    trainer = make(tmp_path, start=tiny.experts(), router_aux_loss_coef=0.5)
    trainer.train()
    assert trainer._forward_mode.layout.by_row
    students, teachers = seen[::2], seen[1::2]
    assert all(step["read"] == step["rows"] for step in students)
    assert all(step["read"] < step["rows"] for step in teachers)


@pytest.mark.parametrize(("same", "layout"), [(True, "packed"), (False, "groups")])
def test_rows_of_one_length_are_packed_for_their_prompts(same: bool, layout: str) -> None:
    """Where that saves a tenth; there is no padding to save."""
    prompts = [[7] * 9 if same else [7 + row] * 9 for row in range(4)]
    batch = batch_of([(prompt, [5, 6, 4]) for prompt in prompts])
    model = tiny.model()
    context: Any = SimpleNamespace(
        config=tiny.config(packing="auto"), unwrapped=model, layout="packed", by_row=True, reads_padding=False
    )
    plan = runner._plan(context, runner._Wanted(batch, math.inf, averages=False))
    assert plan.layout == layout
    assert [sorted(rows) for rows in plan.calls] == [[0, 1, 2, 3]]


def test_the_share_of_padding_counts_what_is_read(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    for name in ("student", "teacher"):
        assert logs(trainer, f"self_distillation/{name}_padding_fraction") == [0.0, 0.0]


def test_another_attention_reads_every_prompt(tmp_path: Path) -> None:
    model = tiny.model()
    model.set_attn_implementation("eager")
    trainer = make(tmp_path, start=model)
    trainer.train()
    assert trainer._forward_mode.layout == runner.ChosenLayout(
        "packed", by_row_reason="its attention is 'eager', not 'sdpa'"
    )
    assert torch.isfinite(torch.tensor(logs(trainer, "loss"))).all()

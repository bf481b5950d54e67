"""A run that was interrupted and resumed equals the uninterrupted one bit for bit."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from checkpoint_runs import (
    broad_lora,
    build,
    differences,
    lora,
    one_of_two_adapters,
    outcome,
    prompt_tuned,
    quantized_lora,
    resumed,
    run,
    same,
)
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from strategies import Claim
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

import sdpo_rl
from sdpo_rl import SDPOConfig
from sdpo_rl.resume import checkpoint, progress
from sdpo_rl.step import metrics
from sdpo_rl.teacher import shards
from sdpo_rl.teacher.store import TeacherStore

WHOLE_BATCH = {"steps_per_generation": 2}
HALF_BATCH = {"steps_per_generation": 4}
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "full fine-tuning": (WHOLE_BATCH, [1, 4]),
    "full, in the next epoch": (WHOLE_BATCH, [5]),
    "full, within a generation batch": (HALF_BATCH, [1, 5]),
    "full, two iterations": ({**WHOLE_BATCH, "num_iterations": 2}, [1, 2]),
    "full, a step over two generation batches": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 3},
        [1, 2],
    ),
    "full, a short last step of the epoch": (
        {"steps_per_generation": 4, "gradient_accumulation_steps": 3},
        [3, 4],
    ),
    "full, ticks with the optimizer": ({**HALF_BATCH, "sdpo": {"teacher_tick": "optimizer_step"}}, [3]),
    "full, bfloat16 teacher": ({**HALF_BATCH, "sdpo": {"teacher_dtype": "bfloat16"}}, [3]),
    "full, offloaded teacher": ({**HALF_BATCH, "sdpo": {"teacher_offload": "cpu"}}, [3]),
    "full, trust region": ({**HALF_BATCH, "sdpo": {"teacher_mode": "trust_region"}}, [3]),
    "full, frozen": ({**HALF_BATCH, "sdpo": {"teacher_mode": "frozen"}}, [3]),
    "full, live": ({**HALF_BATCH, "sdpo": {"teacher_mode": "live"}}, [3]),
    "full, evaluated on the way": (
        {
            **HALF_BATCH,
            "eval_dataset": tiny.conversations(2),
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": 4,
        },
        [1, 2],
    ),
    "full, random demonstrations": (
        {**HALF_BATCH, "sdpo": {"demonstration_policy": "random"}},
        [1, 3],
    ),
    "full, GRPO's part on a schedule": (
        {**HALF_BATCH, "sdpo": {"grpo_weight": 0.5, "grpo_weight_final": 0.1}},
        [1, 3],
    ),
    "an anchor": ({**HALF_BATCH, "sdpo": {"anchor_weight": 0.3}}, [3]),
    "LoRA, an anchor": ({**HALF_BATCH, "start": lora, "sdpo": {"anchor_weight": 0.3}}, [3]),
    "full, a stream of two steps a pass": (
        {**WHOLE_BATCH, "train_dataset": tiny.conversations(4).to_iterable_dataset()},
        [1, 2, 3, 5],
    ),
    "full, a stream within a generation batch": (
        {**HALF_BATCH, "train_dataset": tiny.conversations(7).to_iterable_dataset()},
        [3],
    ),
    "full, a stream and a short last step of the pass": (
        {
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 3,
            "train_dataset": tiny.conversations().to_iterable_dataset(),
        },
        [2, 3],
    ),
    "LoRA": ({**WHOLE_BATCH, "start": lora, "sdpo": {"teacher_mode": "lora_ema"}}, [2, 4]),
    "LoRA, within a generation batch": ({**HALF_BATCH, "start": lora}, [1, 5]),
    "LoRA, warm start": ({**HALF_BATCH, "start": lambda: lora(init_lora_weights=False)}, [3]),
    "LoRA, beside another adapter": ({**HALF_BATCH, "start": one_of_two_adapters}, [3]),
    "LoRA, biases and whole modules": ({**HALF_BATCH, "start": broad_lora}, [3]),
    "DoRA": ({**HALF_BATCH, "start": lambda: lora(use_dora=True)}, [3]),
    "prompt tuning": ({**HALF_BATCH, "start": prompt_tuned}, [3]),
    "LoRA, 4-bit base": ({**HALF_BATCH, "start": quantized_lora}, [3]),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # Transformers and PEFT warn when they save a model that is not on the Hub.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    case, steps = CASES[name]
    expected = outcome(run(tmp_path / "whole", **case))
    assert expected["log"][-1]["step"] == 6
    for step in steps:
        trainer = resumed(tmp_path / "whole", tmp_path / str(step), step, **case)
        assert differences(expected, outcome(trainer)) == []


@pytest.mark.parametrize("start", [tiny.model, lora])
@pytest.mark.parametrize("moment", ["on_substep_end", "on_pre_optimizer_step", "reward"])
def test_a_run_that_stops_between_checkpoints_resumes_exactly(
    tmp_path: Path, moment: str, start: Callable[[], nn.Module]
) -> None:
    """During accumulation, before the optimizer step, and while the rollout is scored."""
    case: dict[str, Any] = {"start": start, **HALF_BATCH}
    expected = outcome(run(tmp_path / "whole", **case))
    trainer = build(tmp_path / "cut", **case)

    class Cut(TrainerCallback):
        def stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise InterruptedError

    def reward(completions: list[Any], **kwargs: Any) -> list[Any]:
        if trainer.state.global_step == 4:
            raise InterruptedError
        return tiny.judge(completions)

    if moment == "reward":
        trainer.reward_funcs = [trainer._feedback.wrap(reward)]
    else:
        setattr(Cut, moment, Cut.stop)
        trainer.add_callback(Cut())
    with pytest.raises(InterruptedError):
        trainer.train()
    assert differences(expected, outcome(run(tmp_path / "cut", resume=True, **case))) == []


# --- dtypes -----------------------------------------------------------------------------------------------


def preparing(folder: Path, dtype: torch.dtype | None, **case: Any) -> Any:
    """A trainer that makes trainable parameters another dtype when it prepares the model, before training."""
    trainer = build(folder, **{"max_steps": 3, "save_steps": 2, "optim": "sgd", **case})
    prepare = trainer.accelerator.prepare

    def cast(*args: Any, **kwargs: Any) -> Any:
        for model in args:
            if isinstance(model, nn.Module):
                for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                    parameter.data = parameter.data.to(dtype or parameter.dtype)
        return prepare(*args, **kwargs)

    trainer.accelerator.prepare = cast
    return trainer


CASTS = {  # the dtypes of the model that is given and of the prepared one
    "Accelerate's FSDP2": (torch.bfloat16, torch.float32),
    "DeepSpeed with bf16": (torch.float32, torch.bfloat16),
}
TEACHERS: dict[str, dict[str, Any]] = {
    "ema": {"teacher_mode": "ema"},
    "bfloat16 ema": {"teacher_mode": "ema", "teacher_dtype": "bfloat16"},
    "frozen": {"teacher_mode": "frozen"},
    "offloaded": {"teacher_mode": "frozen", "teacher_offload": "cpu"},
    "trust region": {"teacher_mode": "trust_region"},
    "anchor": {"teacher_mode": "live", "anchor_weight": 0.3},
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("given", "prepared"), CASTS.values(), ids=CASTS)
def test_a_run_whose_parameters_are_cast_when_prepared_resumes(
    tmp_path: Path, given: torch.dtype, prepared: torch.dtype, teacher: str
) -> None:
    case: dict[str, Any] = {"start": lambda: tiny.model().to(given), "sdpo": TEACHERS[teacher]}
    whole = preparing(tmp_path / "whole", prepared, **case)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = preparing(tmp_path / "cut", prepared, **case)
    cut.train(resume_from_checkpoint=True)
    for name, store in whole._stores.items():
        if store.rule in ("frozen", "trust_region"):
            assert {tensor.dtype for tensor in store.state.params.values()} == {prepared}
            assert differences(store.state.params, cut._stores[name].state.params) == []
    if given == torch.float32:  # FSDP2 loads the student after the cast; here it would be rounded
        assert differences(outcome(whole), outcome(cut)) == []


@pytest.mark.parametrize("teacher", [name for name in TEACHERS if "ema" not in name])
def test_a_teacher_of_another_dtype_than_the_prepared_model_is_refused(tmp_path: Path, teacher: str) -> None:
    """To load it would round it without a word."""
    sdpo = TEACHERS[teacher]
    preparing(tmp_path, None, max_steps=2, sdpo=sdpo).train()
    name = "reference" if teacher == "anchor" else "teacher"
    trainer = preparing(tmp_path, torch.bfloat16, sdpo=sdpo)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    message = str(error.value)
    assert f"checkpoint-2: expected this run's sdpo/{name}.safetensors, got another: " in message
    assert "its 'model.embed_tokens.weight' is torch.float32, not torch.bfloat16" in message
    assert "SDPOConfig(teacher_on_resume='restart')" in message
    restarted = preparing(tmp_path, torch.bfloat16, sdpo={**sdpo, "teacher_on_resume": "restart"})
    restarted.train(resume_from_checkpoint=True)
    assert restarted.state.global_step == 3


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["frozen", "ema"])
def test_a_teacher_of_every_dtype_can_be_saved_and_loaded(
    tmp_path: Path, mode: str, dtype: torch.dtype
) -> None:
    model = tiny.model().to(dtype)
    saved, loaded = (TeacherStore(model, tiny.config(teacher_mode=mode), seed=0) for _ in range(2))
    saved.restart(model)
    checkpoint.save_teacher(str(tmp_path), saved, model, writes=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    checkpoint.load_teacher(str(tmp_path), loaded, model)
    assert differences(saved.state.params, loaded.state.params) == []
    assert all(tensor.any() for name, tensor in loaded.state.params.items() if "embed" in name)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    message = rf"embed_tokens.weight' is {dtype}, not {other}"
    if mode == "frozen":
        with pytest.raises(ValueError, match=message):
            checkpoint.load_teacher(str(tmp_path), loaded, model.to(other))


def test_a_float16_run_with_a_frozen_teacher_resumes(tmp_path: Path) -> None:
    case: dict[str, Any] = {"start": lambda: tiny.model().half(), "sdpo": {"teacher_mode": "frozen"}}
    expected = outcome(run(tmp_path / "whole", max_steps=2, **case))
    trainer = resumed(tmp_path / "whole", tmp_path / "cut", 1, max_steps=2, **case)
    assert differences(expected, outcome(trainer)) == []


# --- counter-examples: what happens where something is forgotten ------------------------------------------


def forget(*_: Any, **__: Any) -> int:
    return 0


def nothing(*_: Any, **__: Any) -> None:
    return None


COUNTER_EXAMPLES: dict[str, tuple[Any, str, Any, str, int, str]] = {
    "the teacher": (checkpoint, "load_teacher", forget, "LoRA", 2, "teacher"),
    "the progress": (progress, "load", nothing, "LoRA, within a generation batch", 1, "student"),
    "the epoch": (checkpoint, "epochs_done", forget, "full, in the next epoch", 5, "student"),
    "the position in a stream": (
        checkpoint,
        "stream_position",
        nothing,
        "full, a stream of two steps a pass",
        3,
        "student",
    ),
    "the sums": (metrics.MetricSums, "load_state", forget, "full fine-tuning", 1, "log"),
    "the running loss": (progress, "RUNNING_LOSS", (), "full fine-tuning", 1, "log"),
    "the dtypes": (
        checkpoint,
        "trainable_dtypes_preserved",
        contextlib.nullcontext,
        "LoRA, 4-bit base",
        3,
        "student",
    ),
    "the adapter beside others": (
        checkpoint,
        "load_adapter_among_others",
        forget,
        "LoRA, beside another adapter",
        3,
        "student",
    ),
}


@pytest.mark.parametrize("forgotten", COUNTER_EXAMPLES)
def test_the_comparison_detects_what_is_forgotten(
    tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, counter_example, name, step, noticed = COUNTER_EXAMPLES[forgotten]
    if forgotten == "the adapter beside others" and '"default"' in inspect.getsource(
        transformers.Trainer._load_from_checkpoint
    ):
        pytest.skip("this release of transformers loads the adapter named default itself")
    case, _ = CASES[name]
    expected = outcome(run(tmp_path / "whole", **case))
    monkeypatch.setattr(owner, attribute, counter_example)
    trainer = resumed(tmp_path / "whole", tmp_path / "counter-example", step, **case)
    assert any(difference.startswith(noticed) for difference in differences(expected, outcome(trainer)))


def test_the_comparison_detects_a_forgotten_update_count(tmp_path: Path) -> None:
    case, _ = CASES["full, bfloat16 teacher"]
    expected = outcome(run(tmp_path / "whole", **case))
    path = tmp_path / "whole" / "checkpoint-3" / "sdpo" / "teacher.safetensors"
    checkpoint.write(path, load_file(path), {"sdpo_teacher": json.dumps({"rule": "ema", "ticks": 0})})
    trainer = resumed(tmp_path / "whole", tmp_path / "counter-example", 3, **case)
    assert any(name.startswith("teacher") for name in differences(expected, outcome(trainer)))


# --- refusals ---------------------------------------------------------------------------------------------


def refused(folder: Path, **case: Any) -> str:
    with pytest.raises(ValueError) as error:
        run(folder, resume=True, **case)
    assert "SDPOConfig(teacher_on_resume='restart')" in str(error.value)
    return str(error.value)


def test_a_checkpoint_without_a_teacher_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1, sdpo={"enabled": False})
    assert "checkpoint-1: expected a teacher" in refused(tmp_path)


def test_a_teacher_of_another_rule_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    message = refused(tmp_path, sdpo={"teacher_mode": "frozen"})
    assert "its rule is 'ema', this run's 'frozen'" in message
    message = refused(tmp_path, sdpo={"teacher_mode": "live"})
    assert "it has 'model.embed_tokens.weight', which is not trainable here" in message


def test_a_teacher_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, start=lora, max_steps=1)
    attention = "base_model.model.model.layers.0.self_attn"
    message = refused(tmp_path, start=lambda: lora(target_modules=["q_proj", "k_proj"]))
    assert f"it lacks '{attention}.k_proj.lora_A.default.weight'" in message
    assert f"it has '{attention}.v_proj.lora_A.default.weight', which is not trainable here" in message
    message = refused(tmp_path, start=lambda: lora(r=2))
    assert f"its '{attention}.q_proj.lora_A.default.weight' has shape (4, 32), not (2, 32)" in message
    message = refused(tmp_path, start=lora, sdpo={"teacher_dtype": "bfloat16"})
    assert f"its '{attention}.q_proj.lora_A.default.weight' is torch.float32, not torch.bfloat16" in message


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    assert "; and " in refused(tmp_path, sdpo={"teacher_dtype": "bfloat16"})


def test_lora_ema_has_the_rule_of_ema(tmp_path: Path) -> None:
    run(tmp_path, start=lora, max_steps=1)
    trainer = run(tmp_path, start=lora, max_steps=2, resume=True, sdpo={"teacher_mode": "lora_ema"})
    assert trainer._teacher.state.ticks == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_restart_starts_from_the_loaded_student(tmp_path: Path, enabled: bool) -> None:
    run(tmp_path, max_steps=2, sdpo={"enabled": enabled})
    student = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    again = {"teacher_mode": "frozen", "teacher_on_resume": "restart"}
    trainer = run(tmp_path, max_steps=3, resume=True, sdpo=again)
    assert trainer._teacher.state.ticks == 1
    for name, weight in trainer._teacher.state.params.items():
        assert torch.equal(weight, student[name])


def test_another_schedule_starts_the_generation_batch_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, max_steps=1, **HALF_BATCH)
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        trainer = run(tmp_path, max_steps=3, resume=True, **WHOLE_BATCH)
    assert "steps_per_generation 4 -> 2" in caplog.text
    assert trainer._teacher.state.ticks == 2
    (tmp_path / "checkpoint-3" / "sdpo" / "progress-0.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        run(tmp_path, max_steps=4, resume=True, **WHOLE_BATCH)
    assert "progress-0.safetensors is missing" in caplog.text


def test_damaged_files_of_a_checkpoint_are_named_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The computer failed before the disk had all of a file."""
    run(tmp_path, max_steps=1, **HALF_BATCH)
    folder = tmp_path / "checkpoint-1" / "sdpo"
    whole = (folder / "progress-0.safetensors").read_bytes()
    (folder / "progress-0.safetensors").write_bytes(whole[:100])
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        run(tmp_path, max_steps=2, resume=True, **HALF_BATCH)
    assert re.search(
        r"progress-0.safetensors is damaged \(.*the generation batch and its metrics start", caplog.text
    )
    whole = (tmp_path / "checkpoint-2" / "sdpo" / "teacher.safetensors").read_bytes()
    (tmp_path / "checkpoint-2" / "sdpo" / "teacher.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"teacher.safetensors: expected a whole .*; resume from an earlier"):
        run(tmp_path, max_steps=3, resume=True, **HALF_BATCH)


def test_a_generation_batch_starts_again_on_all_processes_or_on_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Processes that continue would wait for those that generate."""
    state = progress.RunState({"world_size": 2}, 3, True, None, {}, {}, {}, {}, [])
    progress.save(str(tmp_path), state, process=0)
    asked: list[bool] = []
    others = [False, True]

    def any_rank(flag: bool, device: torch.device) -> bool:
        asked.append(flag)
        return flag or others[0]

    monkeypatch.setattr(shards, "any_rank", any_rank)
    load = partial(progress.load, str(tmp_path), schedule={"world_size": 2}, device=torch.device("cpu"))
    assert load(process=0) == state
    assert load(process=1) is None
    others[0] = True
    assert load(process=0) is None
    assert asked == [False, True, False]
    assert "Another process cannot continue" in caplog.messages[-1]


def test_a_longer_run_continues_a_stream_that_ended_within_its_first_pass(tmp_path: Path) -> None:
    stream: dict[str, Any] = {
        "train_dataset": tiny.conversations().to_iterable_dataset(),
        **WHOLE_BATCH,
        "lr_scheduler_type": "constant",
    }
    expected = outcome(run(tmp_path / "whole", max_steps=6, **stream))
    run(tmp_path / "short", max_steps=3, **stream)
    found = outcome(run(tmp_path / "short", max_steps=6, resume=True, **stream))
    for one in (expected, found):  # its epochs count max_steps
        one["log"] = [line["loss"] for line in one["log"] if "loss" in line]
    assert differences(expected, found) == []


# --- the options of the run -------------------------------------------------------------------------------


def test_the_options_are_beside_every_saved_model(tmp_path: Path) -> None:
    trainer = run(
        tmp_path, max_steps=1, sdpo={"alpha": 0.25, "reprompt_template": "{prompt}ü{solution}{feedback}"}
    )
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        saved = json.loads((folder / "sdpo_config.json").read_text())
        assert SDPOConfig(**saved["options"]) == trainer.sdpo_config
        assert saved["sdpo_rl_version"] == sdpo_rl.__version__


def warnings_on_resume(caplog: pytest.LogCaptureFixture, folder: Path, steps: int, **case: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        run(folder, max_steps=steps, resume=True, **case)
    return [text for text in caplog.messages if "option" in text and not text.startswith("max_steps: ")]


def test_options_that_changed_are_named_once_with_both_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, max_steps=1)
    changes = {"alpha": 0.25, "teacher_update_rate": 0.5, "k": 7, "success_reward_threshold": 0.5}
    (message,) = warnings_on_resume(caplog, tmp_path, 2, sdpo=changes)
    assert "checkpoint-1 was saved, SDPO options changed: " in message
    changed = message.partition("changed: ")[2].partition(". The run")[0].split(", ")
    assert changed == [
        "alpha 0.5 -> 0.25",
        "k 20 -> 7",
        "teacher_update_rate 0.3 -> 0.5",
        "success_reward_threshold 1.0 -> 0.5",
    ]
    assert warnings_on_resume(caplog, tmp_path, 3, sdpo=changes) == []
    (message,) = warnings_on_resume(caplog, tmp_path, 4, sdpo={**changes, "enabled": False})
    assert "changed: enabled True -> False." in message


def test_a_checkpoint_of_the_earlier_default_rate_resumes_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rate was that of one update; to pass None keeps that."""
    run(tmp_path, max_steps=1, sdpo={"teacher_rate_samples": None})
    default = SDPOConfig().teacher_rate_samples
    assert warnings_on_resume(caplog, tmp_path, 2, sdpo={"teacher_rate_samples": None}) == []
    (message,) = warnings_on_resume(caplog, tmp_path, 3, sdpo={"teacher_rate_samples": default})
    assert "SDPO options changed: teacher_rate_samples None -> 256. The run continues with the new" in message


def test_options_of_another_version_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that it did not have was at today's default; one that is gone is named."""
    run(tmp_path, max_steps=1, sdpo={"num_demonstrations": 2})
    path = tmp_path / "checkpoint-1" / "sdpo_config.json"
    saved = json.loads(path.read_text())
    saved["sdpo_rl_version"] = "0.0.1"
    saved["options"]["gone"] = 3
    del saved["options"]["num_demonstrations"], saved["options"]["row_weights"]
    path.write_text(json.dumps(saved))
    (message,) = warnings_on_resume(caplog, tmp_path, 2, sdpo={"num_demonstrations": 2})
    assert f"was saved by sdpo_rl 0.0.1 (this is {sdpo_rl.__version__}), SDPO options" in message
    assert "num_demonstrations 1 -> 2, gone 3, which is no option any more. The" in message


def test_a_checkpoint_without_options_resumes_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, max_steps=1)
    (tmp_path / "checkpoint-1" / "sdpo_config.json").unlink()
    (message,) = warnings_on_resume(caplog, tmp_path, 2)
    assert "checkpoint-1 has no sdpo_config.json that can be read" in message
    for steps, damaged in ((3, '{"options": {"al'), (4, '{"alpha": 1.0}'), (5, "[]")):
        folder = tmp_path / f"checkpoint-{steps - 1}"
        (folder / "sdpo_config.json").write_text(damaged)
        (message,) = warnings_on_resume(caplog, tmp_path, steps)
        assert f"{folder.name} has no sdpo_config.json that can be read" in message


def test_a_learning_rate_that_the_checkpoint_replaces_is_named_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def resumed(steps: int, rate: float) -> tuple[list[str], float]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sdpo_rl"):
            trainer = run(
                tmp_path, max_steps=steps, resume=True, learning_rate=rate, lr_scheduler_type="constant"
            )
        used = trainer.optimizer.param_groups[0]["lr"]
        return [message for message in caplog.messages if message.startswith("learning_rate: ")], used

    run(tmp_path, max_steps=1, learning_rate=0.25, lr_scheduler_type="constant")
    assert resumed(2, 0.25) == ([], 0.25)
    (message,), used = resumed(3, 0.125)
    assert used == 0.25
    assert message == (
        "learning_rate: 0.125 is not used, the run continues with 0.25: the Trainer restores the optimizer and its "
        f"schedule from {tmp_path}/checkpoint-2. To train with the new one, delete scheduler.pt there; the "
        "optimizer then begins anew, and so does the schedule, with its warm-up and all of max_steps."
    )
    (tmp_path / "checkpoint-3" / "scheduler.pt").unlink()
    assert resumed(4, 0.125) == ([], 0.125)


@pytest.mark.parametrize(
    ("schedule", "final", "jump"),
    [
        ("constant", None, None),
        ("linear", None, "learning_rate"),
        ("constant", 1.0, "grpo_weight"),
        ("linear", 1.0, "learning_rate, grpo_weight"),
    ],
)
def test_what_jumps_with_another_length_of_the_run_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str, final: float | None, jump: str | None
) -> None:
    changes: dict[str, Any] = {
        "lr_scheduler_type": schedule,
        "save_steps": 1,
        "sdpo": {"grpo_weight": 0.5, "grpo_weight_final": final},
    }
    run(tmp_path, max_steps=2, **changes)
    for steps in (2, 4):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sdpo_rl"):
            run(tmp_path, max_steps=steps, resume=str(tmp_path / "checkpoint-1"), **changes)
        said = [message for message in caplog.messages if message.startswith("max_steps: ")]
        assert said == (
            []
            if steps == 2 or jump is None
            else [
                f"max_steps: 4, was 2 when {tmp_path}/checkpoint-1 was saved. Scheduled over the whole run, these "
                f"jump here and follow the new number of steps: {jump}."
            ]
        )


def test_grpo_has_no_options_to_save_or_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, max_steps=1, sdpo={"enabled": False})
    assert not list(tmp_path.rglob("sdpo_config.json"))
    assert warnings_on_resume(caplog, tmp_path, 2, sdpo={"enabled": False}) == []


# --- contents of the folder ------------------------------------------------------------------------------


def test_a_full_checkpoint_is_a_plain_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2)
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-2"):
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, trainer._unwrapped.get_parameter(name))
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "saved").rglob("*sdpo*")] == ["sdpo_config.json"]


def test_an_adapter_checkpoint_is_a_plain_adapter(tmp_path: Path) -> None:
    trainer = run(tmp_path, start=lora, max_steps=2)
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-2"):
        loaded = PeftModel.from_pretrained(tiny.model(), folder)
        assert list(loaded.peft_config) == ["default"]
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, trainer._unwrapped.get_parameter(name))
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert [path.name for path in (tmp_path / "saved").rglob("*sdpo*")] == ["sdpo_config.json"]


def test_the_teacher_file_is_a_state_dict(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2)
    folder = tmp_path / "checkpoint-2" / "sdpo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "progress-0.safetensors",
        "teacher.safetensors",
    ]
    teacher = tiny.model(seed=1)
    assert (
        teacher.load_state_dict(load_file(folder / "teacher.safetensors"), strict=False).unexpected_keys == []
    )
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, trainer._teacher.state.params[name])


def test_a_used_up_generation_batch_is_not_saved(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2, logging_steps=1, **HALF_BATCH)
    kept = []
    for step in (1, 2):
        with safe_open(tmp_path / f"checkpoint-{step}" / "sdpo" / "progress-0.safetensors", "pt") as file:
            kept.append({name.split("/")[-1] for name in file.keys()})  # noqa: SIM118 - no mapping
    assert {"completion_ids", "teacher_prompt_ids", "row_mask"} <= kept[0]
    assert kept[1] == set()


def property_packing_is_exact_and_stores_small_integers(
    pack: Any, rows: list[int], scale: int, dtype: torch.dtype
) -> None:
    values = torch.tensor([value >> max(62 - scale, 0) for value in rows]).to(dtype)
    batch = {"ids": values, "scalar": values[0], "view": values.expand(2, -1), "none": None, "width": 3}
    written, tensors = pack([batch, batch])
    restored = progress._unpack(json.loads(json.dumps(written)), tensors)
    for back in restored:
        assert back.keys() == batch.keys()
        for key, value in batch.items():
            assert same(value, back[key]) if isinstance(value, Tensor) else value == back[key]
    if not dtype.is_floating_point and int(values.min()) >= 0 and int(values.max()) < 256:
        assert tensors["0/ids"].element_size() == 1
    addresses = [t.untyped_storage().data_ptr() for t in tensors.values()]
    assert len(set(addresses)) == len(addresses)


def packed_as(convert: Callable[[Tensor], Tensor]) -> Any:
    def pack(batches: Any) -> Any:
        written, tensors = progress._pack(batches)
        return written, {name: convert(tensor) for name, tensor in tensors.items()}

    return pack


PACKING = [
    Claim(
        property_packing_is_exact_and_stores_small_integers,
        progress._pack,
        packed_as(wrong),
        {
            "rows": st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=6),
            "scale": st.sampled_from([0, 7, 15, 31, 63]),
            "dtype": st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool]),
        },
    )
    for wrong in (Tensor.half, Tensor.long)
]


def test_packing_a_batch_is_exact_and_stores_small_integers() -> None:
    PACKING[0].holds()


@pytest.mark.parametrize("claim", PACKING, ids=["rounded", "wide"])
def test_another_packing_is_rejected(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_a_batch_that_cannot_be_saved_is_warned_about_and_sampled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path, max_steps=2, **HALF_BATCH)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: {
        **generate(inputs),
        "extra": [object()] * len(inputs),
    }
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        trainer.train()
    assert "'extra' of the generation batch is a list" in caplog.text
    assert resumed(tmp_path, tmp_path / "again", 1, max_steps=2, **HALF_BATCH).state.global_step == 2

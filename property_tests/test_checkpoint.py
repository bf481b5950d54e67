"""A run that was interrupted and resumed is the run that was not: to the last bit, wherever it stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from strategies import Claim
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from sdpo_rl import checkpoint, metrics, progress

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CLOCKS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"} | {
    f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
}


# --- runs -------------------------------------------------------------------------------------------------


def lora(base: nn.Module | None = None, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(base or tiny.model(), LoraConfig(**{**LORA, **changes}))


def broad_lora() -> nn.Module:
    untied = tiny.model(tie_word_embeddings=False)
    return lora(untied, bias="lora_only", modules_to_save=["lm_head", "embed_tokens"])


def one_of_two_adapters() -> nn.Module:
    model = lora(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(**LORA))
    return model


def prompt_tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def quantized_lora() -> nn.Module:
    """An adapter over a 4-bit base that every run quantizes anew from the same numbers."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    return lora(base)


def build(
    folder: Path, start: Callable[[], nn.Module] = tiny.model, sdpo: dict | None = None, **changes: Any
) -> Any:
    """Two micro-batches an optimizer step, four steps an epoch, a line in the log every third."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
    }
    config = tiny.config(loss_backend="logits", **(sdpo or {}))
    return tiny.trainer(folder, start=start(), sdpo_config=config, **{**settings, **changes})


def run(folder: Path, resume: Any = None, **case: Any) -> Any:
    trainer = build(folder, **case)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """Everything that a run leaves behind, flat, without what a clock said."""
    result: dict[str, Any] = {
        f"student {name}": p.detach().clone() for name, p in trainer._unwrapped.named_parameters()
    }
    result |= {f"teacher {name}": t for name, t in trainer._teacher.state.params.items()}
    result["ticks"] = trainer._teacher.state.ticks
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        result |= {f"optimizer {index} {slot}": value for slot, value in slots.items()}
    result["scheduler"] = trainer.lr_scheduler.state_dict()
    result["log"] = [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in trainer.state.log_history
    ]
    result["diagnostics"] = trainer._diagnostics.state()
    result["next random numbers"] = (torch.get_rng_state(), random.getstate())
    return result


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not same(one[name], other[name])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def resumed(source: Path, folder: Path, step: int, **case: Any) -> Any:
    """A run that finds nothing but `checkpoint-step` of the run in `source`."""
    name = f"checkpoint-{step}"
    shutil.copytree(source / name, folder / name)
    return run(folder, resume=True, **case)


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
    # What transformers and PEFT say when they save a tiny model that has no home on the Hub.
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
def test_stopping_between_checkpoints_loses_nothing(
    tmp_path: Path, moment: str, start: Callable[[], nn.Module]
) -> None:
    """In the middle of an accumulation, before the optimizer's step, and while the rollout is being scored."""
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


# --- twins: what happens where something is forgotten -----------------------------------------------------


def forget(*_: Any, **__: Any) -> int:
    return 0


TWINS: dict[str, tuple[Any, str, Any, str, int, str]] = {
    "the teacher": (checkpoint, "load_teacher", forget, "LoRA", 2, "teacher"),
    "the progress": (progress, "load", forget, "LoRA, within a generation batch", 1, "student"),
    "the epoch": (checkpoint, "epochs_done", forget, "full, in the next epoch", 5, "student"),
    "the sums": (metrics.MetricSums, "load_state", forget, "full fine-tuning", 1, "log"),
    "the running loss": (progress, "_LOSS", (), "full fine-tuning", 1, "log"),
    "the dtypes": (
        checkpoint,
        "dtypes_kept",
        contextlib.nullcontext,
        "LoRA, 4-bit base",
        3,
        "student",
    ),
    "the adapter beside others": (
        checkpoint,
        "load_adapter_beside_others",
        forget,
        "LoRA, beside another adapter",
        3,
        "student",
    ),
}


@pytest.mark.parametrize("forgotten", TWINS)
def test_the_comparison_notices_what_is_forgotten(
    tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, attribute, twin, name, step, noticed = TWINS[forgotten]
    case, _ = CASES[name]
    expected = outcome(run(tmp_path / "whole", **case))
    monkeypatch.setattr(owner, attribute, twin)
    trainer = resumed(tmp_path / "whole", tmp_path / "twin", step, **case)
    assert any(difference.startswith(noticed) for difference in differences(expected, outcome(trainer)))


def test_the_comparison_notices_a_forgotten_tick(tmp_path: Path) -> None:
    case, _ = CASES["full, bfloat16 teacher"]
    expected = outcome(run(tmp_path / "whole", **case))
    path = tmp_path / "whole" / "checkpoint-3" / "sdpo" / "teacher.safetensors"
    checkpoint.write(path, load_file(path), {"sdpo_teacher": json.dumps({"rule": "ema", "ticks": 0})})
    trainer = resumed(tmp_path / "whole", tmp_path / "twin", 3, **case)
    assert any(name.startswith("teacher") for name in differences(expected, outcome(trainer)))


# --- refusals ---------------------------------------------------------------------------------------------


def refused(folder: Path, **case: Any) -> str:
    with pytest.raises(ValueError) as error:
        run(folder, resume=True, **case)
    assert "SDPOConfig(teacher_on_resume='restart')" in str(error.value)
    return str(error.value)


def test_a_checkpoint_without_a_teacher_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1, sdpo={"enabled": False})
    assert "checkpoint-1 holds no teacher" in refused(tmp_path)


def test_a_teacher_of_another_rule_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    message = refused(tmp_path, sdpo={"teacher_mode": "frozen"})
    assert "its rule is 'ema', this run's 'frozen'" in message
    message = refused(tmp_path, sdpo={"teacher_mode": "live"})
    assert "it has 'model.embed_tokens.weight', which does not train here" in message


def test_a_teacher_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, start=lora, max_steps=1)
    attention = "base_model.model.model.layers.0.self_attn"
    message = refused(tmp_path, start=lambda: lora(target_modules=["q_proj", "k_proj"]))
    assert f"it lacks '{attention}.k_proj.lora_A.default.weight'" in message
    assert f"it has '{attention}.v_proj.lora_A.default.weight', which does not train here" in message
    message = refused(tmp_path, start=lambda: lora(r=2))
    assert f"its '{attention}.q_proj.lora_A.default.weight' has shape (4, 32), not (2, 32)" in message
    message = refused(tmp_path, start=lora, sdpo={"teacher_dtype": "bfloat16"})
    assert f"its '{attention}.q_proj.lora_A.default.weight' is torch.float32, not torch.bfloat16" in message


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    assert "; and " in refused(tmp_path, sdpo={"teacher_dtype": "bfloat16"})


def test_lora_ema_is_no_other_rule_than_ema(tmp_path: Path) -> None:
    run(tmp_path, start=lora, max_steps=1)
    trainer = run(tmp_path, start=lora, max_steps=2, resume=True, sdpo={"teacher_mode": "lora_ema"})
    assert trainer._teacher.state.ticks == 2


@pytest.mark.parametrize("enabled", [True, False])
def test_restart_begins_from_the_student_that_was_loaded(tmp_path: Path, enabled: bool) -> None:
    run(tmp_path, max_steps=2, sdpo={"enabled": enabled})
    student = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    again = {"teacher_mode": "frozen", "teacher_on_resume": "restart"}
    trainer = run(tmp_path, max_steps=3, resume=True, sdpo=again)
    assert trainer._teacher.state.ticks == 1
    for name, weight in trainer._teacher.state.params.items():
        assert torch.equal(weight, student[name])


def test_another_schedule_begins_the_generation_batch_anew(
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


# --- what lies in the folder ------------------------------------------------------------------------------


def test_a_full_checkpoint_is_a_plain_model(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=2)
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-2"):
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, trainer._unwrapped.get_parameter(name))
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not list((tmp_path / "saved").rglob("*sdpo*"))


def test_an_adapter_checkpoint_is_a_plain_adapter(tmp_path: Path) -> None:
    trainer = run(tmp_path, start=lora, max_steps=2)
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-2"):
        loaded = PeftModel.from_pretrained(tiny.model(), folder)
        assert list(loaded.peft_config) == ["default"]
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, trainer._unwrapped.get_parameter(name))
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert not list((tmp_path / "saved").rglob("*sdpo*"))


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


def test_a_used_up_generation_batch_is_not_kept(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2, logging_steps=1, **HALF_BATCH)
    kept = []
    for step in (1, 2):
        with safe_open(tmp_path / f"checkpoint-{step}" / "sdpo" / "progress-0.safetensors", "pt") as file:
            kept.append({name.split("/")[-1] for name in file.keys()})  # noqa: SIM118 - no mapping
    assert {"completion_ids", "teacher_prompt_ids", "row_mask"} <= kept[0]
    assert kept[1] == set()


def property_packing_is_exact_and_integers_get_small(
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


def packed_as(kept: Callable[[Tensor], Tensor]) -> Any:
    def pack(batches: Any) -> Any:
        written, tensors = progress._pack(batches)
        return written, {name: kept(tensor) for name, tensor in tensors.items()}

    return pack


PACKING = [
    Claim(
        property_packing_is_exact_and_integers_get_small,
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


def test_packing_a_batch_is_exact_and_integers_get_small() -> None:
    PACKING[0].holds()


@pytest.mark.parametrize("claim", PACKING, ids=["rounded", "wide"])
def test_another_packing_is_rejected(claim: Claim) -> None:
    claim.rejects_wrong_twin()


def test_what_cannot_be_kept_is_said_and_sampled_again(
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


# --- incomplete folders -----------------------------------------------------------------------------------


def property_a_trainer_state_cut_anywhere_is_incomplete(
    is_complete: Callable[[Path], bool], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "trainer_state.json"
        TrainerState().save_to_json(str(path))
        whole = path.read_text().rstrip()
        assert is_complete(folder)
        path.write_text(whole[: min(cut, len(whole) - 1)])
        assert not is_complete(folder)


CUT = Claim(
    property_a_trainer_state_cut_anywhere_is_incomplete,
    checkpoint.is_complete,
    lambda folder: (folder / "trainer_state.json").is_file(),
    {"cut": st.integers(0, 400)},
)


def test_a_trainer_state_cut_anywhere_is_incomplete() -> None:
    CUT.holds()
    CUT.rejects_wrong_twin()


def test_the_newest_complete_folder_is_chosen(tmp_path: Path) -> None:
    for number, text in (("9", "{}"), ("10", "{}"), ("11", "{"), ("x", "{}")):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-12").mkdir()
    assert checkpoint.resolve(True, tmp_path) == str(tmp_path / "checkpoint-10")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")
    for choice in (None, False, str(tmp_path / "checkpoint-9")):
        assert checkpoint.resolve(choice, tmp_path) == choice
    with pytest.raises(
        ValueError, match=r"checkpoint-11 is incomplete.*The last complete one .*checkpoint-10"
    ):
        checkpoint.resolve(tmp_path / "checkpoint-11", tmp_path)
    with pytest.raises(
        ValueError, match=r"checkpoint-7' is no folder; .*the last complete one.*checkpoint-10"
    ):
        checkpoint.resolve(tmp_path / "checkpoint-7", tmp_path)
    with pytest.raises(ValueError, match=r"/checkpoint-1' is no folder; .*elsewhere holds no"):
        checkpoint.resolve(str(tmp_path / "checkpoint-1"), tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete"):
        checkpoint.resolve(True, tmp_path)


def die_writing(path: Path) -> None:
    """As much of a file as a killed process leaves."""
    Path(path).write_bytes(b"half of")
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner: Any, name: str, at: Callable[..., Path | None]) -> None:
    """The function dies in place of writing the file that `at` sees in its arguments."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        path = at(*args, **kwargs)
        return original(*args, **kwargs) if path is None else die_writing(path)

    setattr(owner, name, patched)


def arm(trainer: Any, moment: str, step: int) -> None:
    """Kill the process at one moment of the save of `step`."""

    def when(chosen: bool, path: Any) -> Path | None:
        return Path(path) if chosen and trainer.state.global_step == step else None

    if moment == "model":
        kill_in(trainer.model, "save_pretrained", lambda to, **_: when(True, f"{to}/model.safetensors"))
    elif moment == "optimizer":
        kill_in(torch, "save", lambda value, to: when("optimizer" in str(to), to))
    elif moment == "state":
        kill_in(TrainerState, "save_to_json", lambda state, to: when(True, to))
    else:
        kill_in(checkpoint, "save_file", lambda tensors, to, about: when(moment in str(to), to))


MOMENTS = ("teacher", "model", "optimizer", "progress", "state")
KILLED: dict[str, Any] = {"steps_per_generation": 4, "max_steps": 4, "save_total_limit": 1}


def be_killed(folder: str) -> None:
    """In a process of its own: for every moment one child that is killed there, while it saves its third step."""
    for moment in MOMENTS:
        child = os.fork()
        if not child:
            trainer = build(Path(folder) / moment, **KILLED)
            arm(trainer, moment, step=3)
            trainer.train()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent / "adapters")))
    subprocess.run(
        [sys.executable, "-c", f"import test_checkpoint; test_checkpoint.be_killed({str(folder)!r})"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(run(tmp_path_factory.mktemp("unkilled"), **KILLED))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(
    killed: Path, unkilled: dict[str, Any], moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = killed / moment
    trap = get_last_checkpoint(str(folder))
    assert trap == str(folder / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3 is incomplete.*The last complete one .*checkpoint-2"):
        run(folder, resume=trap, **KILLED)
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        trainer = run(folder, resume=True, **KILLED)
    assert f"Skipping {trap}" in caplog.text
    assert differences(unkilled, outcome(trainer)) == []
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_folder_that_is_written_again_is_incomplete_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_steps=2)
    trainer = build(tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not checkpoint.is_complete(tmp_path / "checkpoint-2")
    assert checkpoint.resolve(True, tmp_path) == str(tmp_path / "checkpoint-1")

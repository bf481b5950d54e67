"""A checkpoint of a killed process is incomplete: it is refused by name, and skipped with `True`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import build, differences, outcome, run
from hypothesis import strategies as st
from strategies import Claim
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from sdpo_rl.resume import checkpoint


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
    CUT.rejects_counter_example()


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
        ValueError, match=r"checkpoint-11 is incomplete.*use .*checkpoint-10, the last complete one"
    ):
        checkpoint.resolve(tmp_path / "checkpoint-11", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"expected a folder, got .*checkpoint-7'; use .*checkpoint-10, the last complete one",
    ):
        checkpoint.resolve(tmp_path / "checkpoint-7", tmp_path)
    with pytest.raises(ValueError, match=r"got .*/checkpoint-1'; .*elsewhere has no complete checkpoint"):
        checkpoint.resolve(str(tmp_path / "checkpoint-1"), tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=r"expected a complete checkpoint in .*, got none"):
        checkpoint.resolve(True, tmp_path)


def die_writing(path: Path) -> None:
    """Write a part of a file and kill the process."""
    Path(path).write_bytes(b"half of")
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner: Any, name: str, at: Callable[..., Path | None]) -> None:
    """Kill the process instead of calling a function, if `at` returns the file that it would write."""
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
    """In a separate process: for every moment a child that is killed at it, while it saves its third step."""
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
        [sys.executable, "-c", f"from test_checkpoint_killed import be_killed; be_killed({str(folder)!r})"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcome(run(tmp_path_factory.mktemp("uninterrupted"), **KILLED))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(
    killed: Path, uninterrupted: dict[str, Any], moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = killed / moment
    trap = get_last_checkpoint(str(folder))
    assert trap == str(folder / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"checkpoint-3 is incomplete.*use .*checkpoint-2, the last complete one"
    ):
        run(folder, resume=trap, **KILLED)
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        trainer = run(folder, resume=True, **KILLED)
    assert f"Skipping {trap}" in caplog.text
    assert differences(uninterrupted, outcome(trainer)) == []
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_folder_is_incomplete_while_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_steps=2)
    trainer = build(tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not checkpoint.is_complete(tmp_path / "checkpoint-2")
    assert checkpoint.resolve(True, tmp_path) == str(tmp_path / "checkpoint-1")

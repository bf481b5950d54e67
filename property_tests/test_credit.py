"""The rows and the log that a run writes for its report: right, bounded, once, and nothing where it is off."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import oracles
import pytest
import tiny
import torch
from checkpoint_runs import CLOCKS
from hypothesis import strategies as st
from strategies import Claim, name_of
from transformers import TrainerCallback

import sdpo_rl.trainer as trainer_module
from sdpo_rl.compat import trackers
from sdpo_rl.credit import files, recorder
from sdpo_rl.credit.selection import Candidate, choose
from sdpo_rl.credit.tokens import LogitSettings, token_text, token_texts
from sdpo_rl.step import micro_batch
from sdpo_rl.step.head import HeadTransform

TEMPERATURE = 0.8


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return files.read(folder / files.CREDIT)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return files.read(folder / files.LOG)


class Weights(TrainerCallback):
    """Both models before each step, in float64."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.student: dict[int, Any] = {}
        self.teacher: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step + 1
        own = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        for kept, params in (
            (self.student, own),
            (self.teacher, {**own, **self.trainer._teacher.state.params}),
        ):
            kept[step] = tiny.model()
            kept[step].load_state_dict(params, strict=False)
            kept[step].double()


def log_probs(model: Any, prompt: str, ids: list[int]) -> list[list[float]]:
    before = tiny.tokenizer()(prompt, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + ids])).logits[0, len(before) - 1 : -1] / TEMPERATURE
    return [oracles.log_softmax(position) for position in logits.tolist()]


def check_row(row: dict[str, Any], student: Any, teacher: Any) -> None:
    """All numbers of a row against the definitions, from its texts and ids alone."""
    log_p = log_probs(student, row["prompt"], row["ids"])
    log_q = log_probs(teacher, row["teacher_prompt"], row["ids"])
    assert row["tokens"] == [tiny.VOCABULARY[i] for i in row["ids"]]
    for t, token in enumerate(row["ids"]):
        assert row["log_prob"][t] == pytest.approx(log_p[t][token], abs=1e-4)
        assert row["log_ratio"][t] == pytest.approx(log_q[t][token] - log_p[t][token], abs=1e-4)
        assert row["token_divergence"][t] == pytest.approx(oracles.jsd(log_p[t], log_q[t], 0.5), abs=1e-4)
        for top, log in ((row["student_top"][t], log_p[t]), (row["teacher_top"][t], log_q[t])):
            likeliest = sorted(map(float, torch.tensor(log).exp()), reverse=True)[: recorder.LIKELIEST]
            assert [p for _, p in top] == pytest.approx(likeliest, abs=2e-5)
            assert [p for _, p in top] == pytest.approx(
                [2.718281828459045 ** log[i] for i, _ in top], abs=2e-5
            )
            assert all(row["texts"][str(i)] == tiny.VOCABULARY[i] for i, _ in top)
    mean = sum(row["token_divergence"]) / len(row["ids"])
    assert row["divergence"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torch", {}),
        ("logits", {}),
        ("torch", {"grpo_weight": 0.5}),
        ("torch", {"teacher_mode": "frozen"}),
    ],
)
def test_rows_are_what_both_models_say(tmp_path: Path, backend: str, options: dict[str, Any]) -> None:
    weights = Weights()
    config = tiny.config(credit_rows=4, support="full", k=100, loss_backend=backend, **options)
    weights.trainer = tiny.trainer(
        tmp_path, sdpo_config=config, max_steps=3, temperature=TEMPERATURE, callbacks=[weights]
    )
    weights.trainer.train()
    rows = rows_of(tmp_path)
    assert {row["step"] for row in rows} == {1, 2, 3}
    checked = [row for row in rows if row["divergence"] is not None]
    assert len(checked) > 5
    for row in checked:
        student, teacher = weights.student[row["step"]], weights.teacher[row["step"]]
        check_row(row, student, teacher)
        with pytest.raises(AssertionError):  # the counter-example: the two models exchanged
            check_row(row, teacher, student) if row["step"] > 1 else check_row(
                {**row, "prompt": row["teacher_prompt"], "teacher_prompt": row["prompt"]}, student, teacher
            )


def test_rows_have_the_texts_of_their_rollout(tmp_path: Path) -> None:
    config = tiny.config(credit_rows=8, environment_feedback_only_without_solution=False)
    tiny.trainer(tmp_path, sdpo_config=config, max_steps=3).train()
    rows = rows_of(tmp_path)
    completions = {}
    for row in rows:
        # What reward functions read: without special tokens.
        text = "".join(token for token in row["tokens"] if len(token) == 1)
        assert row["score"] == tiny.score(text)
        assert row["success"] == (row["score"] >= 1.0)
        assert row["feedback"] == (tiny.remark(text) or None)
        completions[row["step"], row["row"]] = text
    shown = [(row, each) for row in rows for each in row["demonstrations"]]
    assert shown
    for row, each in shown:
        assert each["row"] // tiny.GROUP == row["row"] // tiny.GROUP
        assert each["row"] != row["row"]
        assert tiny.score(each["text"]) == 1.0
        assert each["text"] in row["teacher_prompt"]
        # All eight rows of a step are kept, so the demonstration is one of them.
        assert each["text"] == completions.get((row["step"], each["row"]), each["text"])
    silent = [row for row in rows if row["divergence"] is None]
    assert all(not row["demonstrations"] and row["feedback"] is None for row in silent)


def test_long_completions_and_texts_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST_TOKENS", 3)
    monkeypatch.setattr(recorder, "MOST_CHARACTERS", 10)
    tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=8)).train()
    rows = rows_of(tmp_path)
    assert any(row["tokens_left_out"] for row in rows)
    for row in rows:
        assert len(row["ids"]) == len(row["tokens"]) <= 3
        if row["divergence"] is not None:
            assert len(row["log_ratio"]) == len(row["teacher_top"]) == len(row["ids"])
            assert "characters left out" in row["teacher_prompt"]


# --- off, and which steps ---------------------------------------------------------------------------------


def numbers(trainer: Any) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in entry.items() if name not in CLOCKS}
        for entry in trainer.state.log_history
    ]


def test_off_is_free_and_on_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = tiny.trainer(tmp_path / "on", sdpo_config=tiny.config(credit_rows=3))
    on.train()
    assert (tmp_path / "on" / files.CREDIT).is_file()

    def refuse(*_: Any) -> None:
        raise AssertionError("computed although nobody asked")

    for name in ("likeliest_tokens", "token_texts", "choose"):
        monkeypatch.setattr(recorder, name, refuse)
    monkeypatch.setattr(micro_batch, "Observation", refuse)
    off = tiny.trainer(tmp_path / "off", sdpo_config=tiny.config(credit_rows=0))
    off.train()
    assert not (tmp_path / "off" / files.CREDIT).exists()
    assert off._records.recorder is None
    assert numbers(on) == numbers(off)
    with pytest.raises(AssertionError, match="nobody asked"):
        tiny.trainer(tmp_path / "again", sdpo_config=tiny.config(credit_rows=3)).train()


class CountedReads(torch.Tensor):
    """A tensor that counts how often its numbers are read one at a time, each of which waits for a device."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.reads += func is torch.Tensor.item
        return super().__torch_function__(func, types, args, kwargs or {})


def test_rows_without_a_signal_are_read_at_once(tmp_path: Path) -> None:
    settings = LogitSettings(HeadTransform(1.0, None), 1.0, 0.5)
    one = recorder.Recorder(tmp_path / files.CREDIT, tiny.config(credit_rows=2), str, settings)
    one.load_state([{"success": row % 2 == 0, "row": row} for row in range(6)])
    ones = torch.ones(6, 3, dtype=torch.long).as_subclass(CountedReads)
    inputs = {"rollout_row": torch.arange(6)[:, None].as_subclass(CountedReads), "loss_mask": ones == 0}
    inputs |= dict.fromkeys(("completion_mask", "completion_ids", "prompt_ids", "prompt_mask"), ones)
    state = SimpleNamespace(global_step=0, logging_steps=1)
    assert one.observer(SimpleNamespace(logging_first_step=False), state, inputs) is not None
    assert CountedReads.reads == 0
    assert [row["row"] for row in one.write(1)] == [0]
    inputs["rollout_row"][0].item()
    assert CountedReads.reads == 1


@pytest.mark.parametrize("first", [False, True])
def test_only_steps_that_are_logged_have_rows(tmp_path: Path, first: bool) -> None:
    config = tiny.config(credit_rows=2)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    tiny.trainer(
        tmp_path, sdpo_config=config, max_steps=5, logging_steps=2, logging_first_step=first, **split
    ).train()
    rows = rows_of(tmp_path)
    assert sorted({row["step"] for row in rows}) == ([1, 2, 4] if first else [2, 4])
    # Of both micro-batches of a step together, not of each.
    assert all(sum(row["step"] == step for row in rows) <= 2 for step in (1, 2, 4))


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_run_that_is_not_logged_by_steps_is_refused(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(
        ValueError, match=f"credit_rows: expected 0 with logging_strategy='{strategy}', got 2"
    ):
        tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2), logging_strategy=strategy)


def test_bad_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="credit_rows"):
        tiny.config(credit_rows=-1)
    with pytest.raises(TypeError, match="credit_rows"):
        tiny.config(credit_rows=1.5)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2))
    made = partial(recorder.make_recorder, trainer.sdpo_config, trainer.args, trainer.processing_class, None)
    assert made(writes=False) is None
    assert made(writes=True) is not None
    for writes in (False, True):
        log = files.RunLog(tmp_path / "log", writes=writes)
        log.begin(0, options={}, history=[])
        log.add(1, {"reward": 1.0}, {})
        assert (tmp_path / "log" / files.LOG).exists() == writes


# --- the choice -------------------------------------------------------------------------------------------

Rows = list[tuple[float | None, bool]]
some_rows = st.lists(st.tuples(st.none() | st.floats(0, 1), st.booleans()), min_size=1, max_size=8)


def candidates(rows: Rows) -> list[Candidate]:
    return [Candidate(i, divergence, success, {}) for i, (divergence, success) in enumerate(rows)]


def property_parts_of_a_step_choose_what_the_whole_does(
    chosen: Callable[..., Any], rows: Rows, cut: int, count: int
) -> None:
    everything = candidates(rows)
    kept = chosen(everything[:cut], count)
    kept = chosen([*kept, *everything[cut:]], count)
    assert [row.order for row in kept] == [row.order for row in choose(everything, count)]


def property_the_promised_rows_are_among_them(chosen: Callable[..., Any], rows: Rows, count: int) -> None:
    everything = candidates(rows)
    kept = chosen(everything, count)
    assert len(kept) <= count
    assert len({row.order for row in kept}) == len(kept)
    divergences = [row.divergence for row in everything if row.divergence is not None]
    if divergences:
        assert max(divergences) in [row.divergence for row in kept]
    if count >= 2 and len(divergences) < len(everything):
        assert [row.divergence for row in kept].count(None) == 1
    if count >= 3 and any(row.success and row.divergence is not None for row in everything):
        assert any(row.success and row.divergence is not None for row in kept)


def each_part_alone(rows: list[Candidate], count: int) -> list[Candidate]:
    return [*rows[: count // 2], *choose(rows[count // 2 :], count - count // 2)]


CHOICES = [
    Claim(
        property_parts_of_a_step_choose_what_the_whole_does,
        choose,
        each_part_alone,
        {"rows": some_rows, "cut": st.integers(0, 8), "count": st.integers(1, 5)},
    ),
    Claim(
        property_the_promised_rows_are_among_them,
        choose,
        lambda rows, count: rows[:count],
        {"rows": some_rows, "count": st.integers(1, 5)},
    ),
]


# --- the file ---------------------------------------------------------------------------------------------

LIMIT = 2000
appended = st.lists(st.lists(st.integers(0, 900), min_size=1, max_size=3), min_size=1, max_size=12)


def property_the_file_has_a_bound(write: Callable[..., None], sizes: list[list[int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for step, texts in enumerate(sizes, 1):
            entries = [{"step": step, "text": "x" * size} for size in texts]
            write(path, entries)
            assert path.stat().st_size <= LIMIT
            kept = files.read(path)
            assert [entry["step"] for entry in kept] == sorted(entry["step"] for entry in kept)
            if sum(map(len, map(files._line, entries))) <= LIMIT:  # the newest step is always there
                assert [entry for entry in kept if entry["step"] == step] == entries


def no_room_left(path: Path, entries: list[dict[str, Any]]) -> None:
    """Stops at the bound instead of leaving out earlier steps."""
    size = path.stat().st_size if path.exists() else 0
    if size + sum(map(len, map(files._line, entries))) <= LIMIT:
        files.append(path, entries)
    else:
        path.touch()


FILES = [
    Claim(
        property_the_file_has_a_bound, partial(files.append_bounded, limit=LIMIT), wrong, {"sizes": appended}
    )
    for wrong in (files.append, no_room_left)
]


@pytest.mark.parametrize("claim", [*CHOICES, *FILES], ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", [*CHOICES, *FILES], ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_what_stays_is_spread_over_the_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for step in range(1, 401):
        files.append_bounded(path, [{"step": step, "text": "x" * 20}], limit=2000)
    steps = [entry["step"] for entry in files.read(path)]
    assert (steps[0], steps[-1]) == (1, 400)
    assert len(steps) > 25
    assert max(after - before for before, after in pairwise(steps)) < 40


def test_the_stated_bound_is_the_one_that_holds() -> None:
    assert files.CREDIT_LIMIT == 16 * 2**20
    assert "16 MiB" in str(trainer_module.SDPOConfig.__doc__)
    # The largest row: every token and text as long as it may be.
    likeliest = [[99999, 0.99999]] * recorder.LIKELIEST
    row = {
        "step": 1,
        "student_top": [likeliest] * recorder.MOST_TOKENS,
        "text": "x" * recorder.MOST_CHARACTERS,
    }
    assert len(files._line(row)) < files.CREDIT_LIMIT / 50


def test_a_line_that_a_killed_run_left_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"st')
    assert files.read(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step":1}\n{"st\n{"step":2}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: expected a JSON object with a step"):
        files.read(path)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    files.append(path, [{"step": 1, "a": float("nan"), "b": float("inf"), "c": Path("x"), "d": "\ud800"}])
    assert files.read(path) == [{"step": 1, "a": None, "b": None, "c": "x", "d": "\ud800"}]


# --- the log, and a run that is resumed -------------------------------------------------------------------


def test_the_log_has_the_options_the_history_and_the_warnings(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, eval_dataset=tiny.conversations(2), eval_strategy="steps", eval_steps=2, max_steps=2
    )
    trainer.train()
    entries = log_of(tmp_path)
    assert entries[0]["step"] == 0
    assert entries[0]["options"]["teacher_update_rate"] == 0.3
    assert [entry for entry in entries if not {"options", "warning"} & entry.keys()] == json.loads(
        json.dumps(trainer.state.log_history)
    )
    (warning,) = [entry for entry in entries if "warning" in entry]
    assert (warning["warning"], warning["step"]) == ("mass", 1)
    assert "The top 20 tokens have" in warning["message"]


def test_a_run_starts_its_files_again(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2))
        trainer.evaluate(tiny.conversations(2))  # before training: no part of the run
        trainer.train()
    assert [entry["step"] for entry in log_of(tmp_path) if "loss" in entry] == [1, 2]
    assert not [entry for entry in log_of(tmp_path) if "eval_loss" in entry]
    assert sorted({row["step"] for row in rows_of(tmp_path)}) == [1, 2]
    second = (tmp_path / files.LOG).read_bytes(), (tmp_path / files.CREDIT).read_bytes()
    tiny.trainer(tmp_path).train()  # without rows: those of the run before would be taken for its own
    assert not (tmp_path / files.CREDIT).exists()
    # The files of both runs before are kept.
    names = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    stems = [Path(name).stem for name in (files.CREDIT, files.LOG)]
    assert names == sorted([files.LOG, *(f"{stem}.{number}.jsonl" for stem in stems for number in (1, 2))])
    assert second == tuple((tmp_path / f"{stem}.2.jsonl").read_bytes() for stem in reversed(stems))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_resumed_run_writes_every_row_once(tmp_path: Path, kept: int) -> None:
    """Interrupted within a generation batch and at its end, after steps that the checkpoint does not have."""
    changes = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    config = tiny.config(credit_rows=3)
    tiny.trainer(tmp_path, sdpo_config=config, **changes).train()
    rows, log = rows_of(tmp_path), log_of(tmp_path)
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    again = tiny.trainer(tmp_path, sdpo_config=config, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{kept}"))
    assert rows_of(tmp_path) == rows

    def losses(entries: list[dict[str, Any]]) -> list[tuple[int, float]]:
        return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]

    assert losses(log_of(tmp_path)) == losses(log)
    assert [entry["step"] for entry in log_of(tmp_path) if "options" in entry] == [0, kept]
    # The counter-example: without the cut, steps after the checkpoint are there twice.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "keep_until", lambda path, step: None)
        other = tiny.trainer(tmp_path, sdpo_config=config, **changes)
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{kept}"))
    assert len(rows_of(tmp_path)) > len(rows)


@pytest.mark.parametrize("table", [False, True])
def test_a_checkpoint_of_a_run_without_rows_can_be_resumed_with_them(tmp_path: Path, table: bool) -> None:
    """Also of a run whose completions table numbers the rows of the batch that was saved."""
    changes = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    tiny.trainer(tmp_path, log_completions=table, **changes).train()
    (tmp_path / files.LOG).unlink()
    again = tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {row["step"] for row in rows_of(tmp_path)} == {3, 4}  # step 2 is of the batch that was saved
    # The history comes from the checkpoint.
    assert [entry["step"] for entry in log_of(tmp_path) if "loss" in entry] == [1, 2, 3, 4]


def test_a_report_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be made, and a disk that is full after the first entries, are one warning a file."""
    (tmp_path / "file").touch()
    log = files.RunLog(tmp_path / "file", writes=True)
    log.begin(3, options={}, history=[])
    log.add(4, {"loss": 1.0}, {})
    (message,) = caplog.messages
    assert f"{files.LOG} ends before step 3" in message
    written, append = 0, files.append

    def until_full(path: Path, entries: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:
            with path.open("a") as file:
                file.write('{"step":')
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, entries)

    monkeypatch.setattr(files, "append", until_full)
    trainer = tiny.trainer(tmp_path / "full", sdpo_config=tiny.config(credit_rows=2), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    full = [m.partition(" ends before ")[2][:6] for m in caplog.messages if "No space left" in m]
    assert full == ["step 1", "step 2"]  # of the rows and of the log
    # What was written can be read, and nothing follows the half entries.
    assert {entry["step"] for entry in log_of(tmp_path / "full")} == {0, 1}
    assert rows_of(tmp_path / "full") == []


def test_a_damaged_file_of_rows_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "append_bounded", partial(files.append_bounded, limit=10))
    path = tmp_path / files.CREDIT
    path.write_text("damaged\n")
    settings = LogitSettings(HeadTransform(1.0, None), 1.0, 0.5)
    one = recorder.Recorder(path, tiny.config(credit_rows=1), str, settings)
    for step in (1, 2):
        one._step, one._kept = step, [Candidate(0, None, True, {"row": step})]
        assert one.write(step) == [{"step": step, "row": step}]
    assert len(caplog.messages) == 1
    assert "line 1: expected a JSON object" in caplog.messages[0]
    assert path.read_text() == "damaged\n"


# --- texts of tokens --------------------------------------------------------------------------------------


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def property_the_texts_of_tokens_are_the_text(texts_of: Callable[..., list[str]], text: str) -> None:
    ids = list(text.encode())
    texts = texts_of(ids, decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


TEXTS = Claim(
    property_the_texts_of_tokens_are_the_text,
    token_texts,
    lambda ids, decode: [decode([i]) for i in ids],
    {"text": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12)},
)


def test_the_texts_of_tokens_are_the_text() -> None:
    TEXTS.holds()
    TEXTS.rejects_counter_example()


def test_bytes_that_are_no_text_have_a_text_each() -> None:
    texts = token_texts([0xFF] * 40, decode)
    assert len(texts) == 40
    assert "".join(texts) == "\ufffd" * 40


def test_the_space_of_a_first_token_is_not_lost() -> None:
    assert token_text(7, lambda ids: " word".join([""] * (len(ids) + 1)).lstrip()) == " word"


# --- trackers ---------------------------------------------------------------------------------------------


def test_the_rows_go_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, Any]] = []
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # which libraries look for
        module.run = SimpleNamespace()  # type: ignore[attr-defined]
        module.Table = lambda dataframe: dataframe  # type: ignore[attr-defined]
        module.log = lambda tables, name=name: logged.append((name, tables["credit"]))  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        "trl.trainer.utils.log_table_to_comet_experiment",
        lambda name, table: logged.append((name, table)),
    )
    given: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "log_table", lambda *arguments: given.append(arguments))
        tiny.trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2), max_steps=1).train()
    ((report_to, name, table_rows),) = [each for each in given if each[2]]
    assert (report_to, name) == ([], "credit")
    trackers.log_table(["wandb", "trackio", "comet_ml", "tensorboard"], name, table_rows)
    assert [name for name, _ in logged] == ["wandb", "trackio", "credit.csv"]
    rows = rows_of(tmp_path)
    for _, table in logged:
        assert list(table["row"]) == [row["row"] for row in rows]
        assert list(table["completion"]) == ["".join(row["tokens"]) for row in rows]
        for cell, row in zip(table["log_ratio"], rows, strict=True):
            pairs = zip(row["tokens"], row.get("log_ratio", []), strict=False)
            assert json.loads(cell) == [list(pair) for pair in pairs]


def test_a_tracker_whose_run_has_not_begun_gets_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    trackers.log_table(["wandb"], "credit", [{"step": 1}])
    trackers.log_table(["wandb"], "credit", [])

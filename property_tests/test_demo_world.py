"""The embedded demo: its machine, its language, its exact evaluation, its checkpoint and its program."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

import exact
import language
import machine
import pretrain
import report
import run

ROOT = Path(__file__).parents[1]
opcodes = st.sampled_from(sorted(machine.MEANINGS))
registers = st.sampled_from(machine.REGISTERS)
tasks = st.builds(machine.Task, st.text(opcodes, min_size=1, max_size=3), registers)
machines = st.fixed_dictionaries({o: st.sampled_from(m) for o, m in machine.MEANINGS.items()})
seeds = st.integers(0, 2**32)
words = st.lists(st.sampled_from(language.WORDS), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return language.load_tokenizer(pretrain.CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(pretrain.CHECKPOINT, dtype=torch.float32)


def _rejects(check: Callable[..., None], *twin: object) -> None:
    with pytest.raises(AssertionError):
        check(*twin)


# --- the machine -------------------------------------------------------------------------------------------------


def _check_bijection(primitive: Callable[[str], str]) -> None:
    assert sorted(map(primitive, machine.REGISTERS)) == machine.REGISTERS


@pytest.mark.parametrize("name", sorted(machine.PRIMITIVES))
def test_a_primitive_is_a_bijection_of_the_registers(name: str) -> None:
    _check_bijection(machine.PRIMITIVES[name])
    _rejects(_check_bijection, lambda r: r[0] + machine.PRIMITIVES[name](r)[1:] if r < "500" else r[:2] + "0")


# The same eight maps as arithmetic on the three digits a, b, c.
ARITHMETIC: dict[str, Callable[[int, int, int], tuple[int, int, int]]] = {
    "rev": lambda a, b, c: (c, b, a),
    "rotl": lambda a, b, c: (b, c, a),
    "rotr": lambda a, b, c: (c, a, b),
    "swap": lambda a, b, c: (b, a, c),
    "inc": lambda a, b, c: ((a + 1) % 10, (b + 1) % 10, (c + 1) % 10),
    "dec": lambda a, b, c: ((a + 9) % 10, (b + 9) % 10, (c + 9) % 10),
    "comp": lambda a, b, c: (9 - a, 9 - b, 9 - c),
    "half": lambda a, b, c: ((a + 5) % 10, (b + 5) % 10, (c + 5) % 10),
}


def _check_arithmetic(primitives: dict[str, Callable[[str], str]]) -> None:
    for value in range(1000):
        digits = (value // 100, value // 10 % 10, value % 10)
        for name, compute in ARITHMETIC.items():
            a, b, c = compute(*digits)
            assert primitives[name](f"{value:03d}") == f"{100 * a + 10 * b + c:03d}"


def test_primitives_are_their_arithmetic_on_every_register() -> None:
    assert set(ARITHMETIC) == set(machine.PRIMITIVES)
    _check_arithmetic(machine.PRIMITIVES)
    with_carry = {"inc": lambda r: f"{(int(r) + 111) % 1000:03d}"}
    _rejects(_check_arithmetic, machine.PRIMITIVES | with_carry)


def test_the_habit_uses_every_primitive_once_and_meanings_are_distinct() -> None:
    assert sorted(machine.HABIT.values()) == sorted(machine.PRIMITIVES)
    assert all(len(set(meanings)) == 3 for meanings in machine.MEANINGS.values())


def _check_change(change: Callable[[int], machine.Machine], seed: int) -> None:
    changed = change(seed)
    assert sum(changed[o] != machine.HABIT[o] for o in machine.HABIT) == 6
    assert all(changed[o] in machine.MEANINGS[o] for o in machine.MEANINGS)
    assert changed == change(seed)


@given(seeds)
def test_a_changed_machine_differs_from_the_habit_in_six_opcodes(seed: int) -> None:
    _check_change(machine.changed_machine, seed)
    _rejects(_check_change, lambda seed: machine.changed_machine(seed, changes=5), seed)
    _rejects(_check_change, lambda seed: machine.changed_machine(seed) | {"A": "swap", "B": "comp"}, seed)


def _check_trace(
    answer: Callable[[machine.Task, machine.Machine], str], task: machine.Task, meanings: machine.Machine
) -> None:
    first, *rest = answer(task, meanings).split("\n")
    assert first == task.register
    assert "".join(line[0] for line in rest) == task.program
    for before, after in pairwise([first, *rest]):
        assert after[1:] == machine.PRIMITIVES[meanings[after[0]]](before[-3:])


@given(tasks, machines)
def test_a_trace_applies_one_meaning_per_line(task: machine.Task, meanings: machine.Machine) -> None:
    _check_trace(machine.Task.answer, task, meanings)


def test_a_trace_that_starts_over_or_keeps_to_the_habit_is_rejected() -> None:
    def from_the_register(task: machine.Task, meanings: machine.Machine) -> str:
        lines = [o + machine.PRIMITIVES[meanings[o]](task.register) for o in task.program]
        return "\n".join([task.register, *lines])

    task = machine.Task("ACB", "314")
    changed = {o: meanings[1] for o, meanings in machine.MEANINGS.items()}
    _check_trace(machine.Task.answer, task, changed)
    _rejects(_check_trace, from_the_register, task, changed)
    _rejects(_check_trace, lambda task, _: task.answer(machine.HABIT), task, changed)


# --- the interpreter ---------------------------------------------------------------------------------------------

Interpret = Callable[[str, str], machine.Verdict]


@st.composite
def attempts(draw: st.DrawFn) -> tuple[str, str]:
    """An answer, and another machine's trace, a damaged trace, or nonsense in the same language."""
    task = draw(tasks)
    answer, other = task.answer(draw(machines)), task.answer(draw(machines))
    at = draw(st.integers(0, len(other)))
    noise = "".join(draw(st.lists(st.sampled_from(language.WORDS), max_size=6)))
    return draw(
        st.sampled_from([answer, other, other[:at], other[:at] + noise, noise, answer + noise])
    ), answer


def _check_verdict(interpret: Interpret, completion: str, answer: str) -> None:
    score, feedback = interpret(completion, answer)
    assert (score == 1.0) == (completion == answer) == (feedback == "")
    if completion == answer:
        return
    assert score == 0.0
    match = re.fullmatch(r"line (\d+): expected (end|[A-H]?\d{3}) got (end|junk|[A-H]?\d{3})", feedback)
    assert match is not None
    right, wrong = answer.split("\n"), completion.split("\n") if completion else []
    line = int(match[1]) - 1
    assert right[:line] == wrong[:line]  # everything before the named line is right
    assert right[line : line + 1] != wrong[line : line + 1]  # and the named line is not
    assert match[2] == (right[line] if line < len(right) else "end")
    if line >= len(wrong):
        assert match[3] == "end"
    else:
        assert match[3] in (wrong[line], "junk")
        assert match[2] != match[3]


def _last_wrong_line(completion: str, answer: str) -> machine.Verdict:
    pairs = list(zip(answer.split("\n"), completion.split("\n"), strict=False))
    wrong = [n for n, (want, got) in enumerate(pairs) if want != got]
    if len(wrong) < 2:
        return machine.interpret(completion, answer)
    want, got = pairs[wrong[-1]]
    return machine.Verdict(0.0, f"line {wrong[-1] + 1}: expected {want} got {got}")


@given(attempts())
def test_feedback_names_the_first_wrong_line(attempt: tuple[str, str]) -> None:
    _check_verdict(machine.interpret, *attempt)


@given(tasks, machines, machines)
def test_naming_the_last_wrong_line_or_counting_from_zero_is_rejected(
    task: machine.Task, meanings: machine.Machine, others: machine.Machine
) -> None:
    answer, attempt = task.answer(meanings), task.answer(others)
    wrong = sum(a != b for a, b in zip(answer.split("\n"), attempt.split("\n"), strict=True))
    assume(wrong >= 2)
    _rejects(_check_verdict, _last_wrong_line, attempt, answer)

    def from_zero(completion: str, answer: str) -> machine.Verdict:
        score, feedback = machine.interpret(completion, answer)
        return machine.Verdict(score, re.sub(r"\d+", lambda m: str(int(m[0]) - 1), feedback, count=1))

    _rejects(_check_verdict, from_zero, attempt, answer)


def test_feedback_by_hand() -> None:
    answer = machine.Task("ACB", "314").answer(machine.HABIT)
    assert answer == "314\nA413\nC524\nB245"
    for completion, feedback in {
        "314\nA413\nC685\nB856": "line 3: expected C524 got C685",
        "314\nA413": "line 3: expected C524 got end",
        "": "line 1: expected 314 got end",
        "314\nA413\nC52": "line 3: expected C524 got junk",
        "314\nA413\nC524\nB245\nB452": "line 5: expected end got B452",
        "314\nA413\nC524\nB245\nend": "line 5: expected end got junk",
    }.items():
        assert machine.interpret(completion, answer) == (0.0, feedback)


# --- training and held-out prompts -------------------------------------------------------------------------------


def _check_asked(prompts: list[str]) -> None:
    assert not any(machine.held_out(prompt[-3:]) for prompt in prompts)


@given(seeds)
def test_no_held_out_register_is_ever_asked_in_training(seed: int) -> None:
    rng = random.Random(seed)
    asked = [machine.draw_task(rng).prompt for _ in range(20)]
    everywhere = [f"run A on {rng.choice(machine.REGISTERS)}" for _ in range(200)]
    _rejects(_check_asked, everywhere)
    asked += [make(rng)[0].split("\n")[0] for make in (pretrain.skills_document, pretrain.habit_document)]
    rows = run.training_prompts(machine.HABIT, seed, count=20)
    asked += [prompt[0]["content"] for prompt in rows["prompt"]]
    _check_asked(asked)


def test_the_held_out_set_is_fixed_distinct_and_a_fifth_of_the_registers() -> None:
    chosen = machine.held_out_tasks()
    assert chosen == machine.held_out_tasks()
    assert len(set(chosen)) == 200
    assert all(machine.held_out(task.register) for task in chosen)
    assert set(machine.TRAIN_REGISTERS).isdisjoint(machine.HELD_OUT_REGISTERS)
    assert 150 < len(machine.HELD_OUT_REGISTERS) < 250


# --- the language ------------------------------------------------------------------------------------------------


def _check_round_trip(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == text


@given(words)
def test_the_round_trip_is_lossless_in_both_directions(pieces: list[str]) -> None:
    _check_round_trip(language.build_tokenizer(), pieces)


def test_a_tokenizer_without_its_decoder_is_rejected() -> None:
    twin = language.build_tokenizer()
    twin.backend_tokenizer.decoder = None
    _rejects(_check_round_trip, twin, ["3", "1", "4"])


def test_no_word_begins_another() -> None:
    entries = sorted((*language.WORDS, *language.SPECIAL))
    assert not any(after.startswith(before) for before, after in pairwise(entries))


def _check_language(
    tokenizer: PreTrainedTokenizerFast, attempt: tuple[str, str], context: str, register: str = "314"
) -> None:
    completion, answer = attempt
    asked = pretrain.in_context(machine.Task("ACB", register), context, answer, completion)
    ids = language.encode_question(tokenizer, asked) + language.encode_answer(tokenizer, answer)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == f"<user>{asked}<assistant>{answer}<eos>"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(turns, return_dict=False) == ids


@given(attempts(), st.sampled_from(pretrain.CONTEXTS))
def test_every_text_of_the_world_is_in_the_language(attempt: tuple[str, str], context: str) -> None:
    _check_language(language.build_tokenizer(), attempt, context)
    _rejects(_check_language, language.build_tokenizer(), attempt, context, "π")


def test_the_saved_tokenizer_has_the_ids_that_the_checkpoint_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "run ACB on 314\nfeedback\nline 2: expected A413 got junk\nsolve again"
    expected = [24, 15, 17, 16, 25, 8, 6, 9, 23, 32, 23, 26, 7, 27, 15, 9, 6, 8, 28, 30, 23, 33]
    assert tokenizer(text).input_ids == expected
    assert tokenizer.get_vocab() == language.build_tokenizer().get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 34)


# --- exact evaluation --------------------------------------------------------------------------------------------


def _brute_force(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, answer: str
) -> tuple[float, bool]:
    """One question, one token at a time, no batch, no padding, in double precision."""
    ids = tokenizer(f"<user>{question}<assistant>").input_ids
    probability, greedy = 1.0, True
    for token in tokenizer(f"{answer}<eos>").input_ids:
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        probability, greedy = probability * p[token].item(), greedy and p.argmax().item() == token
        ids = [*ids, token]
    return probability, greedy


def _check_evaluation(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, evaluate: Callable
) -> None:
    chosen = machine.held_out_tasks()[:12]
    cases = [(task.prompt, task.answer(meanings)) for task in chosen for meanings in (machine.HABIT, CHANGED)]
    result = evaluate(model, tokenizer, [question for question, _ in cases], [answer for _, answer in cases])
    for (question, answer), probability, greedy in zip(cases, *result, strict=True):
        expected, expected_greedy = _brute_force(model, tokenizer, question, answer)
        assert probability.item() == pytest.approx(expected, rel=1e-3, abs=0.0)
        assert greedy.item() == expected_greedy
        assert greedy.item() == (exact.complete(model, tokenizer, question) == answer)


CHANGED = machine.changed_machine(0)


def test_evaluation_equals_brute_force(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    _check_evaluation(model, tokenizer, exact.evaluate)
    torch.manual_seed(0)
    _check_evaluation(pretrain.build_model(tokenizer).eval(), tokenizer, exact.evaluate)


def test_an_evaluation_that_forgets_the_end_is_rejected(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    untrained = pretrain.build_model(tokenizer).eval()
    monkeypatch.setattr(exact, "encode_answer", lambda tokenizer, answer: tokenizer(answer).input_ids)
    _rejects(_check_evaluation, untrained, tokenizer, exact.evaluate)


# --- the checkpoint ----------------------------------------------------------------------------------------------


def test_the_checkpoint_reaches_its_stated_probabilities(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    stated = json.loads((pretrain.CHECKPOINT / "probabilities.json").read_text())["habit"]
    measured = pretrain.probabilities(model, tokenizer)
    assert measured == pytest.approx(stated, abs=0.005)
    assert measured["bare"] < 0.05
    assert measured["feedback"] > 0.38
    assert measured["solution"] > 0.97
    assert measured["both"] > 0.93


def test_the_checkpoint_is_sure_of_the_habit(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = machine.held_out_tasks()
    result = exact.evaluate(
        model, tokenizer, [t.prompt for t in chosen], [t.answer(machine.HABIT) for t in chosen]
    )
    assert result.probability.mean() > 0.9


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in pretrain.CHECKPOINT.iterdir()) < 2_000_000


# --- the shuffled control ----------------------------------------------------------------------------------------


def _rollout(seed: int) -> tuple[list[list[dict[str, str]]], list[str]]:
    """A batch of the demo's shape, some completions right and some by habit, and its answers."""
    rng = random.Random(seed)
    drawn = [task for task in (machine.draw_task(rng) for _ in range(run.PROMPTS)) for _ in range(run.GROUP)]
    texts = [task.answer(rng.choice([machine.HABIT, CHANGED])) for task in drawn]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return completions, [task.answer(CHANGED) for task in drawn]


def _check_control(reward: Callable[..., list[machine.Verdict]], seed: int) -> None:
    completions, answers = _rollout(seed)
    honest = run.interpreter(completions, answers)
    shuffled = reward(completions, answers)
    assert [verdict.score for verdict in shuffled] == [verdict.score for verdict in honest]
    assert sorted(verdict.feedback for verdict in shuffled) == sorted(verdict.feedback for verdict in honest)
    assert all(verdict.feedback == "" for verdict in shuffled if verdict.score == 1.0)
    groups: dict[str, set[int]] = {}  # feedback -> the groups whose failures it names
    for row, verdict in enumerate(honest):
        groups.setdefault(verdict.feedback, set()).add(row // run.GROUP)
    for row, verdict in enumerate(shuffled):
        if verdict.score == 0.0:
            assert groups[verdict.feedback] != {row // run.GROUP}


@given(seeds)
def test_the_control_changes_whose_feedback_a_failure_reads_and_nothing_else(seed: int) -> None:
    assume(sum(verdict.score == 0.0 for verdict in run.interpreter(*_rollout(seed))) >= 2 * run.GROUP)
    _check_control(run.shuffling_interpreter, seed)
    _rejects(_check_control, run.interpreter, seed)


# --- the program and its report ----------------------------------------------------------------------------------


def _results(seed_count: int = 2) -> dict:
    curve = [0.1, 0.4, 0.5, 0.9]
    task = machine.Task("C", "314")
    example = {
        "question": task.prompt,
        "answer": task.answer(CHANGED),
        "completion": task.answer(machine.HABIT),
        "probability": 0.25,
    }
    runs = [
        {
            "arm": arm.name,
            "seed": seed,
            "seconds": 1.0,
            "samples": [0, 512, 1024, 2048],
            "probability": [value / (1 + seed + place) for value in curve],
            "examples": [example | {"completion": "<b>&"}],
        }
        for place, arm in enumerate(run.ARMS)
        for seed in range(seed_count)
    ]
    return {
        "quick": False,
        "prompts_per_step": 16,
        "completions_per_prompt": 4,
        "arms": {arm.name: {"learning_rate": arm.learning_rate} for arm in run.ARMS},
        "machines": [{"seed": seed, **machine.changed_machine(seed)} for seed in range(seed_count)],
        "before": [example],
        "versions": {"torch": "0"},
        "python": "3",
        "runs": runs,
    }


def test_the_plot_has_a_line_per_seed_and_one_per_mean_at_the_right_height() -> None:
    results = _results()
    svg = ElementTree.fromstring(report.plot(results))
    lines = svg.findall("{*}polyline")
    assert len(lines) == len(run.ARMS) * (2 + 1)
    thick = [line for line in lines if line.get("stroke-width") == "3"]
    heights = {line.get("stroke"): float(line.get("points", "").split(",")[-1]) for line in thick}
    for arm, color in report.COLORS.items():
        mean = sum(r["probability"][-1] for r in results["runs"] if r["arm"] == arm) / 2
        scale = report.HEIGHT - report.TOP - report.BOTTOM
        assert heights[color] == pytest.approx(report.HEIGHT - report.BOTTOM - mean * scale, abs=0.06)


def test_the_page_is_self_contained_and_escapes_what_the_model_wrote(tmp_path: Path) -> None:
    page = report.write_report(_results(), tmp_path).read_text()
    outside = [link for link in re.findall(r"(?:src|href)=|https?://[^\"]*", page) if "w3.org" not in link]
    assert not outside
    assert "<script" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert len(report.summary(_results()).split("\n")) == 5


def _quick_run(folder: Path) -> dict:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/demo/run.py", "--quick", "--output", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().split("\n")[-1] == str(folder / "report.html")
    return json.loads((folder / "results.json").read_text())


def test_the_quick_run_writes_its_report_and_learns_in_every_arm(tmp_path: Path) -> None:
    results = _quick_run(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.html", "curves.svg"}
    assert [r["arm"] for r in results["runs"]] == [arm.name for arm in run.ARMS]
    starts = {r["probability"][0] for r in results["runs"]}
    assert len(starts) == 1  # the same checkpoint on the same machine
    assert all(r["samples"] == [0, 128, 256] and r["probability"][-1] not in starts for r in results["runs"])


@pytest.mark.slow
def test_a_seed_gives_the_same_numbers_again(tmp_path: Path) -> None:
    first, second = (_quick_run(tmp_path / name) for name in ("first", "second"))
    for a, b in zip(first["runs"], second["runs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}

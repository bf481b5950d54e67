"""The private API and the house style: interpreter, sandbox, tasks, evaluation and control."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from private_api_cases import drawn, save_model
from programs import EXAMPLES, ROOT
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

sys.path.insert(0, str(EXAMPLES / "private_api"))

import evaluation
import house_style
import kit
import kit_task
import sandbox
from environment import Environment, Question, Reward
from kit_task import KIT, KIT_STRICT, judge


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


TASKS = pytest.mark.parametrize(
    "task", [KIT, KIT_STRICT, house_style.HOUSE_STYLE], ids=lambda task: task.name
)


@TASKS
def test_every_answer_is_right_and_an_empty_one_is_not(task: Environment) -> None:
    questions = {q.answer: q for split in ("train", "test") for q in drawn(task, split, 60)}
    for question in list(questions.values())[:40]:
        assert task.judge(question.answer, **question.columns) == (1.0, None)
        score, feedback = task.judge("", **question.columns)
        assert score == 0.0
        assert feedback


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kit.max([1])", "AttributeError: module 'kit' has no attribute 'max'"),
        ("kit.peak()", "TypeError: kit.peak() takes exactly one argument"),
        ("kit.peak([1], 2)", "TypeError: kit.peak() takes exactly one argument"),
        ("kit.peak(values=[1])", "TypeError: kit.peak() takes exactly one argument"),
        ("kit.peak(*[1])", "TypeError: kit.peak() takes exactly one argument"),
        ("kit.peak([])", "ValueError: kit.peak() cannot take []"),
        ("kit.level([])", "ZeroDivisionError: kit.level() cannot take []"),
        ("kit.shout(3)", "TypeError: kit.shout() cannot take 3"),
        ("kit.peak(open('x'))", "TypeError: the argument of kit.peak() is not a literal"),
        ("kit.peak([__import__('os')])", "TypeError: the argument of kit.peak() is not a literal"),
        ("kit.__class__", "SyntaxError: the reply is not one call of kit"),
        ("kit.peak.__call__([1])", "SyntaxError: the reply is not one call of kit"),
        ("other.peak([1])", "SyntaxError: the reply is not one call of kit"),
        ("kit.peak([1]); 2", "SyntaxError: the reply is not one expression"),
        ("kit.peak(" * 90 + "1" + ")" * 90, "SyntaxError: more than 500 characters"),
        ("kit.peak(" + "[" * 200 + "]" * 200 + ")", None),
        ("kit.peak(1\0)", None),
        (f"kit.level([{'9' * 320}])", None),
    ],
)
def test_what_is_not_one_call_with_a_literal_is_reported(source: str, message: str | None) -> None:
    with pytest.raises(kit.KitError) as error:
        kit.run(source)
    assert "\n" not in str(error.value)
    if message is not None:
        assert str(error.value) == message


@given(st.text(max_size=60) | st.text("kit.peak([]){}:;lambda_x0'\"\\", max_size=60))
def test_any_text_gets_a_score_and_one_line_of_feedback(text: str) -> None:
    verdict = judge(text, "peak", "[3, 1]")
    assert (verdict.score == 1.0) == (verdict.feedback is None)
    if verdict.feedback is not None:
        assert "kit.peak(argument) returns the largest number of a list" in verdict.feedback


@pytest.mark.parametrize(
    ("reply", "is_strictly_right"),
    [
        ("{}", True),
        ("```python\n{}\n```", True),
        ("`{}`\n", True),
        ("\n```py\n\n {}\n```\n", True),
        ("```Python\n{}\n```", True),
        ("python\n{}", False),
        ("{}  # Correct solution", False),
        ("# Correct solution:\n{}", False),
        ("{}\n\nCorrectly solve the original question.", False),
        ("Correct solution:\n\n{}", False),
        ("`{}`  \nFinal solution:\n\n", False),
    ],
)
def test_the_strict_judge_accepts_no_text_beside_the_call(reply: str, is_strictly_right: bool) -> None:
    (question,) = KIT.held_out(1)
    text = reply.format(question.answer)
    assert KIT.judge(text, **question.columns).score == 1
    verdict = KIT_STRICT.judge(text, **question.columns)
    assert verdict.score == is_strictly_right
    if not is_strictly_right:
        function = question.columns["function"]
        assert verdict.feedback is not None
        assert verdict.feedback.startswith("SyntaxError: the reply is not one expression. ")
        assert f"kit.{function}(argument)" in verdict.feedback


def test_the_strict_task_has_the_same_questions() -> None:
    assert KIT_STRICT.held_out(20) == KIT.held_out(20)
    assert KIT_STRICT.training(3, 20) == KIT.training(3, 20)


def test_a_value_of_another_type_is_wrong() -> None:
    assert judge("kit.stern([True])", "girth", "[1]").score == 0.0
    assert judge("kit.girth([1])", "girth", "[1]").score == 1.0
    assert judge("kit.mirror([True, 2.0])", "mirror", "[1, 2]").score == 0.0


def others_that_answer(question: Question) -> list[str]:
    """The functions beside the right one whose call the judge accepts."""
    name, argument = question.columns["function"], question.columns["argument"]
    calls = {other: f"kit.{other}({argument})" for other in kit.FUNCTIONS if other != name}
    return [other for other, call in calls.items() if judge(call, name, argument).score == 1]


def test_no_other_function_answers_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(others_that_answer(q) for q in (*drawn(KIT, "train", 500), *KIT.held_out(96)))
    # The number for records that were made before.
    monkeypatch.setattr(kit_task, "is_told_apart", lambda *_: True)
    before = sum(bool(others_that_answer(question)) for question in KIT.held_out(96))
    assert f"({before} of the 96 held-out questions)" in (ROOT / "DEBT.md").read_text()
    assert "for more than a quarter of their held-out questions" in (ROOT / "docs" / "results.md").read_text()
    assert 0.25 < before / 96 < 0.3


@TASKS
def test_the_splits_share_no_question_and_no_answer(task: Environment) -> None:
    train, test = drawn(task, "train", 2000), task.held_out(96)
    for part in (lambda q: q.prompt[-1]["content"], lambda q: q.answer):
        assert not {part(question) for question in train} & {part(question) for question in test}
    assert test == task.held_out(96)
    assert task.training(0, 8) != task.training(1, 8)


def test_no_prompt_names_a_function() -> None:
    prompts = [" ".join(turn["content"] for turn in question.prompt) for question in KIT.held_out(96)]
    assert not any(f"kit.{name}" in prompt for prompt in prompts for name in kit.FUNCTIONS)


def test_a_function_that_passed_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house_style, "_passed", set())
    true, runs = house_style.run_tests, []
    monkeypatch.setattr(house_style, "run_tests", lambda *args: runs.append(args) or true(*args))
    question, other = (q for q in house_style.HOUSE_STYLE.held_out(9)[:9:8])
    for reply in (question.answer, f"```python\n{question.answer}\n```", question.answer):
        assert house_style.judge(reply, **question.columns).score == 1
    assert len(runs) == 1
    # The tests are those of the question.
    assert question.columns != other.columns
    for count in (2, 3):  # a failure may be the machine's
        assert house_style.judge(question.answer, **other.columns).score == 0
        assert len(runs) == count


def test_no_prompt_mentions_the_house_style() -> None:
    prompts = [" ".join(turn["content"] for turn in q.prompt) for q in house_style.HOUSE_STYLE.held_out(96)]
    assert not any(
        word in prompt for prompt in prompts for word in ("'number'", "'text'", "'list'", "yes", "tuple")
    )


def test_the_control_keeps_scores_and_moves_feedback() -> None:
    columns = [
        {"function": name, "argument": value}
        for name, value in (("peak", "[1]"), ("shout", "'A'"), ("girth", "[2]"), ("peak", "[3]"))
    ]
    replies = ("kit.a([1])", "kit.b('A')", "kit.girth([2])", "kit.c([3])")
    completions = [[{"content": reply}] for reply in replies]
    true = Reward(KIT)(completions, columns=columns)
    for seed in range(8):
        shuffled = Reward(KIT, shuffle=True, seed=seed)(completions, columns=columns)
        assert [v.score for v in shuffled] == [v.score for v in true] == [0.0, 0.0, 1.0, 0.0]
        assert sorted(v.feedback or "" for v in shuffled) == sorted(v.feedback or "" for v in true)
        assert all(a.feedback != b.feedback for a, b in zip(shuffled, true, strict=True) if a.feedback)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", "TimeoutError"),
        ("return [0] * 10**9", "MemoryError"),
        ("return f(x)", "RecursionError"),
        ("return 10 ** 10 ** 8", "TimeoutError"),
        ("return open('/etc/passwd').read()", "NameError: name 'open' is not defined"),
        ("return ().__class__", "the name __class__ is not allowed"),
        ("return (y for y in [1]).gi_frame", "the name gi_frame is not allowed"),
        ("return [g.f_back for g in [x]]", "the name f_back is not allowed"),
        ("import os", "Import is not allowed"),
        ("from os import path", "ImportFrom is not allowed"),
        ("class A: pass", "ClassDef is not allowed"),
        ("match x:\n        case object(__class__=c): return c", "Match is not allowed"),
        ("return (lambda _: 1)(x)", "the name _ is not allowed"),
        ("return eval('1')", "NameError: name 'eval' is not defined"),
        ("return type('X', (), {'__eq__': lambda s, o: 1})()", "NameError: name 'type' is not defined"),
        ("raise Exception('a\\nb')", "Exception: a b"),
        ("raise Exception('\\ud800')", "Exception: ?"),
        ("return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("return 'x' * 500", "AssertionError: f(1) returned 'xxx"),
        ("raise Exception('a' * 10**6)", "Exception: aaa"),
        ("return", "AssertionError: f(1) returned None, expected 2"),
        ("return 2.0", "AssertionError: f(1) returned 2.0, expected 2"),
        ("return lambda: 2", "AssertionError: f(1) returned <function f"),
        ("return '2' * 10**6", "AssertionError: f(1) returned '222"),
        ("return '\U0001f600' * 10**4", "AssertionError: f(1) returned '\U0001f600"),
    ],
)
def test_hostile_and_wrong_functions_are_contained(body: str, message: str) -> None:
    outcome = sandbox.run_tests(f"def f(x):\n    {body}", "f", [sandbox.Case([1], 2)])
    assert not outcome.passed
    assert outcome.message is not None
    assert message in outcome.message
    assert len(outcome.message) < 250


READS_OF_FRAMES = [
    "def f(x):\n    try:\n        1 / 0\n    except Exception as e:\n        return " + value
    for value in (
        "'{0.__traceback__.tb_frame.f_back.f_locals[expected]}'.format(e)",
        "'{e.__traceback__.tb_frame.f_back.f_locals[expected]}'.format_map({'e': e})",
        "''.join(map('{0.__traceback__.tb_frame.f_back.f_locals[expected]}'.format, [e]))",
    )
] + [
    "def f(x):\n    def g():\n        yield '{0.gi_frame.f_back.f_back.f_locals[expected]}'.format(it)\n"
    "    it = g()\n    return list(it)[0]"
]


@pytest.mark.parametrize("source", READS_OF_FRAMES)
def test_a_function_cannot_return_what_it_reads_in_a_frame(source: str) -> None:
    assert not sandbox.run_tests(source, "f", [sandbox.Case(["a"], "one"), sandbox.Case(["b"], "two")]).passed


def test_the_process_of_a_function_has_no_expected_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """`str.format` reads every attribute of a value, and so whatever the frames around a function hold."""
    given = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.append(repr((arguments, options)))
            super().__init__(*arguments, **options)

        def communicate(self, job: bytes, timeout: float) -> tuple[bytes, bytes]:
            given.append(job.decode())
            return super().communicate(job, timeout)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    cases = [sandbox.Case(["argument"], "wanted text"), sandbox.Case([123454321], [987656789])]
    assert sandbox.run_tests("def f(x):\n    return 'wanted ' + 'text'", "f", cases[:1]).passed
    assert not sandbox.run_tests("def f(x):\n    return x", "f", cases).passed
    assert all(text in "".join(given) for text in ("argument", "123454321"))
    assert not any(text in "".join(given) for text in ("wanted text", "987656789"))


def test_the_first_failure_is_reported_also_when_a_later_test_does_not_end() -> None:
    source = "def f(x):\n    while x > 2:\n        pass\n    return x"
    wrong, endless = sandbox.Case([1], 2), sandbox.Case([3], 3)
    assert (
        sandbox.run_tests(source, "f", [wrong, endless]).message
        == "AssertionError: f(1) returned 1, expected 2"
    )
    assert "TimeoutError" in (sandbox.run_tests(source, "f", [sandbox.Case([2], 2), endless]).message or "")
    error = sandbox.run_tests(
        "def f(x):\n    return 1 // x", "f", [sandbox.Case([1], 1), sandbox.Case([0], 1)]
    )
    assert error.message == "line 2: ZeroDivisionError: integer division or modulo by zero"


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([-1.0, 0.0, 1.0, 2.0, "", "1", b"1", 1j]),
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.lists(parts, max_size=3).map(tuple)
        | st.dictionaries(
            st.booleans() | st.integers(0, 2) | st.sampled_from([0.0, 1.0, "1"]), parts, max_size=3
        )
        | st.sets(st.booleans() | st.integers(0, 2) | st.sampled_from([0.0, 1.0]), max_size=3)
    ),
    max_leaves=6,
)


def in_one_order(value: Any) -> str:
    """The text of a literal, which shows the type of each part; sets and dictionaries in one order."""
    if isinstance(value, dict):
        return f"{{{sorted((in_one_order(key), in_one_order(part)) for key, part in value.items())}}}"
    if isinstance(value, set | list | tuple):
        parts = [in_one_order(part) for part in value]
        return f"{type(value).__name__}{sorted(parts) if isinstance(value, set) else parts}"
    return repr(value)


@given(LITERALS, LITERALS)
def test_literals_are_the_same_where_their_types_are_at_every_depth(value: Any, other: Any) -> None:
    assert sandbox.is_same(value, ast.literal_eval(repr(value)))
    assert sandbox.is_same(value, other) == (in_one_order(value) == in_one_order(other))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([True, 2.0], [1, 2]),
        ((1, [2.0]), (1, [2])),
        ({"a": True}, {"a": 1}),
        ({True: "a"}, {1: "a"}),
        ({1.0}, {1}),
        ([(1,)], [[1]]),
    ],
)
def test_equal_values_of_other_types_fail_at_every_depth(value: Any, expected: Any) -> None:
    assert value == expected or value == [(1,)]  # what a comparison alone accepts
    source = f"def f():\n    return {value!r}"
    assert not sandbox.run_tests(source, "f", [sandbox.Case([], expected)]).passed
    assert sandbox.run_tests(source, "f", [sandbox.Case([], value)]).passed


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([], "cases: expected at least one test, got none"),
        ([sandbox.Case([1], float("nan"))], "cases: expected Python literals, got Case"),
        ([sandbox.Case([len], 1)], "cases: expected Python literals, got Case"),
        ([sandbox.Case([1], "x" * 5000)], "cases: expected a value of at most 4096 characters, got 5002"),
    ],
)
def test_tests_that_no_function_could_pass_are_refused(cases: list[sandbox.Case], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sandbox.run_tests("def f(x):\n    return x", "f", cases)


def test_a_function_may_format_text() -> None:
    assert sandbox.run_tests(
        "def f(x):\n    return '{:.2f}'.format(x)", "f", [sandbox.Case([1], "1.00")]
    ).passed


def test_a_function_cannot_write_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second barrier alone: with every builtin and no check of the source."""
    monkeypatch.setattr(sandbox, "refuse", lambda *_: None)
    monkeypatch.setattr(sandbox, "BUILTINS", ["open", "__import__"])
    target = tmp_path / "written"
    case = [sandbox.Case([], None)]
    sandbox.run_tests(f"def f():\n    open({str(target)!r}, 'w').write('x' * 100)", "f", case)
    assert not target.exists() or target.read_text() == ""
    assert not sandbox.run_tests("def f():\n    __import__('os').environ['HOME']", "f", case).passed


def test_what_is_not_one_function_of_the_name_is_refused() -> None:
    for source in (
        "f = len",
        "def g(x): return x",
        "def f(x): return x\nf(1)",
        "@len\ndef f(x): return x",
        "def f(",
    ):
        assert not sandbox.run_tests(source, "f", [sandbox.Case([1], 1)]).passed


def test_the_probability_equals_one_token_at_a_time(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    # Short ones: the product for a long answer of a random model is 0 in float32.
    chosen = sorted(KIT.held_out(96), key=lambda question: len(question.answer))[:3]
    probabilities = []
    for task in chosen:
        ids, answer = evaluation.prompt_ids(tokenizer, task), evaluation.answer_ids(tokenizer, task)
        probability = 1.0
        for token in answer:
            with torch.no_grad():
                q = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            probability *= q[token].item()
            ids = [*ids, token]
        probabilities.append(probability)
    monkeypatch.setattr(evaluation, "BATCH", 2)
    score = evaluation.evaluate(model, tokenizer, KIT, chosen)
    assert score.probability == pytest.approx(sum(probabilities) / 3, rel=1e-4)
    assert 0 < score.probability < 1


def test_the_accuracy_is_that_of_the_judge(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every spelling of a right call is right; a comparison with the answer would find one of five."""
    model = Qwen2ForCausalLM.from_pretrained(model_folder).train()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    chosen = [question for question in KIT.held_out(40) if "[" in question.answer][:5]
    spelled = [question.answer for question in chosen]
    replies = [
        spelled[0],
        spelled[1].replace(", ", ","),
        f"`{spelled[2]}`",
        f"The answer is:\n{spelled[3]}",
        "kit.unknown([1])",
    ]
    left = list(replies)

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [[*tokenizer(left.pop(0)).input_ids, tokenizer.eos_token_id] for _ in input_ids]
        width = max(map(len, rows))
        padded = [row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    model.generate = generate
    monkeypatch.setattr(evaluation, "COMPLETED", 2)
    assert evaluation.evaluate(model, tokenizer, KIT, chosen).accuracy == 0.8
    assert model.training
    assert sum(reply == answer for reply, answer in zip(replies, spelled, strict=True)) == 1


def test_a_turn_ends_with_the_token_of_the_chat_template(model_folder: Path) -> None:
    """Some checkpoints name the token that ends a document; completions would go on after their turn."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    evaluation.end_turns_with_eos(tokenizer)
    # The template of the tiny model has no mark after a turn.
    assert tokenizer.eos_token == "<eos>"
    turn = "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}"
    prompt = "{% if add_generation_prompt %}<assistant>{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}" + prompt
    for end in ("<system>", "<user>\n"):
        tokenizer.chat_template = template.replace("END", end)
        tokenizer.eos_token = "<pad>"
        evaluation.end_turns_with_eos(tokenizer)
        assert tokenizer.eos_token == end.strip()
    ids = evaluation.answer_ids(tokenizer, KIT.held_out(1)[0])
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<user>")

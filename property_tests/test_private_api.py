"""The private API: its interpreter, its tasks, the exact evaluation, the controls, and a small run of every arm."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import EXAMPLES, run
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(EXAMPLES / "private_api"))

import arms
import evaluation
import kit
import tasks

HERE = EXAMPLES / "private_api"
SPECIAL = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a character tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    entries = {entry: index for index, entry in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.WordLevel(entries, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        padding_side="left",
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(entries),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_every_function_runs_on_the_argument_of_a_task() -> None:
    rng = random.Random(0)
    drawn = [tasks.draw_task(rng, split) for _ in range(200) for split in ("train", "test")]
    assert {task.function for task in drawn} == set(kit.FUNCTIONS)
    for task in drawn:
        assert tasks.judge(task.answer, task.function, task.argument) == (1.0, None)


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
    verdict = tasks.judge(text, "peak", "[3, 1]")
    assert (verdict.score == 1.0) == (verdict.feedback is None)
    if verdict.feedback is not None:
        assert "kit.peak(argument) returns the largest number of a list" in verdict.feedback


def test_a_value_of_another_type_is_wrong() -> None:
    assert tasks.judge("kit.stern([True])", "girth", "[1]").score == 0.0
    assert tasks.judge("kit.girth([1])", "girth", "[1]").score == 1.0


def test_the_splits_share_no_phrasing_and_no_argument() -> None:
    rng = random.Random(1)
    train = [tasks.draw_task(rng, "train") for _ in range(3000)]
    test = tasks.held_out_tasks()
    assert len(test) == 96
    assert not {task.phrasing for task in train} & {task.phrasing for task in test}
    assert not {task.argument for task in train} & {task.argument for task in test}
    assert test == tasks.held_out_tasks()


def test_no_prompt_names_a_function() -> None:
    prompts = [" ".join(turn["content"] for turn in task.prompt) for task in tasks.held_out_tasks()]
    assert not any(f"kit.{name}" in prompt for prompt in prompts for name in kit.FUNCTIONS)


def test_the_control_keeps_scores_and_moves_feedback() -> None:
    columns = {"function": ["peak", "shout", "girth", "peak"], "argument": ["[1]", "'A'", "[2]", "[3]"]}
    completions = [
        [{"content": reply}] for reply in ("kit.a([1])", "kit.b('A')", "kit.girth([2])", "kit.c([3])")
    ]
    true = tasks.interpreter(completions, **columns)
    shuffled = tasks.ShuffledInterpreter(3)(completions, **columns)
    assert [v.score for v in shuffled] == [v.score for v in true] == [0.0, 0.0, 1.0, 0.0]
    assert sorted(v.feedback or "" for v in shuffled) == sorted(v.feedback or "" for v in true)
    assert shuffled != true
    assert shuffled[2].feedback is None


def test_the_evaluation_equals_one_token_at_a_time(model_folder: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    chosen = tasks.held_out_tasks()[:3]
    probabilities, found = [], []
    for task in chosen:
        ids, answer = evaluation.prompt_ids(tokenizer, task), evaluation.answer_ids(tokenizer, task)
        probability, greedy = 1.0, True
        for token in answer:
            with torch.no_grad():
                q = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            probability *= q[token].item()
            greedy = greedy and q.argmax().item() == token
            ids = [*ids, token]
        probabilities.append(probability)
        found.append(greedy)
    score = evaluation.evaluate(model, tokenizer, chosen, batch_size=2)
    assert score.probability == pytest.approx(sum(probabilities) / 3, rel=1e-4)
    assert score.accuracy == sum(found) / 3
    assert 0 < score.probability < 1


def test_every_question_has_arms_of_different_names() -> None:
    for question in arms.QUESTIONS:
        names = [arm.name for arm in arms.arms(question)]
        assert len(set(names)) == len(names) > 1
    with pytest.raises(ValueError, match=r"question: expected one of learns, .*, got 'x'"):
        arms.arms("x")


def test_a_small_run_of_every_method_and_its_report(model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model_folder), "--samples", "128", "--points", "2", "--output", "out")
    chosen = ("--arms", "SDPO", "GRPO", "SDPO, shuffled feedback", "supervised")
    printed = run(tmp_path, str(HERE / "run.py"), *arguments, *chosen, "--jobs", "2")
    assert "SDPO, shuffled feedback" in printed
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert {record["arm"] for record in records} == set(chosen[1:])
    for record in records:
        assert [point[0] for point in record["points"]] == [0, 64, 128]
        assert len(record["weights_sha256"]) == 64
        assert len(record["before"]) == len(record["after"]) == 6
        assert len(record["log"]) == (0 if record["method"] == "supervised" else 2)
    trained = next(record for record in records if record["arm"] == "supervised")
    assert trained["points"][-1][1] > trained["points"][0][1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # A second call repeats nothing.
    assert "done" in run(tmp_path, str(HERE / "run.py"), *arguments, *chosen)


def test_the_report_escapes_what_a_model_wrote(tmp_path: Path) -> None:
    import report

    row = {
        "question": "q",
        "reply": "<script>alert(1)</script>",
        "score": 0,
        "feedback": "<b>",
        "answer": "a",
    }
    records = [
        {
            "arm": arm,
            "seed": seed,
            "points": [[0, 0.0, 0.0], [64, 0.1 * seed, 0.5]],
            "before": [row],
            "after": [row],
            "model": "m",
            "device": "d",
            "versions": {"torch": "0"},
        }
        for arm in ("A", "B")
        for seed in (0, 1)
    ]
    page = report.write_report(records, tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert report.mean_curve(records[:2], report.PROBABILITY) == [(0, 0.0), (64, 0.05)]
    assert report.plot(records, 1, "p") == report.plot(records, 1, "p")

"""The demo's model: its tokenizer, its exact evaluation and its checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from demo_cases import CHANGED, attempts, rejects
from hypothesis import given
from hypothesis import strategies as st
from programs import EXAMPLES
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

sys.path.insert(0, str(EXAMPLES / "demo"))

import exact
import language
import machine
import pretrain

words = st.lists(st.sampled_from(language.WORDS), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return language.load_tokenizer(pretrain.CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(pretrain.CHECKPOINT, dtype=torch.float32)


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
    broken = language.build_tokenizer()
    broken.backend_tokenizer.decoder = None
    rejects(_check_round_trip, broken, ["3", "1", "4"])


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
def test_the_tokenizer_covers_every_text_of_the_task(attempt: tuple[str, str], context: str) -> None:
    _check_language(language.build_tokenizer(), attempt, context)
    rejects(_check_language, language.build_tokenizer(), attempt, context, "π")


def test_the_saved_tokenizer_has_the_ids_of_the_checkpoint(
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
    """One question, one token at a time, without batch and padding, in double precision."""
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
    rejects(_check_evaluation, untrained, tokenizer, exact.evaluate)


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


def test_the_checkpoint_follows_the_habit(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = machine.held_out_tasks()
    result = exact.evaluate(
        model, tokenizer, [t.prompt for t in chosen], [t.answer(machine.HABIT) for t in chosen]
    )
    assert result.probability.mean() > 0.9


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in pretrain.CHECKPOINT.iterdir()) < 2_000_000

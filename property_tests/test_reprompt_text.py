"""Which completions have a phrase of the templates that only the teacher reads, and the metric that counts them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of
from trainer_logs import PREFIX, logs

from sdpo import Templates
from sdpo_rl import SDPOConfig
from sdpo_rl.rollout.demonstrations import Rollout, teacher_context
from sdpo_rl.rollout.prompts import Completion, Prompt, Renderer
from sdpo_rl.rollout.reprompt_text import has_phrase, template_phrases
from sdpo_rl.rollout.reprompts import Reprompter

RECORDS = Path(__file__).parents[1] / "examples/private_api/records"
NAME = f"{PREFIX}reprompt_text_fraction"
FIELDS = ("prompt", "solution", "feedback", "successful_previous_attempt", "feedback_raw")
PHRASES = template_phrases(Templates(), with_feedback=True)


# --- against loops ----------------------------------------------------------------------------------------


def naive_words(text: str) -> list[str]:
    """Letter by letter: what is no letter, digit or underscore ends a word."""
    words, word = [], ""
    for letter in f"{text.lower()} ":
        if letter.isalnum() or letter == "_":
            word += letter
        elif word:
            words.append(word)
            word = ""
    return words


def naive_has(text: str, phrase: Sequence[str]) -> bool:
    words = naive_words(text)
    return any(
        all(start + i < len(words) and words[start + i] == word for i, word in enumerate(phrase))
        for start in range(len(words))
    )


def naive(completion: str, prompt: str, templates: Templates) -> bool:
    found = False
    for template in (templates.reprompt, templates.solution, templates.feedback, templates.success_feedback):
        for field in FIELDS:
            template = template.replace(f"{{{field}}}", "\n")
        for line in template.replace("{{", "{").replace("}}", "}").split("\n"):
            words = naive_words(line)
            candidates = [words[i : i + 3] for i in range(len(words)) if i + 3 <= len(words)]
            if len(words) == 2:
                candidates.append(words)
            for phrase in candidates:
                found = found or (naive_has(completion, phrase) and not naive_has(prompt, phrase))
    return found


def by_phrases(completion: str, prompt: str, templates: Templates) -> bool:
    return has_phrase(completion, tiny.user(prompt), template_phrases(templates, with_feedback=True))


def as_written(completion: str, prompt: str, templates: Templates) -> bool:
    """Upper and lower case differ."""
    phrases = template_phrases(templates, with_feedback=True)
    return by_phrases(completion, prompt, templates) and any(
        phrase.strip() in " ".join(completion.split()) for phrase in phrases
    )


def of_any_prompt(completion: str, prompt: str, templates: Templates) -> bool:
    """What the student's prompt has counts as well."""
    return by_phrases(completion, "", templates)


def of_three_words(completion: str, prompt: str, templates: Templates) -> bool:
    """A line of two words is no phrase."""
    phrases = template_phrases(templates, with_feedback=True)
    return has_phrase(
        completion, tiny.user(prompt), {phrase for phrase in phrases if len(phrase.split()) == 3}
    )


def in_parts_of_words(completion: str, prompt: str, templates: Templates) -> bool:
    """A phrase may end within a word."""
    phrases = template_phrases(templates, with_feedback=True)
    return has_phrase(completion, prompt, {phrase.rstrip() for phrase in phrases})


def across_placeholders(completion: str, prompt: str, templates: Templates) -> bool:
    """The words before and after an inserted text are one phrase."""
    joined = templates.solution.replace("{successful_previous_attempt}", "")
    moved = Templates(templates.reprompt, f"{joined}{{successful_previous_attempt}}", templates.feedback)
    return by_phrases(completion, prompt, moved)


pieces = st.lists(
    st.sampled_from(["solve", "Solve", "it", "now", "its", "x_1", " ", "\n", ": ", "**", ", ", "{{", "é "]),
    max_size=12,
).map(lambda parts: " ".join(parts) if len(parts) % 2 else "".join(parts))
templates = st.builds(
    lambda before, after, feedback: Templates(
        solution=f"{before}{{successful_previous_attempt}}{after}", feedback=f"{feedback}{{feedback_raw}}"
    ),
    *[pieces] * 3,
)
texts = pieces.map(lambda text: text.replace("{{", "{"))


def property_a_completion_counts_as_loops_find(
    counts: Any, completion: str, prompt: str, templates: Templates
) -> None:
    assert counts(completion, prompt, templates) == naive(completion, prompt, templates)


COUNTER_EXAMPLES = (as_written, of_any_prompt, of_three_words, in_parts_of_words, across_placeholders)
CLAIMS = [
    Claim(
        property_a_completion_counts_as_loops_find,
        by_phrases,
        counter_example,
        {"completion": texts, "prompt": texts, "templates": templates},
    )
    for counter_example in COUNTER_EXAMPLES
]


@pytest.mark.parametrize("claim", CLAIMS[:1], ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.wrong.__name__)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


# --- texts ------------------------------------------------------------------------------------------------


def test_the_phrases_of_the_default_templates() -> None:
    assert " correct solution " in PHRASES
    assert {" correctly solve the ", " solve the original ", " the original question "} < PHRASES
    assert {" your unsuccessful earlier ", " your successful earlier "} < PHRASES
    assert len(PHRASES) == 14
    # Without feedback its templates are in no prompt.
    alone = template_phrases(Templates(), with_feedback=False)
    assert len(alone) == 4
    assert alone < PHRASES


def test_a_preset_may_have_phrases_that_answers_have_anyway() -> None:
    """As docs/metrics.md says."""
    phrases = template_phrases(SDPOConfig.preset("opsd").templates(), with_feedback=True)
    assert has_phrase("To solve this problem, we add 1 to 1.", "1 + 1?", phrases)


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}{solution}{feedback}",
        "{prompt}\nNow\n{solution}{feedback}",
        "{prompt}请正确解答原题。{solution}{feedback}",
    ],
    ids=["no text", "one word", "no spaces"],
)
def test_a_template_without_a_line_of_two_words_has_no_phrase(template: str) -> None:
    frame = Templates(template, "{successful_previous_attempt}")
    assert template_phrases(frame, with_feedback=False) == frozenset()


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        # Of replies of trained models in examples/private_api.
        ("kit.helm([ 4, 3, 2, 8, 7 ])\nCorrectly solve the original", True),
        ("Correct solution:\n\nCorrect solution:\n\nkit.helm([4, 3, 2, 8, 7])", True),
        ("The feedback from unsuccessful attempts is incorrect because the correct solution returns", True),
        ("To solve the original question, you need to ensure that the function is defined.", True),
        # A variation of a phrase is not found.
        ("Final solution:\n\nFinal solution:\n\nkit.girth([6,8,6])", False),
        ("kit.peak([6, 1, 9, 8])", False),
        ("This solution is correct. The question is solved in one attempt.", False),
        ("correct_solution(incorrect solution)", False),
        ("", False),
    ],
)
def test_replies(completion: str, expected: bool) -> None:
    assert has_phrase(completion, "Use kit to get it.", PHRASES) is expected


def test_no_recorded_reply_before_training_has_a_phrase() -> None:
    """As docs/metrics.md says; of those after it some have."""
    records = [json.loads(path.read_text()) for path in RECORDS.glob("*.json")]

    def count(when: str) -> int:
        replies = [(row["reply"], row["question"]) for record in records for row in record[when]]
        assert len(replies) >= 6 * 100
        return sum(has_phrase(reply, question, PHRASES) for reply, question in replies)

    assert count("before") == 0
    assert count("after") > 50


@pytest.mark.parametrize(
    "prompt",
    [
        "Is there a **correct  solution**?",
        [
            {"role": "system", "content": "Write the correct solution."},
            {"role": "assistant", "content": [{"type": "text", "text": "Which?"}]},
            {"role": "user", "content": "3 - 1?"},
        ],
    ],
    ids=["plain", "conversation"],
)
def test_what_the_row_s_own_prompt_has_does_not_count(prompt: Prompt) -> None:
    assert not has_phrase("The correct solution is 2.", prompt, PHRASES)
    assert has_phrase("The correct solution of the original question is 2.", prompt, PHRASES)


# --- the metric -------------------------------------------------------------------------------------------


def metrics_of(
    completions: list[Completion], config: SDPOConfig, *, has_loss: bool = True, feedback: str | None = None
) -> dict[str, float]:
    rows = len(completions)
    texts = [tiny.text_of(completion) for completion in completions]
    scores = torch.tensor([float("2" in text) for text in texts])
    rollout = Rollout(
        prompts=[tiny.user("1 + 1?")] * rows,
        completions=completions,
        completion_lengths=[len(text) for text in texts],
        demonstrations=texts,
        feedback=[feedback] * rows,
        scores=scores,
        rewards=scores[:, None],
    )
    return teacher_context(
        rollout,
        config,
        Reprompter(Renderer(tiny.tokenizer()), config.templates(), False, "middle"),
        has_loss=[has_loss] * rows,
        group_size=rows,
        context_length=math.inf,
        rank=0,
        seed=0,
        gather=list,
    ).metrics


def said(*texts: str) -> list[Completion]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_the_metric_is_the_share_of_completions() -> None:
    completions = said("The correct solution: 2", "2", "The original question.", "3")
    assert metrics_of(completions, SDPOConfig())[NAME] == 0.5
    assert metrics_of(completions, SDPOConfig(), has_loss=False)[NAME] == 0.5


def test_a_phrase_of_feedback_counts_only_in_runs_with_feedback() -> None:
    completions = said("The following is feedback: 2", "2")
    assert metrics_of(completions, SDPOConfig())[NAME] == 0.5
    assert metrics_of(completions, SDPOConfig(include_environment_feedback=False))[NAME] == 0.0


def test_phrases_that_the_inserted_texts_have_as_well_count() -> None:
    """A peer that repeats the templates becomes a demonstration; feedback quotes what it is about."""
    completions = said("Correct solution: 2", "Correct solution:\n\n2")
    assert metrics_of(completions, SDPOConfig())[NAME] == 1.0
    quoted = metrics_of(said("Correct solution: 3"), SDPOConfig(), feedback="'Correct solution: 3' is not 2")
    assert quoted[NAME] == 1.0


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_every_turn_of_a_completion_counts(turn: int) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "Let us add."},
        {"role": "tool", "name": "add", "content": "1"},
        {"role": "assistant", "content": "So it is 1."},
    ]
    assert metrics_of([turns, *said("2")], SDPOConfig())[NAME] == 0.0
    turns[turn]["content"] += " The original question, the original question."
    assert metrics_of([turns, *said("2")], SDPOConfig())[NAME] == 0.5


def test_templates_without_a_phrase_have_no_metric() -> None:
    config = SDPOConfig(
        reprompt_template="{prompt}{solution}{feedback}",
        solution_template="\n{successful_previous_attempt}",
        include_environment_feedback=False,
    )
    assert NAME not in metrics_of(said("Correct solution: 2", "3"), config)


def test_every_step_and_evaluation_has_it(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.conversations(4), eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert logs(trainer, NAME) == [0.0, 0.0]
    assert logs(trainer, f"eval_{NAME}") == [0.0]


def test_a_teacher_prompt_func_has_none(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, teacher_prompt_func=lambda attempt: attempt.prompt)
    trainer.train()
    assert logs(trainer, f"{PREFIX}reprompt_sample_fraction") == [1.0, 1.0]
    assert logs(trainer, NAME) == []

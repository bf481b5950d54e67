"""Student's and teacher's prompts end alike, or the log and the preview say that they do not."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import trl
from datasets import Dataset

from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.diagnose.warnings import different_endings
from sdpo_rl.rollout.prompts import Renderer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
THINKING = [name for name, template in TEMPLATES.items() if "enable_thinking" in template]
QWEN3 = TEMPLATES["qwen3"]
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
RESULT = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "it is 7"},
]
# As the message has them.
HEADER = r"<|im_end|>\n<|im_start|>assistant\n"
EMPTY_THOUGHT = r"<think>\n\n</think>\n\n"


def warning(
    template: str, prompts: list[Any], student: dict[str, Any], teacher: dict[str, Any]
) -> str | None:
    renderer = Renderer(tiny.tokenizer(chat_template=template), template_kwargs=student)
    return different_endings(prompts, renderer, SDPOConfig(apply_chat_template_kwargs=teacher))


def after(template: str, prompt: list[Any], arguments: dict[str, Any]) -> str:
    """What the template writes after the text of the last turn, which stands in the prompt once."""
    text = tiny.tokenizer(chat_template=template).apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **arguments
    )
    _, ending = str(text).split(prompt[-1]["content"])
    return ending


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("prompt", [tiny.user("QUESTION"), [*tiny.user("q"), *RESULT]], ids=["user", "tool"])
def test_the_endings_of_every_template_are_compared(name: str, prompt: list[Any]) -> None:
    template, found = TEMPLATES[name], []
    for student, teacher in itertools.product([{}, OFF, ON], [OFF, ON]):
        endings = [after(template, prompt, student), after(template, prompt, teacher)]
        message = warning(template, [prompt], student, teacher)
        found.append(message is not None)
        assert found[-1] == (endings[0] != endings[1])
        if message is not None:
            assert f"ends with {endings[0]!r}, the teacher's with {endings[1]!r}" in message
    if name in ("glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think"):
        assert any(found)
        assert not all(found)


def test_the_message_names_both_endings_and_the_options() -> None:
    message = warning(QWEN3, [tiny.user("q")], OFF, ON)
    assert message == (
        "apply_chat_template_kwargs={'enable_thinking': True}: the student's prompt ends with "
        f"'{HEADER}{EMPTY_THOUGHT}', the teacher's with '{HEADER}', so the teacher expects another beginning of "
        "the completion, whatever the feedback says. Set them in GRPOConfig.chat_template_kwargs, for both sides, "
        "or remove them."
    )


@pytest.mark.parametrize(
    ("prompts", "student", "teacher"),
    [
        ([tiny.user("q")], OFF, {}),
        ([tiny.user("q")], {}, {}),
        ([tiny.user("q")], OFF, OFF),
        ([tiny.user("q")], {}, ON),
        ([tiny.user("q")], OFF, {"date": "today"}),
        (["q", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"], OFF, ON),
    ],
    ids=[
        "none",
        "none on both sides",
        "the same",
        "the default",
        "another argument",
        "plain and rendered texts",
    ],
)
def test_prompts_that_end_alike_have_no_warning(prompts: list[Any], student: Any, teacher: Any) -> None:
    assert warning(QWEN3, prompts, student, teacher) is None


def test_an_argument_that_changes_only_what_comes_before_has_no_warning() -> None:
    template = "{{ style }}" + tiny.CHAT_TEMPLATE
    assert warning(template, [tiny.user("q")], {"style": "short"}, {"style": "long"}) is None
    assert warning(template, [tiny.user("q")], {"style": "short"}, {"tag": "long"}) is not None


def test_any_prompt_of_the_batch_may_end_otherwise() -> None:
    """Here only what follows a tool's result depends on the argument."""
    template = tiny.CHAT_TEMPLATE.replace("{% if tag %}", "{% if tag and messages[-1]['role'] == 'tool' %}")
    user, tool = tiny.user("q"), [*tiny.user("q"), *RESULT]
    assert warning(template, [user, user, "q"], {}, {"tag": "t"}) is None
    assert warning(template, [user, tool, "q"], {}, {"tag": "t"}) is not None


def test_a_template_without_the_text_of_a_turn_has_no_ending() -> None:
    template = "{% if style %}{{ style }}{% endif %}<bot>"
    assert warning(template, [tiny.user("q")], {}, {"style": "long"}) is None


def test_parts_of_text_are_a_turn_too() -> None:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert warning(tiny.CHAT_TEMPLATE, [prompt], {}, {"tag": "t"}) is not None


def trainer(folder: Path, student: Any, teacher: Any, data: Any = None) -> SDPOTrainer:
    return tiny.trainer(
        folder,
        processing_class=tiny.tokenizer(chat_template=QWEN3),
        sdpo_config=tiny.config(apply_chat_template_kwargs=teacher),
        train_dataset=data,
        chat_template_kwargs=student,
        max_steps=3,
    )


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        text for record in caplog.records if "apply_chat_template_kwargs=" in (text := record.getMessage())
    ]


@pytest.mark.parametrize(
    ("teacher", "data", "count"),
    [(ON, None, 1), ({}, None, 0), (OFF, None, 0), (ON, "plain", 0)],
    ids=["otherwise", "without the option", "alike", "plain text"],
)
def test_a_run_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, teacher: Any, data: str | None, count: int
) -> None:
    run = trainer(tmp_path, OFF, teacher, None if data is None else tiny.plain())
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        run.train()
    assert len(messages(caplog)) == count


@pytest.mark.parametrize("differ", [True, False])
def test_a_preview_shows_the_endings(tmp_path: Path, differ: bool) -> None:
    shown = trainer(tmp_path, OFF, ON if differ else OFF).preview(1)
    (row,) = shown.rows
    student, teacher = (HEADER + text for text in (EMPTY_THOUGHT, "" if differ else EMPTY_THOUGHT))
    assert row.student_prompt.text.endswith(student.encode().decode("unicode_escape"))
    assert row.teacher_prompt.text.endswith(teacher.encode().decode("unicode_escape"))
    lines = [line for line in str(shown).splitlines() if "the teacher's with" in line]
    assert [line for line in lines if f"'{student}'" in line and f"'{teacher}'" in line] == lines
    assert len(lines) == differ
    assert (shown.different_endings is not None) == differ


def test_rendered_prompts_have_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "<|im_start|>user\nsay 6<|im_end|>\n<|im_start|>assistant\n"
    run = trainer(tmp_path, OFF, ON, Dataset.from_dict({"prompt": [text] * 8}))
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        shown = run.preview(1)
    assert messages(caplog) == []
    assert shown.different_endings is None

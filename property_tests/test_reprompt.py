"""Teacher contexts: texts against concatenation, the table of cases, and what templates and rows refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdpo.reprompt import Templates, build_reprompts, distillation_mask, select_demonstrations

NASTY = st.text(alphabet="a \n{}%$\\", max_size=6) | st.sampled_from(
    ["{prompt}", "{solution}", "{feedback}", "{feedback_raw}", "{successful_previous_attempt}", "{{}}", "{0}"]
)
LITERAL = st.text(alphabet="x\n{}:!", max_size=4)


def escaped(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


@st.composite
def frames(draw: st.DrawFn) -> tuple[Templates, dict[str, list[str]]]:
    """Templates together with their pieces: literals as they are to appear, fields as one-element tuples."""
    pieces: dict[str, list[Any]] = {}
    fields = {
        "reprompt": draw(st.permutations(["prompt", "solution", "feedback"])),
        "solution": ["successful_previous_attempt"],
        "feedback": ["feedback_raw"],
    }
    for name, names in fields.items():
        pieces[name] = [draw(LITERAL)]
        for field in names:
            pieces[name] += [(field,), draw(LITERAL)]
    texts = {
        name: "".join(escaped(p) if isinstance(p, str) else "{" + p[0] + "}" for p in parts)
        for name, parts in pieces.items()
    }
    return Templates(**texts), pieces


def fill(pieces: Sequence[Any], values: dict[str, str]) -> str:
    return "".join(piece if isinstance(piece, str) else values[piece[0]] for piece in pieces)


def naive_text(
    pieces: dict[str, list[Any]], prompt: str, shown: list[str], hint: str | None, only: bool
) -> str:
    """Concatenation of pieces: nothing is ever formatted."""
    shown = [text for text in shown if text.strip() != ""]
    used = hint is not None and hint.strip() != "" and not (only and len(shown) > 0)
    if not shown and not used:
        return prompt
    solution = "".join(fill(pieces["solution"], {"successful_previous_attempt": text}) for text in shown)
    remark = fill(pieces["feedback"], {"feedback_raw": hint or ""}) if used else ""
    return fill(pieces["reprompt"], {"prompt": prompt, "solution": solution, "feedback": remark})


ROWS = st.lists(
    st.tuples(NASTY, st.lists(NASTY, max_size=3), st.none() | NASTY | st.just(" \n\t")), max_size=5
)
SURE_ROW = ("{solution}", ["{feedback}", "{successful_previous_attempt}"], "{prompt}{{")
DEFAULT_PIECES = {
    "reprompt": [("prompt",), ("solution",), ("feedback",), "\n\nCorrectly solve the original question."],
    "solution": ["\nCorrect solution:\n\n", ("successful_previous_attempt",)],
    "feedback": [
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n",
        ("feedback_raw",),
    ],
}


@given(frames(), ROWS, st.booleans())
@example((Templates(), DEFAULT_PIECES), [SURE_ROW], True)
@example((Templates(), DEFAULT_PIECES), [SURE_ROW], False)
def test_texts_equal_plain_concatenation(
    frame: tuple[Templates, dict[str, list[Any]]], rows: list[tuple[str, list[str], str | None]], only: bool
) -> None:
    templates, pieces = frame
    prompts, shown, hints = ([row[i] for row in rows] for i in range(3))
    built = build_reprompts(prompts, shown, hints, templates=templates, feedback_only_without_solution=only)
    assert built.texts == [naive_text(pieces, *row, only) for row in rows]
    assert built.row_mask == [text != prompt for text, prompt in zip(built.texts, prompts, strict=True)]
    for mask in (True, False):
        assert distillation_mask(shown, hints, feedback_only_without_solution=mask) == built.row_mask
    for active, shows, uses in zip(*built[1:], strict=True):
        assert active == (shows or uses)
        assert not (only and shows and uses)


def chained_replace(prompt: str, shown: list[str], hint: str) -> str:
    t = Templates()
    solution = "".join(t.solution.replace("{successful_previous_attempt}", text) for text in shown)
    remark = t.feedback.replace("{feedback_raw}", hint)
    text = t.reprompt.replace("{prompt}", prompt).replace("{solution}", solution)
    return text.replace("{feedback}", remark)


def formatted_twice(prompt: str, shown: list[str], hint: str) -> str:
    t = Templates()
    frame = t.reprompt.replace("{solution}", t.solution * len(shown)).replace("{feedback}", t.feedback)
    values = {"feedback_raw": hint, "successful_previous_attempt": "".join(shown), "prompt": prompt}
    return frame.format(**values)


@pytest.mark.parametrize("counter_example", [chained_replace, formatted_twice])
def test_plain_concatenation_rejects_texts_that_are_formatted_again(
    counter_example: Callable[..., str],
) -> None:
    assert counter_example("q", ["s"], "f") == naive_text(DEFAULT_PIECES, "q", ["s"], "f", False)
    assert counter_example(*SURE_ROW) != naive_text(DEFAULT_PIECES, *SURE_ROW, False)


CASES = {  # rewards of the group, feedback of the row 0 -> shows a demonstration, uses feedback
    "no success, no feedback": ([0.0, 0.0], None, False, False),
    "no success, feedback": ([0.0, 0.0], "wrong", False, True),
    "failed, a success exists": ([0.0, 1.0], "wrong", True, False),
    "successful, another exists": ([1.0, 1.0], "fine", True, False),
    "the only success": ([1.0, 0.0], "", False, False),
    "all succeed": ([1.0, 1.0], None, True, False),
}


def table_row(
    rewards: list[float], hint: str | None, *, exclude_self: bool = True, only: bool = True
) -> tuple:
    chosen = select_demonstrations(
        rewards, [0, 0], success_threshold=1.0, exclude_self=exclude_self, policy="random", seed=3
    )
    shown = [[f"answer {j}" for j in row] for row in chosen]
    built = build_reprompts(
        ["q", "q"], shown, [hint, None], templates=Templates(), feedback_only_without_solution=only
    )
    return built.has_demonstration[0], built.uses_feedback[0], built.row_mask[0]


@pytest.mark.parametrize("case", CASES)
def test_the_case_table(case: str) -> None:
    rewards, hint, shows, uses = CASES[case]
    assert table_row(rewards, hint) == (shows, uses, shows or uses)


def test_the_case_table_rejects_other_rules() -> None:
    for rule in ({"exclude_self": False}, {"only": False}):
        assert any(table_row(r, h, **rule) != (s, u, s or u) for r, h, s, u in CASES.values())


@given(st.lists(st.tuples(NASTY, st.none() | NASTY, st.booleans()), max_size=5), st.booleans())
@example([("q", "why", True), ("q", "why", False)], True)
def test_feedback_on_a_success_has_words_of_its_own(
    rows: list[tuple[str, str | None, bool]], only: bool
) -> None:
    templates = Templates(feedback="FAILED {feedback_raw}", success_feedback="RIGHT {feedback_raw}")
    prompts, hints, succeeded = ([row[i] for row in rows] for i in range(3))
    built = build_reprompts(
        prompts,
        [[]] * len(rows),
        hints,
        templates=templates,
        feedback_only_without_solution=only,
        succeeded=succeeded,
    )
    for text, prompt, hint, right in zip(built.texts, prompts, hints, succeeded, strict=True):
        if hint is None or not hint.strip():
            assert text == prompt
        else:
            words = "RIGHT " if right else "FAILED "
            assert text == prompt + words + hint + "\n\nCorrectly solve the original question."


def test_no_row_has_succeeded_unless_it_is_said() -> None:
    shown = {"templates": Templates(), "feedback_only_without_solution": True}
    plain = build_reprompts(["q"], [[]], ["why"], **shown)
    assert plain == build_reprompts(["q"], [[]], ["why"], succeeded=[False], **shown)
    assert plain != build_reprompts(["q"], [[]], ["why"], succeeded=[True], **shown)
    with pytest.raises(ValueError, match="succeeded: expected 1 entries"):
        build_reprompts(["q"], [[]], ["why"], succeeded=[True, False], **shown)
    with pytest.raises(TypeError, match=r"succeeded\[0\]: expected bool, got float"):
        build_reprompts(["q"], [[]], ["why"], succeeded=[1.0], **shown)  # type: ignore[list-item]


def test_several_demonstrations_pass_through_the_solution_template_once_each() -> None:
    templates = Templates(
        reprompt="{prompt}|{solution}|{feedback}", solution="<{successful_previous_attempt}>"
    )
    built = build_reprompts(
        ["q"], [["a", " ", "b"]], [None], templates=templates, feedback_only_without_solution=True
    )
    assert built.texts == ["q|<a><b>|"]


def test_the_default_templates_are_the_published_strings() -> None:
    assert Templates() == Templates(
        reprompt="{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        solution="\nCorrect solution:\n\n{successful_previous_attempt}",
        feedback="\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}",
        success_feedback="\nThe following is feedback from your successful earlier attempt:\n\n{feedback_raw}",
    )
    with pytest.raises(FrozenInstanceError):
        Templates().solution = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reprompt": "{prompt}{solution}"}, ValueError, r"missing \['feedback'\]"),
        ({"reprompt": "{prompt}{solution}{feedback}{x}"}, ValueError, r"unknown \['x'\]"),
        ({"reprompt": "{prompt}{prompt}{solution}{feedback}"}, ValueError, r"repeated \['prompt'\]"),
        ({"solution": "{}"}, ValueError, r"unknown \[''\]"),
        ({"solution": "{0}{successful_previous_attempt}"}, ValueError, r"unknown \['0'\]"),
        (
            {"solution": "none"},
            ValueError,
            "solution: expected a template with {successful_previous_attempt} exactly once",
        ),
        ({"solution": "{{successful_previous_attempt}}"}, ValueError, "missing"),
        ({"feedback": "{feedback_raw!r}"}, ValueError, "no conversion"),
        ({"feedback": "{feedback_raw:>9}"}, ValueError, "no format spec"),
        ({"feedback": "{feedback_raw.x}"}, ValueError, r"unknown \['feedback_raw.x'\]"),
        ({"feedback": "{feedback_raw[0]}"}, ValueError, "unknown"),
        ({"feedback": "{feedback_raw"}, ValueError, "literal braces as {{ and }}"),
        ({"feedback": "}{feedback_raw}"}, ValueError, "feedback: expected .* literal braces"),
        ({"success_feedback": "{x}"}, ValueError, r"success_feedback: expected .*unknown \['x'\]"),
        (
            {"feedback": None},
            TypeError,
            r"feedback: expected a template string with \{feedback_raw\}, got NoneType",
        ),
    ],
)
def test_templates_refuse_wrong_fields_when_made(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Templates(**changes)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ((["q"], ["text"], [None]), TypeError, r"demonstrations\[0\]: expected a sequence, got str"),
        ((["q"], [[3]], [None]), TypeError, r"demonstrations\[0\]\[0\]: expected str, got int"),
        ((["q"], [[]], [float("nan")]), TypeError, r"feedback\[0\]: expected str or NoneType, got float"),
        ((["q"], [None], [None]), TypeError, r"demonstrations\[0\]"),
        (("q", [[]], [None]), TypeError, "prompts: expected a sequence, got str"),
        (([["q"]], [[]], [None]), TypeError, r"prompts\[0\]: expected str, got list"),
        ((["q"], [[], []], [None, None]), ValueError, "prompts: expected 2 entries"),
        ((["q"], [[], []], [None]), ValueError, "demonstrations: expected 1 entries"),
    ],
)
def test_texts_refuse_bad_rows_by_name(columns: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_reprompts(*columns, templates=Templates(), feedback_only_without_solution=True)


def test_options_are_checked() -> None:
    with pytest.raises(TypeError, match=r"templates: expected sdpo\.Templates, got dict"):
        build_reprompts([], [], [], templates={}, feedback_only_without_solution=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="feedback_only_without_solution: expected a bool"):
        distillation_mask([], [], feedback_only_without_solution=None)  # type: ignore[arg-type]

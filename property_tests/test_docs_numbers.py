"""Thresholds and counts that the pages state in words are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from trl import GRPOConfig

from sdpo_rl.credit import files, recorder
from sdpo_rl.diagnose import monitors, settings, warnings
from sdpo_rl.diagnose.probe import verdict

ROOT = Path(__file__).parents[1]
WORDS = {
    0.125: "an eighth",
    0.2: "a fifth",
    0.25: "a quarter",
    0.5: "half",
    0.9: "nine tenths",
    3: "three",
    3.5: "three and a half",
    4: "four",
    5: "five",
    8: "eight",
    12: "twelve",
    15: "fifteen",
}


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text().split())


def short(number: float) -> str:
    return f"{number:g}".removeprefix("0")


def test_the_warnings_of_a_run_come_at_the_limits_of_the_page() -> None:
    text = page("docs/metrics.md").partition("## What the trainer warns of")[2]
    rise, alone = monitors.CUT_RISE_WITH_ENTROPY, monitors.CUT_RISE_ALONE
    ratio, nats = monitors.ENTROPY_RATIO, monitors._ENTROPY_RISE
    fall, evaluations = monitors.HELD_OUT_FALL, monitors.FALLEN_EVALUATIONS
    for sentence in (
        f'"Start" is the mean of the first {WORDS[monitors.WINDOW]} logged values, "now" the mean of the last '
        f"{WORDS[monitors.WINDOW]}.",
        f"the mean of the last {WORDS[monitors.LONG_WINDOW]} values, of the entropy as well",
        f"{WORDS[monitors.LONG_WINDOW]} values are {monitors.LONG_WINDOW * GRPOConfig.logging_steps} steps",
        f"now {WORDS[rise]} more of the completions than at the start, or {WORDS[alone]} more where the student's "
        "entropy is not above its start",
        f"must also rise by {WORDS[monitors.CUT_STANDARD_ERRORS]} standard errors, and the training reward fall by "
        f"{WORDS[monitors.REWARD_STANDARD_ERRORS]}.",
        f"now {WORDS[ratio]} times that of the start or more, and by {WORDS[nats]} a nat at least",
        f"the mean of the last {WORDS[monitors.LONG_WINDOW]} is below the best such mean by more than "
        f"{WORDS[monitors.REWARD_FALL]} of the range of logged rewards",
        f"less than {WORDS[warnings._COLLAPSED_LENGTH]} of the mean length of the first "
        f"{WORDS[warnings._BASELINE_BATCHES]}",
        f"{WORDS[evaluations]} evaluations in succession are below the best mean of {WORDS[evaluations]} by more "
        f"than {WORDS[fall]} of the range of rewards, and the training reward fell by less",
        f"now less than {short(monitors._NO_DIVERGENCE)} |",
        f"now {WORDS[monitors._MANY_ANSWERS]} or more of them",
        f"more than {WORDS[warnings._MANY_TRUNCATED]} of a generation batch",
        f"less than {WORDS[warnings._LOW_TOPK_MASS]} |",
        f"more than {WORDS[settings._FAST_PACE]} times the paper's rate",
    ):
        assert sentence in text, sentence
    assert f"{short(monitors._MANY_ANSWERS)} or more: the answer is in the feedback" in page(
        "docs/metrics.md"
    )
    assert f"more than {WORDS[settings._FAST_PACE]} times as fast as the paper's" in page("docs/teacher.md")


def test_every_warning_of_the_page_is_one_of_the_trainer() -> None:
    """Each text of the first column, between its dots, is a part of one message."""
    rows = re.findall(
        r"^\| ([^|]*) \| .* \| .* \| .* \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    quoted = [row for row in rows if row not in ("warning", "---")]
    known = [
        "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        for module in (monitors, settings, warnings)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.JoinedStr)
    ] + [
        node.value
        for module in (settings, warnings)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    def is_message(text: str) -> bool:
        parts = [part.strip() for part in text.replace("`", "").split("…") if part.strip()]
        return any(all(part in message for part in parts) for message in known)

    assert len(quoted) == 15
    assert [text for text in quoted if not is_message(text)] == []
    assert not is_message("The run is doing fine")


def test_the_rules_of_the_probe_fire_at_the_limits_of_the_page() -> None:
    rules = dict(
        re.findall(r"^\| `(\w+)` \| \w+ \| (.*) \|$", (ROOT / "docs/probe.md").read_text(), re.MULTILINE)
    )
    for rule, words in {
        "solved": f"{verdict.SOLVED:.0%}".replace("%", " %"),
        "no_better": "two standard errors",
        "no_divergence": f"less than {monitors._NO_DIVERGENCE} nats",
        "few_rows": f"fewer than {WORDS[verdict.FEW_ROWS]}",
        "outside": f"less than {warnings._LOW_TOPK_MASS:.0%}".replace("%", " %"),
        "cut_completions": f"{WORDS[verdict.MANY_CUT]} of the completions",
        "cut_prompts": f"more than {WORDS[warnings._MANY_TRUNCATED]}",
        "unmoved": f"{WORDS[verdict.MOSTLY_UNMOVED]} of the difference",
        "answer_in_feedback": f"{WORDS[monitors._MANY_ANSWERS]} of the feedback texts",
        "fast_teacher": f"more than {settings._FAST_PACE} times",
    }.items():
        assert words in rules[rule], rule
    assert verdict.CERTAIN == 2


def test_the_sizes_of_what_a_run_writes_are_those_of_the_page() -> None:
    text = page("docs/report.md")
    characters = f"{recorder.MOST_CHARACTERS // 2:,}".replace(",", " ")
    for sentence in (
        f"at most {files.CREDIT_LIMIT // 2**20} MiB",
        f"the first {recorder.MOST_TOKENS} tokens are kept",
        f"the first and the last {characters} characters",
        f"the {WORDS[recorder.LIKELIEST]} likeliest tokens of both models",
    ):
        assert sentence in text, sentence


def test_methods_and_recipes_are_as_many_as_the_pages_say() -> None:
    tree = ast.parse((ROOT / "examples/zoo/losses.py").read_text())
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "examples/zoo/README.md").read_text(), re.MULTILINE)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    methods = WORDS[len(table)]
    assert set(table) <= functions
    assert f"{methods} losses of the papers" in page("examples/README.md")
    assert f"{methods} methods" in page("CHANGELOG.md")
    assert f"[zoo](../examples/zoo/README.md) has {methods} methods" in page("docs/own-loop.md")
    recipes = WORDS[len(list((ROOT / "examples/recipes").glob("*.yaml")))]
    assert f"[examples/recipes](examples/recipes/README.md) has {recipes}" in page("README.md")

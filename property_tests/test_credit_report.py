"""The report: one file that loads nothing, shows every text as text, and says what the run's files say."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpo_rl import credit_report
from sdpo_rl.cli import main
from sdpo_rl.credit import curves, files
from sdpo_rl.credit.report import render
from sdpo_rl.credit.run import Run, Warned

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "&lt;b&gt; & \"quotes\" 'single' {{ 7 * 7 }} {% raw %}",
    "left \u202eright\u2066\u200b",
    "bell \x07 null \x00 escape \x1b[31m\r",
    "\u2028 \U000e0041",
)
PLAIN = "harmless"


def row(step: int, written: tuple[str, ...] = (PLAIN,), **changes: Any) -> dict[str, Any]:
    """A row whose every text is hostile, or harmless."""
    joined = "\n".join(written)
    count = len(written)
    top = [[[0, 0.5], [1, 0.25]]] * count
    return {
        "step": step,
        "row": 3,
        "score": 0.0,
        "success": False,
        "feedback": joined,
        "feedback_used": True,
        "demonstrations": [{"row": 1, "text": joined}],
        "demonstration_used": True,
        "truncated": False,
        "dropped": False,
        "divergence": 0.25,
        "prompt": joined,
        "teacher_prompt": joined,
        "ids": list(range(count)),
        "tokens": list(written),
        "tokens_left_out": 0,
        "log_prob": [-0.5] * count,
        "log_ratio": [-2.0] * count,
        "token_divergence": [0.25] * count,
        "student_top": top,
        "teacher_top": top,
        "texts": {"0": written[0], "1": written[-1]},
        **changes,
    }


def silent(step: int) -> dict[str, Any]:
    gone = {"log_prob", "log_ratio", "token_divergence", "student_top", "teacher_top", "texts"}
    kept = {name: value for name, value in row(step).items() if name not in gone}
    return {**kept, "divergence": None, "teacher_prompt": None, "feedback": None, "demonstrations": []}


def entries(text: str = PLAIN, steps: int = 3, **changes: float) -> list[dict[str, Any]]:
    logs = [
        {
            "step": step,
            "reward": step / steps,
            "self_distillation/divergence": 0.5 / step,
            "self_distillation/student_entropy": 1.0,
            **changes,
        }
        for step in range(1, steps + 1)
    ]
    return [
        {"step": 0, "options": {"alpha": 0.5, "reprompt_template": text}},
        *logs,
        {"step": 2, "warning": "entropy", "message": text},
    ]


def run_folder(folder: Path, rows: list[dict[str, Any]] | None = None, log: Any = None) -> Path:
    folder.mkdir(parents=True)
    files.append(folder / files.LOG, entries() if log is None else log)
    if rows is not None:
        files.append(folder / files.CREDIT, rows)
    return folder


class Page(HTMLParser):
    """Tags, attributes, the content of scripts and styles, and the text of everything else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attributes]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside].append(data)
        else:
            self.text += data


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def data_of(read: Page) -> Any:
    return json.loads(read.raw["script"][0])


def rendered(path: Path, folder: Path) -> str:
    """The document after its script has run in a browser."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            path.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    return done.stdout


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


# --- one file, in which everything is text ----------------------------------------------------------------


def test_the_file_loads_nothing_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    text = credit_report(run_folder(tmp_path / "run", [row(1)])).read_text()
    read = Page(text)
    (policy,) = [value for name, value in read.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    digests = {
        kind: base64.b64encode(hashlib.sha256(read.raw[kind][-1].encode()).digest()).decode()
        for kind in ("script", "style")
    }
    for kind, digest in digests.items():
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not [value for name, value in read.attributes if name in ("src", "srcset", "action", "style")]
    assert all(value.startswith("#") for name, value in read.attributes if name == "href")
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "http" not in text.replace("http-equiv", "")
    assert "innerHTML" not in text


@pytest.mark.parametrize("name", ["run", "a<script>alert(1)&amp;\u202e"])
def test_hostile_texts_change_no_tag_and_arrive_whole(tmp_path: Path, name: str) -> None:
    whole = "\n".join(HOSTILE)
    harmless = page(credit_report(run_folder(tmp_path / "harmless", [row(1), silent(2)])))
    rows = [row(1, HOSTILE), silent(2)]
    hostile = page(credit_report(run_folder(tmp_path / name, rows, entries(whole))))
    assert hostile.tags == harmless.tags
    assert hostile.tags["script"] == 2
    assert Counter(name for name, _ in hostile.attributes) == Counter(name for name, _ in harmless.attributes)
    assert data_of(hostile)["runs"][0] == {"name": name, "rows": json.loads(json.dumps(rows))}
    # The warning, which is in the page itself; a parser reads "\r" as a line's end and drops NUL.
    shown = [line for line in re.split(r"[\r\n]", whole.replace("\x00", "\ufffd")) if line.strip()]
    got = hostile.text.replace("\x00", "\ufffd")
    assert all(html.unescape(line) in got or line in got for line in shown)


def test_an_unescaped_page_would_be_found(tmp_path: Path) -> None:
    """The counter-example: a page that inserts the same texts as they are has other tags."""
    path = credit_report(run_folder(tmp_path / "run", [row(1)]))
    text = path.read_text().replace(PLAIN, HOSTILE[0])
    assert Page(text).tags["script"] > 2


@needs_browser
def test_no_script_of_a_completion_runs_in_a_browser(tmp_path: Path) -> None:
    path = credit_report(run_folder(tmp_path / "run", [row(1, HOSTILE)], entries("\n".join(HOSTILE))))
    shown = rendered(path, tmp_path)
    assert "<title>SDPO credit report: run</title>" in shown
    read = Page(shown)
    assert read.tags["img"] == 0
    assert read.tags["script"] == 2
    assert read.text.count("document.title='broken'") > 6
    # Direction and control characters are shown, not obeyed.
    assert "‹U+202E›right‹U+2066›‹U+200B›" in read.text
    assert "bell ␇ null ␀ escape ␛[31m␍" in read.text
    assert "‹U+2028› ‹U+E0041›" in read.text
    text = path.read_text()
    naive = tmp_path / "naive.html"  # the counter-example
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    for escaped, character in (("\\u003c", "<"), ("\\u003e", ">"), ("\\u0027", "'")):
        text = text.replace(escaped, character)
    naive.write_text(text)
    assert "<title>broken</title>" in rendered(naive, tmp_path)


@needs_browser
def test_a_token_shows_both_models_by_keyboard(tmp_path: Path) -> None:
    rows = [row(1, ("one", "two", "three"), log_ratio=[1.0, -3.0, None], texts={"0": "uno", "1": "dos"})]
    path = credit_report(run_folder(tmp_path / "run", rows))
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    press = """
    const first = document.querySelector(".tok");
    first.focus();
    first.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
    """
    driven = tmp_path / "driven.html"
    driven.write_text(text.replace("</body>", f"<script>{press}</script></body>"))
    shown = rendered(driven, tmp_path)
    inspector = shown.split('id="inspector"')[1].split("<script")[0]
    assert "hidden" not in inspector.split(">")[0]
    read = Page(inspector)
    assert "log q − log p = −3.00: student 61%, teacher 3.0%" in read.text
    assert read.text.count("uno") == read.text.count("dos") == 2
    tokens = re.findall(r'<span class="tok[^>]*>', shown)
    assert len(tokens) == 3
    assert ["--more" in tokens[0], "--less" in tokens[1], "none" in tokens[2]] == [True, True, True]
    assert [re.search(r'tabindex="(-?\d)"', token)[1] for token in tokens] == ["-1", "0", "-1"]


@needs_browser
@pytest.mark.parametrize(
    ("set_up", "scores"),
    [
        ("", [1.0, 0.5, 0.0]),  # by divergence
        ("form.sort.value = 'oldest'", [0.0, 0.5, 1.0]),
        ("form.sort.value = 'agreement'", [0.0, 0.5, 1.0]),
        ("form.low.value = '0.2'", [1.0, 0.5]),
        ("form.low.value = '0.2'; form.high.value = '0.7'", [0.5]),
        ("form.kind.value = 'success'", [1.0]),
        ("form.kind.value = 'silent'", []),
    ],
)
def test_rows_are_filtered_and_sorted(tmp_path: Path, set_up: str, scores: list[float]) -> None:
    rows = [
        row(step, score=score, success=score == 1.0, divergence=score + 0.1)
        for step, score in ((1, 0.0), (2, 0.5), (3, 1.0))
    ]
    path = credit_report(run_folder(tmp_path / "run", rows))
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    change = (
        f"const form = document.getElementById('tools'); {set_up}; form.dispatchEvent(new Event('input'));"
    )
    driven = tmp_path / "driven.html"
    driven.write_text(text.replace("</body>", f"<script>{change}</script></body>"))
    shown = rendered(driven, tmp_path)
    assert [float(score) for score in re.findall(r"score <b>([\d.]+)</b>", shown)] == scores


# --- what is in it ----------------------------------------------------------------------------------------


def test_a_run_without_rows_has_its_curves(tmp_path: Path) -> None:
    read = page(credit_report(run_folder(tmp_path / "run")))
    assert read.tags["figure"] == 3
    assert "No completions were kept" in read.text
    assert data_of(read)["charts"][0]["lines"] == [
        {"label": "training", "steps": [1, 2, 3], "values": [1 / 3, 2 / 3, 1.0]}
    ]


def test_the_curves_of_grpo_come_from_the_trainer_s_state(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        history = [{"step": i, "reward": i / 10, "entropy": 0.5} for i in range(1, step + 1)]
        state = {"global_step": step, "log_history": history}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-20").mkdir()  # the run ended while it wrote this one
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"global_st')
    read = page(credit_report(tmp_path))
    lines = [line for chart in data_of(read)["charts"] for line in chart["lines"]]
    assert [(line["label"], len(line["steps"])) for line in lines] == [("training", 10), ("student", 10)]


def test_two_runs_are_beside_each_other(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a" / "output", [row(1)], entries(steps=4))
    other_log = [{**entry, "options": {"alpha": 1.0}} if "options" in entry else entry for entry in entries()]
    second = run_folder(tmp_path / "b" / "output", [row(2), silent(3)], other_log)
    path = credit_report(first, second, tmp_path / "both.html")
    assert path == tmp_path / "both.html"
    data = data_of(page(path))
    assert [run["name"] for run in data["runs"]] == ["a/output", "b/output"]
    assert [len(run["rows"]) for run in data["runs"]] == [1, 2]
    assert [line["label"] for line in data["charts"][0]["lines"]] == [
        "a/output: training",
        "b/output: training",
    ]
    assert re.search(r"<dt>alpha</dt><dd>0.5</dd><dd>1.0</dd>", path.read_text())
    same = data_of(page(credit_report(first, first)))
    assert len({run["name"] for run in same["runs"]}) == 2


def test_warnings_are_on_the_chart_that_they_are_about(tmp_path: Path) -> None:
    log = [*entries(), {"step": 3, "warning": "unknown", "message": "something else"}]
    text = credit_report(run_folder(tmp_path / "run", log=log)).read_text()
    charts = re.findall(r"<figure.*?</figure>", text, re.S)
    assert [chart.count('class="mark"') for chart in charts] == [0, 0, 1]
    assert "Entropy" in charts[2]
    assert f"<title>{PLAIN}</title>" in charts[2]
    assert "something else" in text


def test_warnings_of_two_runs_at_one_step_share_a_mark_with_both_texts(tmp_path: Path) -> None:
    first, second = (run_folder(tmp_path / name, log=entries(f"{name} became random")) for name in ("a", "b"))
    text = credit_report(first, second).read_text()
    (mark,) = re.findall(r'<g class="mark">.*?</g>', text, re.S)
    assert "<title>1: a became random\n2: b became random</title>" in mark
    assert re.findall(r"<text[^>]*>(.*?)</text>", mark) == ["1, 2"]
    assert mark.count("<line") == 1


@given(st.lists(st.integers(1, 100), max_size=12))
def test_no_label_of_a_mark_hides_another_and_no_warning_is_lost(steps: list[int]) -> None:
    history = [{"step": step, "reward": 0.5} for step in (1, 100)]
    warned = [Warned(step, "held_out", f"message {number}") for number, step in enumerate(steps, 1)]
    (chart,) = curves.charts([Run("run", {}, history, warned, [])])
    spans = [(mark.at - mark.width / 2, mark.at + mark.width / 2) for mark in chart.marks]
    assert all(before[1] <= after[0] + 0.11 for before, after in pairwise(spans))
    assert all(low >= 0 and high <= curves.WIDTH for low, high in spans)
    shown = [int(number) for mark in chart.marks for number in re.findall(r"message (\d+)", mark.text)]
    assert sorted(shown) == [*range(1, len(steps) + 1)]
    assert len({place for mark in chart.marks for place in mark.places}) == len({*steps})


def test_every_monitor_has_a_chart() -> None:
    source = "".join(
        (ROOT / "adapters" / "sdpo_rl" / "diagnose" / name).read_text()
        for name in ("monitors.py", "warnings.py")
    )
    names = set(re.findall(r'_warn(?:_once)?\(\s*"(\w+)"', source)) | {
        "length_limit",
        "entropy",
        "reward",
        "agreement",
        "held_out",
        "answer_in_feedback",
    }
    assert {name for panel in curves.PANELS for name in panel.warnings} == names


def test_held_out_rewards_are_a_curve_of_their_own() -> None:
    history = [{"step": 1, "reward": 0.1}, {"step": 1, "eval_reward": 0.3}, {"step": 2, "reward": 0.2}]
    (chart,) = curves.charts([Run("run", {}, history, [], [])])
    assert [(line.label, line.steps, line.values) for line in chart.lines] == [
        ("training", [1, 2], [0.1, 0.2]),
        ("held-out", [1], [0.3]),
    ]


def test_the_text_of_the_templates_has_a_chart_of_shares() -> None:
    history = [{"step": step, "self_distillation/reprompt_text_fraction": step / 4} for step in (1, 2)]
    (chart,) = curves.charts([Run("run", {}, history, [], [])])
    assert chart.title == "Text of the templates"
    assert [(line.steps, line.values) for line in chart.lines] == [([1, 2], [0.25, 0.5])]


values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(values, st.integers(1, 1000))
def test_every_point_and_mark_is_inside_its_chart(numbers: list[float], stride: int) -> None:
    history = [{"step": stride * i, "reward": value} for i, value in enumerate(numbers, 1)]
    warning = Warned(10**6, "held_out", "late")
    (chart,) = curves.charts([Run("run", {}, history, [warning], [])])
    (line,) = chart.lines
    assert line.values == numbers
    points = [
        tuple(map(float, point.split(",")))
        for point in (line.path + " " + line.smooth).split(" ")
        if point
        for point in [point.lstrip("M")]
    ]
    inside = [
        curves.LEFT - 0.1 <= x <= curves.WIDTH - curves.RIGHT + 0.1
        and curves.TOP - 0.1 <= y <= curves.HEIGHT - curves.BOTTOM + 0.1
        for x, y in [*points, (chart.marks[0].at, curves.TOP)]
    ]
    assert all(inside)
    ticks = [tick.at for tick in chart.y_ticks]
    assert min(ticks) == pytest.approx(curves.TOP)
    assert max(ticks) == pytest.approx(curves.HEIGHT - curves.BOTTOM)
    assert len(ticks) <= 7


def _fits(text: str) -> bool:
    """In DejaVu Sans of 11 units, a wide font, with a gap of 5 to the axis."""
    width = {".": 3.5, "−": 9.2, "+": 9.2, "e": 6.8}
    return sum(width.get(character, 7.0) for character in text) <= curves.LEFT - 5


@given(st.floats(1e-9, 9e9), st.sampled_from([-1, 1]))
def test_ticks_fit_beside_their_axis(largest: float, sign: int) -> None:
    history = [{"step": 1, "reward": sign * largest}, {"step": 2, "reward": sign * largest / 3}]
    (chart,) = curves.charts([Run("run", {}, history, [], [])])
    assert all(_fits(tick.text) for tick in chart.y_ticks)
    found = [float(tick.text.replace("−", "-")) for tick in chart.y_ticks]
    assert found[0 if sign < 0 else -1] == pytest.approx(sign * max(map(abs, found)))
    assert max(map(abs, found)) >= largest * (1 - 1e-6)


def test_ticks_of_three_digits_with_an_exponent_would_not_fit() -> None:
    assert not _fits("−1.5e+03")
    assert not _fits("−1.5e−05")


def test_lengths_in_thousands_are_whole_numbers() -> None:
    history = [{"step": step, "completions/mean_length": 1500.0 + step} for step in (1, 2)]
    (chart,) = curves.charts([Run("run", {}, history, [], [])])
    assert [tick.text for tick in chart.y_ticks] == ["0", "500", "1000", "1500", "2000"]


def test_the_rate_is_shown_with_the_samples_that_it_is_given_for(tmp_path: Path) -> None:
    options = {"teacher_update_rate": 0.05, "teacher_rate_samples": 256}
    text = render([Run("run", options, [{"step": 1, "reward": 0.1}], [], [])])
    assert "<dt>teacher_rate_samples</dt><dd>256</dd>" in text


def test_a_long_series_is_averaged_and_keeps_its_end() -> None:
    history = [{"step": step, "reward": float(step % 2)} for step in range(1, 10_001)]
    (chart,) = curves.charts([Run("run", {}, history, [], [])])
    (line,) = chart.lines
    assert len(line.steps) == 400
    assert line.steps[-1] == 10_000
    assert set(line.values) <= {0.48, 0.52, 0.5}


# --- mistakes, and the command ----------------------------------------------------------------------------


def test_the_command_writes_the_file_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", [row(1)])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'sdpo_report.html'}\n"
    other = tmp_path / "new" / "r.html"
    assert main(["report", str(folder), str(folder), "--output", str(other)]) == 0
    assert other.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/missing"], "RUN_DIR: expected the output_dir of a run"),
        (["{}/empty"], "RUN_DIR: expected sdpo_log.jsonl, or a checkpoint with trainer_state.json"),
        (["{}/run", "{}/empty"], "RUN_DIR: expected sdpo_log.jsonl"),
        (["{}/damaged"], "sdpo_credit.jsonl, line 1: expected a JSON object with a step"),
        (["{}/bytes"], "sdpo_credit.jsonl, line 1: expected a JSON object with a step"),
        (["{}/warning"], "sdpo_log.jsonl, line 1: expected a JSON object with a step"),
        (["{}/state"], "trainer_state.json: expected global_step, and log_history"),
        (["{}/steps"], "trainer_state.json: expected global_step, and log_history"),
        (["{}/run", "--output", "{}/empty"], "output: expected a file, got the folder"),
        (
            ["{}/run", "--output", "{}/run/sdpo_log.jsonl/a.html"],
            "output: expected a file that can be written",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (run_folder(tmp_path / "damaged") / files.CREDIT).write_text("[]\n")
    (run_folder(tmp_path / "bytes") / files.CREDIT).write_bytes(b"\xff\xfe\n")
    (run_folder(tmp_path / "warning") / files.LOG).write_text(
        '{"step": 1, "warning": "answer_in_feedback"}\n'
    )
    for name, state in (("state", "[]"), ("steps", '{"global_step": 1, "log_history": [{"loss": 1}]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sdpo report: ")
    assert message in line
    assert not (tmp_path / "empty" / "sdpo_report.html").exists()


def test_numbers_without_an_axis_and_half_characters_leave_a_report(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = [
        '{"step": 1, "reward": 1e308}',
        '{"step": 2, "reward": -1e308}',
        f'{{"step": 3, "reward": 1{"0" * 400}}}',
    ]
    lines += [
        '{"step": 4, "reward": 0.5}',
        '{"step": 4, "warning": "answer_in_feedback", "message": "cut \\ud800"}',
    ]
    (folder / files.LOG).write_text("\n".join([*lines, ""]))
    text = credit_report(folder).read_text(encoding="utf-8")
    assert "cut \\ud800" in text
    assert "0.5 at step 4" in text


def test_it_needs_neither_torch_nor_a_trainer(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [row(1)])
    script = (
        f"import sys, sdpo_rl.cli as cli; assert cli.main(['report', {str(folder)!r}]) == 0\n"
        "print(sorted({'torch', 'trl', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "adapters")))},
    )
    assert done.stdout.splitlines()[-1] == "[]"

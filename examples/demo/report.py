"""The demo's report: one self-contained HTML page from the numbers of a run, and its plot as `curves.svg`.

    python examples/demo/report.py output/demo/results.json

`run.py` writes it at its end; this command writes it again from the numbers.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from language import TEMPLATES
from machine import interpret, what_changed

from sdpo import build_reprompts

sys.path.append(str(Path(__file__).resolve().parents[1] / "private_api"))

import style
from drawing import Band, draw

Results = dict[str, Any]
Points = list[tuple[int, float]]


# --- Numbers ---------------------------------------------------------------------------------------------------


def seed_curves(results: Results, arm: str) -> list[Points]:
    """The held-out probability over samples, one curve per seed."""
    runs = [run for run in results["runs"] if run["arm"] == arm]
    return [list(zip(run["samples"], run["probability"], strict=True)) for run in runs]


def mean_curve(results: Results, arm: str) -> Points:
    """The mean over seeds of `seed_curves`."""
    curves = seed_curves(results, arm)
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves, strict=True)]


def samples_to(points: Points, level: float) -> int | None:
    """Samples at the first evaluation that reaches `level`."""
    return next((samples for samples, value in points if value >= level), None)


def columns(results: Results) -> list[int]:
    """The sample counts to print: every 1024, or every evaluation of a run too short for that."""
    every = [samples for samples, _ in mean_curve(results, "SDPO")]
    return [samples for samples in every if samples % 1024 == 0] if every[-1] >= 1024 else every


def summary(results: Results) -> str:
    """Five lines: a header, and the mean curve of every arm."""
    chosen = columns(results)
    lines = [f"{'P(right answer), held out':26}" + "".join(f"{samples:>7}" for samples in chosen)]
    for arm in results["arms"]:
        points = dict(mean_curve(results, arm))
        lines.append(f"{arm:26}" + "".join(f"{points[samples]:7.2f}" for samples in chosen))
    return "\n".join(lines)


# --- The plot --------------------------------------------------------------------------------------------------


def band(results: Results, arm: str) -> Band:
    """The mean over seeds of `seed_curves`, and their range."""
    curves = seed_curves(results, arm)
    seeds = [[value for _, value in points] for points in zip(*curves, strict=True)]
    return Band([at for at, _ in curves[0]], [*map(fmean, seeds)], [*map(min, seeds)], [*map(max, seeds)])


def plot(results: Results) -> str:
    """Held-out probability over samples as SVG: the mean of each arm, and the range of its seeds."""
    return draw({"": {arm: band(results, arm) for arm in results["arms"]}}, "probability of the right answer")


# --- The page --------------------------------------------------------------------------------------------------

STYLE = f"""{style.PAGE}\
.row {{ display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; font-size: 14px;
       color: var(--soft); }}
.row pre {{ margin-top: 4px; padding: 10px 12px; background: var(--card); color: var(--ink); }}
@media (max-width: {style.PHONE}px) {{ .row {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }} }}
"""


def lead(results: Results) -> str:
    """The result in two sentences."""
    sdpo, grpo = mean_curve(results, "SDPO"), mean_curve(results, "GRPO")
    seeds = len(results["machines"])
    of = f", mean of {seeds} seeds" if seeds > 1 else ""

    def reached(points: Points) -> str:
        samples = samples_to(points, 0.5)
        return f"after {samples} samples" if samples else f"not within {points[-1][0]}"

    return (
        f"After {sdpo[-1][0]} samples the model gives the right answer to a held-out prompt with probability "
        f"{sdpo[-1][1]:.2f} (SDPO) and {grpo[-1][1]:.2f} (GRPO), from {sdpo[0][1]:.2f} before training{of}. "
        f"SDPO reaches one half {reached(sdpo)}, GRPO {reached(grpo)}."
    )


def scrolling(table: str, label: str) -> str:
    """A table in a box that scrolls where the page is narrower."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def numbers(results: Results) -> str:
    """The mean curves as a table."""
    chosen = columns(results)
    head = "".join(f"<th>{samples}</th>" for samples in chosen)
    rows = []
    for arm, settings in results["arms"].items():
        points = dict(mean_curve(results, arm))
        cells = "".join(f"<td>{points[samples]:.3f}</td>" for samples in chosen)
        rows.append(f"<tr><td>{arm}</td><td>{settings['learning_rate']:g}</td>{cells}</tr>")
    table = f"<table><tr><th>samples</th><th>learning rate</th>{head}</tr>{''.join(rows)}</table>"
    return scrolling(table, "Probability of the right answer")


def marked(completion: str, answer: str) -> str:
    """A completion as HTML, with the lines that differ from the answer highlighted."""
    right = dict(enumerate(answer.split("\n")))
    lines = [
        escape(text) if right.get(index) == text else f'<span class="wrong">{escape(text)}</span>'
        for index, text in enumerate(completion.split("\n"))
    ]
    return "<pre>" + "\n".join(lines) + "</pre>"


def completions(results: Results) -> str:
    """Greedy completions of held-out prompts before and after training, with their probability of being right."""
    written = {"before": results["before"]}
    written |= {run["arm"]: run["examples"] for run in results["runs"] if run["seed"] == 0}
    head = "".join(f"<th>{title}</th>" for title in ["prompt", "right answer", *written])
    rows = []
    for index, example in enumerate(results["before"]):
        cells = (
            f"<td>{escape(example['question'])}</td><td>{marked(example['answer'], example['answer'])}</td>"
        )
        for texts in written.values():
            text = marked(texts[index]["completion"], example["answer"])
            cells += f"<td>{text}<small>p&nbsp;=&nbsp;{texts[index]['probability']:.2f}</small></td>"
        rows.append(f"<tr>{cells}</tr>")
    table = f'<table class="text"><tr>{head}</tr>{"".join(rows)}</table>'
    return scrolling(table, "Completions before and after training")


def one_row(results: Results) -> str:
    """One failed completion, its feedback and the reprompt, as the trainer builds them."""
    example = results["before"][-1]
    feedback = interpret(example["completion"], example["answer"]).feedback
    reprompt = build_reprompts(
        [example["question"]], [[]], [feedback], templates=TEMPLATES, feedback_only_without_solution=False
    ).texts[0]
    boxes = {
        "Student's prompt": f"<pre>{escape(example['question'])}</pre>",
        "Its completion": marked(example["completion"], example["answer"]),
        "Feedback": f"<pre>{escape(feedback)}</pre>",
        "Teacher's prompt": f"<pre>{escape(reprompt)}</pre>",
    }
    return "".join(f"<div>{title}{box}</div>" for title, box in boxes.items())


def page(results: Results) -> str:
    """The whole report as HTML."""
    final = {arm: f"{mean_curve(results, arm)[-1][1]:.2f}" for arm in results["arms"]}
    minutes = sum(run["seconds"] for run in results["runs"]) / 60
    quick = "<p><b>A quick run of a few steps: it only checks that everything works.</b></p>"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SDPO on a shifted task</title><style>{STYLE}</style>
<h1>SDPO on a shifted task</h1>
<p class="lead">{lead(results)}</p>
{quick if results["quick"] else ""}
{plot(results)}
<p>Probability of the right answer on 200 held-out prompts, computed exactly; it is the expected accuracy at
temperature 1. Lines are means over seeds, bands
go from the smallest to the largest of them. Each learning rate is the best of 0.0003, 0.0005 and
0.0007 for its arm over three seeds; the control with shuffled feedback has that of SDPO.</p>
{numbers(results)}

<h2>The task</h2>
<p>A small language model, trained from scratch, runs programs of up to three opcodes on a register of three digits
and writes the trace. It was trained on one meaning of each opcode. Then six of the eight change (seed 0:
{what_changed(results["machines"][0])}), and no prompt says so. A trace with any wrong line
scores 0, and the interpreter reports the first wrong line.</p>
<div class="row">{one_row(results)}</div>
<p>The teacher is the same model with weights averaged over time. It never generates: it predicts the tokens of the
student's completion with the feedback in its prompt, and the student is trained towards these predictions. When
another completion of the same prompt was right, the teacher's prompt contains that too.</p>

<h2>Before and after training</h2>
<p>Greedy completions of three held-out prompts, seed 0; p is the probability of the right answer.</p>
{completions(results)}

<h2>What this shows, and what it does not</h2>
<ul>
<li>The gain comes from the feedback, which GRPO cannot use. With completions of peers and no feedback SDPO ends
at {final["SDPO, peers only"]}; GRPO ends at {final["GRPO"]}.</li>
<li>The feedback must belong to the completion. With peers and the feedback of other prompts, SDPO ends at
{final["SDPO, shuffled feedback"]}; seeds differ here: the three of the recorded run end at 0.60, 0.14
and 0.09.</li>
<li>The gain is large because rewards are sparse: at first few completions are right, and a group without a success
gives GRPO no gradient. Where the model often samples the right answer, the advantage is smaller. With more samples
GRPO learns most of this task too.</li>
<li>This is a small task that shows how the method works. It does not predict the gain on other tasks.</li>
</ul>
<footer>{results["prompts_per_step"]} prompts × {results["completions_per_prompt"]} completions a step, one AdamW
step each, the same prompts for all arms. {minutes:.1f} minutes of training. {versions}, Python
{results["python"]}. All numbers are in results.json.</footer>
</html>
"""


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html` and `curves.svg` into `folder`; the path of the page."""
    (folder / "curves.svg").write_text(plot(results) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")
    return folder / "report.html"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(write_report(json.loads(source.read_text(encoding="utf-8")), source.parent))

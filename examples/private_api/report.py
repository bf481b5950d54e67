"""Curves, tables and examples of runs on the private API, as one self-contained HTML page.

    python examples/private_api/report.py output/private_api/records/*.json --output output/private_api

`run.py` writes one of each question at its end; this command writes one from any records of a task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jinja2
from checks import cannot_be_a_folder, read_record
from curves import ACCURACY, PROBABILITY, Run, band, by_arm, summary, table
from drawing import draw
from style import PAGE as STYLE

TITLES = {
    "kit": (
        "A private API from its error messages",
        "The model has never seen the module kit. The interpreter's message on a wrong call says the right name. "
        "Held-out questions use other words and other arguments.",
    ),
    "kit_strict": (
        "A private API from its error messages, judged strictly",
        "The model has never seen the module kit. The interpreter's message on a wrong call says the right name; a "
        "reply with text beside its call is wrong. Held-out questions use other words and other arguments.",
    ),
    "house_style": (
        "A house style from failed assertions",
        "Hidden tests expect a style that no prompt mentions; the feedback is the failed assertion. Held-out "
        "questions ask for other functions.",
    ),
}


def plot(runs: Sequence[Run], column: int, label: str) -> str:
    """Curves over samples as SVG: the mean of each arm, and the range of its seeds."""
    return draw({"": {arm: band(group, column) for arm, group in by_arm(runs).items()}}, label)


PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style | safe }}</style></head><body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<p>Accuracy: share of held-out questions that greedy decoding answers right.
{{ seeds }} seed{{ "s" if seeds > 1 }}; bands go from the smallest to the largest of them.</p>
{{ accuracy_plot | safe }}
<div class="scroll" tabindex="0" role="region" aria-label="Held-out accuracy">
<table><tr><th>held-out accuracy</th>{% for s in ticks %}<th>{{ s }}</th>{% endfor %}</tr>
{% for arm, values in rows %}<tr><td>{{ arm }}</td>{% for v in values %}<td>{{ "%.2f" % v }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{{ probability_plot | safe }}
<h2>Before and after</h2>
{% for arm, run in examples %}<h3>{{ arm }}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{{ arm }}, before and after">
<table class="text"><tr><th>question</th><th>before</th><th>feedback on it</th><th>after</th></tr>
{% for before, after in run %}<tr><td>{{ before.question }}</td>
<td class="{{ 'right' if before.score else 'wrong' }}"><code>{{ before.reply }}</code></td>
<td>{{ before.feedback or "" }}</td>
<td class="{{ 'right' if after.score else 'wrong' }}"><code>{{ after.reply }}</code></td></tr>
{% endfor %}</table></div>{% endfor %}
<footer>{{ footer }}</footer>
</body></html>
""")


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` and `accuracy.svg` to a folder; returns the page's path."""
    ticks, rows = table(runs)
    accuracy = plot(runs, ACCURACY, "held-out accuracy")
    first = runs[0]
    title, lead = TITLES.get(first["task"], (first["task"], ""))
    page = PAGE.render(
        style=STYLE,
        title=title,
        lead=lead,
        seeds=len({run["seed"] for run in runs}),
        ticks=ticks,
        rows=rows,
        accuracy_plot=accuracy,
        probability_plot=plot(runs, PROBABILITY, "probability of the right answer"),
        examples=[
            (arm, list(zip(complete[0]["before"], complete[0]["after"], strict=True)))
            for arm, group in by_arm(runs).items()
            if (complete := [run for run in group if run["complete"]])
        ],
        footer=f"{first['model']} on {first['device']}; "
        + ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.svg").write_text(accuracy)
    path = folder / "report.html"
    path.write_text(page)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="The report of runs on the private API.")
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("output/private_api"))
    options = parser.parse_args()
    runs = []
    for path in options.records:
        try:
            record = read_record(path)
        except ValueError as error:
            parser.error(str(error))
        if record is None:
            parser.error(f"{path}: expected a record, got no file; pass records that `train.py` wrote")
        runs.append(record)
    if cannot_be_a_folder(options.output):
        parser.error(
            f"--output: expected a folder, got {str(options.output)!r}, which is a file or below one; pass another "
            "one"
        )
    print(summary(runs))
    print(write_report(runs, options.output))


if __name__ == "__main__":
    main()

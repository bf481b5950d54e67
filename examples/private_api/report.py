"""Curves, tables and examples of runs on the private API, as one self-contained HTML page.

    python examples/private_api/report.py output/private_api/records/*.json --output output/private_api

`run.py` writes it at its end; this command writes it again from the records.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

Run = dict[str, Any]
PROBABILITY, ACCURACY = 1, 2  # columns of a run's points, after the samples
TITLES = {
    "kit": (
        "A private API from its error messages",
        "The model has never seen the module kit. The interpreter's message on a wrong call says the right name. "
        "Held-out questions use other words and other arguments.",
    ),
    "house_style": (
        "A house style from failed assertions",
        "Hidden tests expect a style that no prompt mentions; the feedback is the failed assertion. Held-out "
        "questions ask for other functions.",
    ),
}
COLORS = ("#0b7a57", "#d0582a", "#4a6fb5", "#8a8a8a", "#8b4fa3", "#b38600", "#3b3b3b", "#c2185b")


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm, in the order in which they come."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run["arm"], []).append(run)
    return grouped


def mean_curve(runs: Sequence[Run], column: int) -> list[tuple[int, float]]:
    """The mean over seeds at each number of samples that all seeds have."""
    curves = [{point[0]: point[column] for point in run["points"]} for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(samples, fmean(curve[samples] for curve in curves)) for samples in shared]


def table(runs: Sequence[Run], column: int = ACCURACY) -> tuple[list[int], list[tuple[str, list[float]]]]:
    """Up to seven numbers of samples, and each arm's mean there; an arm that ended earlier shows its last."""
    means = {arm: mean_curve(group, column) for arm, group in by_arm(runs).items()}
    ticks = [samples for samples, _ in max(means.values(), key=len)]
    chosen = sorted({ticks[round(i * (len(ticks) - 1) / 6)] for i in range(7)})
    rows = []
    for arm, points in means.items():
        rows.append((arm, [[value for at, value in points if at <= samples][-1] for samples in chosen]))
    return chosen, rows


def summary(runs: Sequence[Run]) -> str:
    """The held-out accuracy of every arm, as text."""
    chosen, rows = table(runs)
    width = max(len(arm) for arm, _ in rows) + 2
    lines = ["held-out accuracy".ljust(width) + "".join(f"{samples:>8}" for samples in chosen)]
    lines += [arm.ljust(width) + "".join(f"{value:8.2f}" for value in values) for arm, values in rows]
    return "\n".join(lines)


def plot(runs: Sequence[Run], column: int, label: str) -> str:
    """Curves over samples as SVG, the same for the same runs: a thin line per seed, a thick one for their mean."""
    with matplotlib.rc_context({"svg.hashsalt": "private_api", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8.4, 4.0), layout="constrained")
        for color, (arm, group) in zip(COLORS * len(runs), by_arm(runs).items(), strict=False):
            for run in group:
                axes.plot(
                    *zip(*((p[0], p[column]) for p in run["points"]), strict=True),
                    color=color,
                    lw=0.8,
                    alpha=0.4,
                )
            axes.plot(*zip(*mean_curve(group, column), strict=True), color=color, lw=2.5, label=arm)
        axes.set(xlabel="samples", ylabel=label, ylim=(-0.02, 1.02))
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = out.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; }
body { max-width: 880px; margin: 40px auto; padding: 0 16px; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 12px 0 28px; }
th, td { padding: 5px 8px; border-bottom: 1px solid #8884; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
svg { width: 100%; height: auto; background: #fff; } code { font-size: 13px; white-space: pre-wrap; }
.right { color: #0b7a57; } .wrong { color: #c2411c; } footer { font-size: 13px; opacity: .7; }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ lead }} Accuracy: share of held-out questions that greedy decoding answers right.
{{ seeds }} seed{{ "s" if seeds > 1 }}; thin lines are seeds.</p>
{{ accuracy_plot | safe }}
<table><tr><th>held-out accuracy</th>{% for s in ticks %}<th>{{ s }}</th>{% endfor %}</tr>
{% for arm, values in rows %}<tr><td>{{ arm }}</td>{% for v in values %}<td>{{ "%.2f" % v }}</td>{% endfor %}</tr>
{% endfor %}</table>
{{ probability_plot | safe }}
<h2>Before and after</h2>
{% for arm, run in examples %}<h3>{{ arm }}</h3>
<table class="text"><tr><th>question</th><th>before</th><th>feedback on it</th><th>after</th></tr>
{% for before, after in run %}<tr><td>{{ before.question }}</td>
<td class="{{ 'right' if before.score else 'wrong' }}"><code>{{ before.reply }}</code></td>
<td>{{ before.feedback or "" }}</td>
<td class="{{ 'right' if after.score else 'wrong' }}"><code>{{ after.reply }}</code></td></tr>
{% endfor %}</table>{% endfor %}
<footer>{{ footer }}</footer>
</body></html>
""")


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html` and `accuracy.svg` to a folder; returns the page's path."""
    ticks, rows = table(runs)
    accuracy = plot(runs, ACCURACY, "held-out accuracy")
    first = runs[0]
    page = PAGE.render(
        title=TITLES[first["task"]][0],
        lead=TITLES[first["task"]][1],
        seeds=len({run["seed"] for run in runs}),
        ticks=ticks,
        rows=rows,
        accuracy_plot=accuracy,
        probability_plot=plot(runs, PROBABILITY, "probability of the right answer"),
        examples=[
            (arm, list(zip(group[0]["before"], group[0]["after"], strict=True)))
            for arm, group in by_arm(runs).items()
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
    runs = [json.loads(path.read_text()) for path in options.records]
    print(summary(runs))
    print(write_report(runs, options.output))


if __name__ == "__main__":
    main()

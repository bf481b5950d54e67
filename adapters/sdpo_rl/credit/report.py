"""`credit_report`: one HTML file about a run, or about two beside each other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import curves
from .run import Run, read_run

OUTPUT = "sdpo_report.html"
# Options in the head of the page; of two runs also those that differ.
_SHOWN = (
    "alpha",
    "support",
    "k",
    "teacher_mode",
    "teacher_update_rate",
    "teacher_rate_samples",
    "grpo_weight",
    "grpo_weight_final",
    "routing",
)


def credit_report(
    run_dir: str | Path, other: str | Path | None = None, output: str | Path | None = None
) -> Path:
    """Write one HTML file about a run: its curves with the warnings, and what the teacher said of each token.

    A token has the colour of

        log q(token | prompt, demonstration or feedback) − log p(token | prompt)

    with q of the teacher and p of the student: where the teacher, having read the feedback, disagrees. The file
    loads nothing from elsewhere, and to write it takes neither a GPU nor the model. The rows are those that
    `SDPOConfig(credit_rows=...)` kept; without any the report has the curves.

    Args:
        run_dir: the `output_dir` of a run.
        other: of a second run, which is shown beside it; `None`: one run.
        output: the file to write; `None`: `sdpo_report.html` in `run_dir`.

    Returns:
        The file's path.

    Raises:
        ValueError: a folder without a run's files, a damaged file, or an output that cannot be written.

    Source: the log-ratio is the credit of SDPO, arXiv 2601.20802, section 2.

    Examples:
        >>> import json, tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "sdpo_log.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\\n")
        >>> credit_report(run).name
        'sdpo_report.html'
    """
    runs = [read_run(Path(folder)) for folder in (run_dir, other) if folder is not None]
    path = Path(run_dir) / OUTPUT if output is None else Path(output)
    if path.is_dir():
        raise ValueError(
            f"output: expected a file, got the folder {str(path)!r}; add a name that ends in .html"
        )
    page = render(_distinct(runs, run_dir, other))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ValueError(
            f"output: expected a file that can be written, got {str(path)!r} ({error}); name another one"
        ) from error
    return path


def render(runs: Sequence[Run]) -> str:
    """The page of one or two runs.

    Args:
        runs: with different names.
    """
    page = resources.files(__package__) / "page"
    script, palette, style = (
        (page / name).read_text(encoding="utf-8") for name in ("report.js", "palette.css", "report.css")
    )
    style = palette + style
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string((page / "report.html").read_text(encoding="utf-8"))
    charts = curves.charts(runs)
    return template.render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        steps=[_last_step(run) for run in runs],
        options=_options(runs),
        warnings=[(run, warning) for run in runs for warning in run.warnings],
        charts=charts,
        size=(curves.WIDTH, curves.HEIGHT),
        box=(curves.LEFT, curves.TOP, curves.WIDTH - curves.RIGHT, curves.HEIGHT - curves.BOTTOM),
        data={
            "runs": [{"name": run.name, "rows": run.rows} for run in runs],
            "charts": [
                {
                    "first": chart.first,
                    "last": chart.last,
                    "lines": [{"label": i.label, "steps": i.steps, "values": i.values} for i in chart.lines],
                }
                for chart in charts
            ],
        },
        script=Markup(script),
        style=Markup(style),
        # Nothing is loaded, and nothing runs or styles the page but these two texts, whatever else is in it.
        policy=f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'",
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _distinct(runs: Sequence[Run], *folders: Any) -> list[Run]:
    """The runs by different names: their folders', with the folder above or a number if that is not enough."""
    if len({run.name for run in runs}) == len(runs):
        return list(runs)
    longer = [Path(folder).resolve() for folder in folders]
    names = [f"{path.parent.name}/{path.name}" for path in longer]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def _last_step(run: Run) -> int:
    return max(entry["step"] for entry in [*run.history, *run.rows]) if run.history or run.rows else 0


def _options(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Name and values of the options to show: one for all runs, or where they differ one for each."""
    known = {name: None for run in runs for name in run.options}
    differ = [name for name in known if len({str(run.options.get(name)) for run in runs}) > 1]
    shown = [*(name for name in _SHOWN if name in known), *(name for name in differ if name not in _SHOWN)]
    values = {
        name: [_value(run.options[name]) if name in run.options else "–" for run in runs] for name in shown
    }
    return [(name, texts if name in differ else texts[:1]) for name, texts in values.items()]


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

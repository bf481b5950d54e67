"""The figures and tables of docs/results.md and docs/choosing.md, from the records in `records/`.

    python examples/private_api/figures.py            # write them
    python examples/private_api/figures.py --check    # say what differs from the records, and fail if anything does

A page has the place of each text between two comments, `<!-- generated: NAME -->` and `<!-- end -->`. What no
record answers has an empty place.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import findings
import pages
import tables
from arms import arms
from curves import ACCURACY, Run, band
from drawing import Band, draw
from environment import HELD_OUT

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).with_name("records")
IMAGES, PREFIX = "docs/images", "private-api"
PAGES = ("docs/results.md", "docs/choosing.md")
PLACE = pages.place("generated")


class Question(NamedTuple):
    """Heading and introduction of a question on the page."""

    heading: str
    text: str


QUESTIONS = {
    "learns": Question(
        "Does SDPO learn what GRPO cannot?",
        "SDPO beside GRPO, SDPO with the feedback of other failures, SDPO without feedback, and cross-entropy on "
        "the right calls for comparison.",
    ),
    "grpo learning rate": Question(
        "Which learning rate for GRPO?",
        "On seeds that no table of results has.",
    ),
    "settings": Question(
        "Which settings for SDPO?",
        "Settings of SDPO, on seeds that no table of results has. `arms.py` calls the chosen one "
        '"SDPO, chosen settings".',
    ),
    "rate": Question(
        "How fast may the teacher follow the student?",
        "The rate is the student's weight in one update of the teacher. An update follows each generation batch.",
    ),
    "alpha": Question(
        "Which α?",
        "All other settings are those of SDPO above, with the teacher's rate 0.01 per batch of 64.",
    ),
    "support": Question(
        "Which K?",
        "The student's K most probable tokens with all others as one category, without the others, and the whole "
        "vocabulary; all with α=0.5 and the teacher's rate 0.01 per batch of 64.",
    ),
    "cures": Question(
        "What helps with a fast teacher?",
        "α=0 with the teacher's rate 0.05 per batch of 64, about four times as fast as the paper's, alone and with "
        'one remedy added, of one option or a few. `arms.py` calls this setting "fast teacher".',
    ),
    "large batches": Question(
        "Is a teacher too fast per completion, or per update?",
        "Batches of 256, for five times the samples: 187 updates of the teacher, where runs in batches of 64 have "
        "150. The teacher's rates are 0.01 and 0.05 per 64 completions, as in the other tables, and so 0.04 and "
        "0.19 in one update.",
    ),
    "lasting": Question("Does it last?", "Five times the samples."),
    "lasting settings": Question(
        "Which settings last?", "Five times the samples, on two seeds that no table of results has."
    ),
    "lora": Question("Adapters or all weights?", "LoRA at learning rates of its own."),
}
# Tables of the other page.
SHORT = ("settings", "alpha", "support", "cures", "large batches", "lasting", "lora")


def blocks_and_images(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, str]]:
    """Every generated text by the name of its place, and every figure by its file name."""
    names = [
        *QUESTIONS,
        "setup",
        "others",
        "signs",
        "warnings",
        "margins",
        "rates",
        *(f"short {name}" for name in SHORT),
        *findings.SENTENCES,
    ]
    texts = dict.fromkeys(names, "")
    images: dict[str, str] = {}
    if not runs:
        return texts, images
    (task, model), _ = Counter((run["task"], run["model"]) for run in runs).most_common(1)[0]
    main = [run for run in runs if (run["task"], run["model"]) == (task, model)]
    texts["setup"] = f"## Setup\n\n{tables.setup(main, HELD_OUT)}"
    for question in QUESTIONS:
        texts[question] = section(
            main, question, PREFIX, images, sentences=findings.FINDINGS.get(question, ())
        )
    by_question = {question: tables.of_question(main, question) for question in QUESTIONS}
    for question in SHORT:
        if by_question[question]:
            texts[f"short {question}"] = tables.short(by_question[question])
    for name, (questions, sentence) in findings.SENTENCES.items():
        found = {
            (arm, question): of_arm for question in questions for arm, of_arm in by_question[question].items()
        }
        count = Counter(arm for arm, _ in found)
        about = {f"{arm} ({question})": of_arm for (arm, question), of_arm in found.items()}
        about |= {arm: of_arm for (arm, _), of_arm in found.items() if count[arm] == 1}
        texts[name] = "".join(findings.said([sentence], about))
    if by_question["rate"]:
        texts["rates"] = tables.rates(by_question["rate"])
    if any(tables.outcome(run) == "learned" and run["log"] for run in tables.comparable(main)):
        texts["signs"] = tables.signs(main)
    if tables.every_step(main):
        texts["margins"] = tables.margins(main)
        texts["warnings"] = f"{tables.first_warnings(main)}\n\n{tables.all_warnings(main)}"
    others = []
    for other in sorted({(run["task"], run["model"]) for run in runs} - {(task, model)}):
        rest = [run for run in runs if (run["task"], run["model"]) == other]
        name = re.sub(r"[^a-z0-9]+", "-", " ".join((PREFIX, *other)).lower())
        sections = [
            section(
                *(rest, question, name, images),
                above="### ",
                sentences=findings.OTHER_FINDINGS.get((other[0], question), ()),
            )
            for question in QUESTIONS
        ]
        if any(sections):
            heading = f"## The task {other[0]} with {other[1]}"
            others.append("\n\n".join([heading, tables.setup(rest, HELD_OUT), *filter(None, sections)]))
    texts["others"] = "\n\n".join(others)
    return texts, images


def section(
    runs: Sequence[Run],
    question: str,
    prefix: str,
    images: dict[str, str],
    above: str = "## ",
    sentences: Sequence[str] = (),
) -> str:
    """Heading, findings, figure, table and command of a question, whose figure is added to `images`.

    Empty without runs.
    """
    by_arm = tables.of_question(runs, question)
    if not by_arm:
        return ""
    heading, text = QUESTIONS[question]
    first = next(iter(by_arm.values()))[0]
    file = f"{prefix}-{question.replace(' ', '-')}.svg"
    images[file] = figure(question, by_arm)
    seeds = sorted({run["seed"] for of_arm in by_arm.values() for run in of_arm})
    task = [] if first["task"] == "kit" else ["--task", first["task"]]
    command = ["python", "examples/private_api/run.py", "--model", first["model"], *task]
    command += ["--question", question, "--seeds", *map(str, seeds), *further_options(question, by_arm)]
    found = "\n".join(f"* {sentence}" for sentence in findings.said(sentences, by_arm))
    if (first["task"], above) != ("kit", "## "):
        text = ""  # it names arms that other tasks do not have
    if tables.is_of_samples(by_arm):
        text += " Accuracy is that of samples, because no judge evaluated some of these runs."
    parts = [f"{above}{heading}", text, found, f"![{heading}](images/{file})", tables.results(by_arm)]
    return "\n\n".join(filter(None, [*parts, f"```bash\n{shlex.join(command)}\n```"]))


def further_options(question: str, by_arm: tables.Runs) -> list[str]:
    """Of the command that makes these runs; `--every-step` where every run of every arm has it."""
    every_step = [
        arm for arm, runs in by_arm.items() if all("--every-step" in run["command"] for run in runs)
    ]
    found = [] if by_arm.keys() == {arm.name for arm in arms(question)} else ["--arms", *by_arm]
    if all("--sampling graph" in run["command"] for runs in by_arm.values() for run in runs):
        found += ["--sampling", "graph"]
    return [*found, "--every-step", *every_step] if len(every_step) == len(by_arm) else found


def figure(question: str, by_arm: tables.Runs) -> str:
    """Accuracy over samples; panels where a question has more lines than one can hold."""
    lines = {arm: band(runs, ACCURACY) for arm, runs in by_arm.items()}
    if question == "rate":
        panels: dict[str, dict[str, Band]] = {}
        for arm, runs in by_arm.items():
            settings = runs[0]["settings"]
            heading = f"α={settings['alpha']:g}, batches of {runs[0]['samples_per_step']}"
            panels.setdefault(heading, {})[f"rate {settings['teacher_update_rate']:g}"] = lines[arm]
        return draw(panels, "accuracy", columns=2)
    if question == "settings":
        panels = {}
        for arm, runs in by_arm.items():
            settings = runs[0]["settings"]
            added = "with SRPO" if settings.get("routing") == "srpo" else "alone"
            heading = "with GRPO, λ=0.5" if "grpo_weight" in settings else added
            panels.setdefault(heading, {})[arm] = lines[arm]
        return draw(panels, "accuracy", columns=2)
    if question == "cures":
        alone = next(iter(by_arm)).partition(" + ")[0]
        panels = {
            arm.removeprefix(f"{alone} + "): {
                "with it": line,
                **({"alone": lines[alone]} if alone in lines else {}),
            }
            for arm, line in lines.items()
            if arm != alone
        }
        return draw(panels, "accuracy", columns=2)
    return draw({"": lines}, "accuracy")


def files(root: Path, records: Path) -> dict[Path, str | None]:
    """What the pages and figures are by the records; `None` for a figure that no record has."""
    texts, images = blocks_and_images(tables.load(records))
    wanted: dict[Path, str | None] = dict.fromkeys((root / IMAGES).glob(f"{PREFIX}-*.svg"))
    wanted |= {root / IMAGES / name: f"{svg}\n" for name, svg in images.items()}
    for page in PAGES:
        wanted[root / page] = pages.filled((root / page).read_text(encoding="utf-8"), texts, PLACE)
    return wanted


def differences(root: Path = ROOT, records: Path = RECORDS) -> list[str]:
    """The files that are not what the records say."""
    return pages.differences(root, files(root, records))


def write(root: Path = ROOT, records: Path = RECORDS) -> None:
    """Write the pages and figures, and remove figures that no record has."""
    pages.write(files(root, records))


if __name__ == "__main__":
    raise SystemExit(
        pages.main(
            "Figures and tables of the records.",
            "examples/private_api/figures.py",
            ROOT,
            lambda: files(ROOT, RECORDS),
        )
    )

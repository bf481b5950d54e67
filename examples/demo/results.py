"""The tables, figures and findings of the documentation on the embedded task, from its records.

    python examples/demo/results.py            # write them
    python examples/demo/results.py --check    # say what differs from the records, and fail if anything does

The records are `record.json` and those that `questions.py` writes into `records/`. Each text has a place in a page,
between the comments `<!-- embedded: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import held_out_tasks
from questions import QUESTIONS, RECORDS, SAMPLES, demo, demo_runs, recorded_as

sys.path.append(str(Path(__file__).resolve().parents[1] / "private_api"))

import figures
import findings
import pages
import tables
from arms import FIRST_SEED_FOR_CHOOSING
from curves import Run
from record import weights_hash

ROOT = Path(__file__).parents[2]
IMAGES, PREFIX = "docs/images", "embedded"
PAGES = ("docs/results.md", "docs/choosing.md")
PLACE = pages.place("embedded")
EARLY_SAMPLES = 1024  # samples


class Section(NamedTuple):
    """Heading, introduction and findings of a question on the page; numbers stand there as in `findings.py`."""

    heading: str
    text: str
    findings: tuple[str, ...]


SECTIONS = {
    "learns": Section(
        "Embedded: SDPO, GRPO and controls",
        "The arms of `make demo`, and cross-entropy on the right answers to their prompts for comparison.",
        (
            "SDPO ends at {end[SDPO]}, near the {end[supervised]} of cross-entropy on the right answers. GRPO "
            "ends at {end[GRPO]}: unlike on the private API some prompts succeed from the start, so it has rewards "
            "to learn from.",
            "Without feedback, with peers' solutions alone, SDPO ends at {end[SDPO, peers only]}, about "
            "where GRPO ends.",
            "With the feedback of other failures SDPO ends at {end[SDPO, shuffled feedback]}. Its teacher "
            "still sees peers' solutions, and two of three seeds fall.",
        ),
    ),
    "alpha": Section(
        "Embedded: α",
        "All other settings are those of SDPO above.",
        (
            "α=0 falls on two of three seeds. Its mean accuracy is {best[α=0]} at the best and {end[α=0]} at "
            "the end, and its probability of the right answer at the end is {probability[α=0]}.",
            "α=0.1, α=0.5 and α=1 end at {end[α=0.1]}, {end[α=0.5]} and {end[α=1]}, with probabilities of "
            "{probability[α=0.1]}, {probability[α=0.5]} and {probability[α=1]}.",
            "α=0 is not faster at the start: after 1024 samples it is at {early[α=0]}, and α=0.1, α=0.5 and "
            "α=1 are at {early[α=0.1]}, {early[α=0.5]} and {early[α=1]}.",
        ),
    ),
    "cures": Section(
        "Embedded: what prevents the collapse",
        "SDPO with α=0, alone and with one change.",
        (
            "A slower teacher ends at {end[collapsing + rate 0.01]}, the trust region at "
            "{end[collapsing + trust region]}.",
            "SRPO ends at {end[collapsing + SRPO]}, half of the loss from GRPO at "
            "{end[collapsing + hybrid λ=0.5]}, the teacher that restarts at "
            "{end[collapsing + teacher restart]} and the anchor at {end[collapsing + anchor 0.1]}.",
            "The denominator `batch-token-mean` alone does not prevent the collapse "
            "({end[collapsing + batch-token-mean]}). With a smaller learning rate SDPO learns less, and ends "
            "at {end[collapsing + lr 0.0003]}.",
            "With α=0.5 instead, SDPO ends at {end[collapsing + α=0.5]} and its probability of the right "
            "answer at {probability[collapsing + α=0.5]}. With α=0 this probability is at most "
            "{probability[collapsing + trust region]}.",
        ),
    ),
    "rate": Section(
        "Embedded: the teacher's rate",
        "The rate is the student's weight in one update of the teacher. An update follows each batch.",
        (
            "With α=0.5 the rates 0 (a frozen teacher), 0.0025, 0.01 and 0.05 make no difference: they end "
            "at {end[α=0.5, rate 0 per 64]}, {end[α=0.5, rate 0.0025 per 64]}, "
            "{end[α=0.5, rate 0.01 per 64]} and {end[α=0.5, rate 0.05 per 64]}. With the rate 1 the teacher "
            "is the student itself, and the run ends at {end[α=0.5, rate 1 per 64]}. The paper's Table 4 "
            "also has this one last, but there the average is better than a frozen teacher.",
            "With α=0 the rate matters: 0, 0.01 and 0.05 end at {end[α=0, rate 0 per 64]}, "
            "{end[α=0, rate 0.01 per 64]} and {end[α=0, rate 0.05 per 64]}.",
            "Here the rate per sample counts, not the rate per step (the private API has "
            "[another case](#is-a-teacher-too-fast-per-completion-or-per-update)). With α=0 in batches of 256, "
            "the rate 0.05 ends at {end[α=0, rate 0.05 per 256]} and falls on no seed. The rate 0.185, which is "
            "as fast per sample as 0.05 in batches of 64, ends at {end[α=0, rate 0.185 per 256]}. The "
            "probabilities of the right answer are {probability[α=0, rate 0.05 per 256]} and "
            "{probability[α=0, rate 0.185 per 256]}.",
        ),
    ),
    "support": Section(
        "Embedded: K",
        "The vocabulary has 39 tokens.",
        (
            "The settings differ by less than the seeds: {end[K=5]} with K=5, {end[K=5, no tail]} with K=5 "
            "and no tail, {end[K=20]} with K=20, and {end[full vocabulary]} with the whole vocabulary.",
        ),
    ),
    "lasting": Section(
        "Embedded: five times the samples",
        "SDPO and GRPO as above, SDPO with changes, and the setting that collapses (α=0) with changes. The "
        "teacher's rate is 0.05 per batch of 64 and the learning rate constant unless the row says otherwise. "
        'With "long_run" they have the settings of [that preset](choosing.md#a-long-run) but its α and K: the '
        "default rate, 0.05 per 256 completions, a share of GRPO that grows from half to all of the loss, and a "
        "learning rate that falls to 0.",
        (
            "SDPO reaches {best[SDPO]} and stays above 0.9 for more than half of the run. The seeds end at "
            "{each[SDPO]}: one loses most of what it learned.",
            "The default rate, 0.05 per 256 completions, does not prevent it: {each[SDPO, rate per 256 samples]}. "
            "With a frozen teacher no seed falls: {each[SDPO, frozen teacher]}.",
            "With the settings of `long_run` every seed answers everything at the end: {each[SDPO + long_run]} "
            "with α=0.5, and {each[collapsing + long_run]} with α=0. With a constant learning rate α=0.5 ends at "
            "{each[SDPO + long_run, no decay]}. Without GRPO it ends at {each[SDPO + long_run, no GRPO]}, and "
            "α=0 at {each[collapsing + long_run, no GRPO]}. With half of the loss from GRPO throughout (λ=0.5) "
            "they end at {each[SDPO + long_run, λ=0.5]} and at {each[collapsing + long_run, λ=0.5]}: that the "
            "share grows makes a small difference where α is 0, and none where it is 0.5.",
            "Half of the loss from GRPO throughout also keeps what was learned: {each[SDPO, hybrid λ=0.5]}, and "
            "{each[SDPO, hybrid λ=0.5, rate per 256 samples]} with the default rate, where no evaluation after "
            "the first fifth is below 0.9. With the trust region the seeds end at {each[SDPO, trust region]}.",
            "SRPO with α=0 only delays the collapse: it reaches {best[collapsing + SRPO]} and ends at "
            "{end[collapsing + SRPO]}.",
            "GRPO learns more slowly and ends at {end[GRPO]}.",
        ),
    ),
}
# Sentences of the other page, by the name of their place: the question whose runs they are about, and the text.
SENTENCES = {
    "results summary": (
        "lasting",
        "* On the embedded task SDPO learns faster than GRPO and reaches {best[SDPO]}. In runs five times as "
        "long one of three seeds loses most of what it learned: the mean ends at {end[SDPO]}, that of GRPO at "
        "{end[GRPO]}. With half of the loss from GRPO and the default rate of the teacher no seed does: "
        "{each[SDPO, hybrid λ=0.5, rate per 256 samples]}. With the settings that last on the private API α=0.5 "
        "ends at {each[SDPO + long_run]}, and α=0, which collapses alone, at {each[collapsing + long_run]}.",
    ),
    "choosing rate": (
        "rate",
        "On the [embedded task](results.md#on-the-embedded-task), in batches of 64, α=0.5 ends as high with "
        "a frozen teacher ({end[α=0.5, rate 0 per 64]}) as with the rate 0.05 "
        "({end[α=0.5, rate 0.05 per 64]}), and ends at {end[α=0.5, rate 1 per 64]} with the rate 1; α=0 ends "
        "at {end[α=0, rate 0.01 per 64]} with 0.01 and at {end[α=0, rate 0.05 per 64]} with 0.05.",
    ),
    "choosing alpha": (
        "alpha",
        "On the embedded task, with the rate 0.05 per batch of 64, α=0 is not faster: after 1024 samples it is at "
        "{early[α=0]}, α=0.5 at {early[α=0.5]} and α=1 at {early[α=1]}. It ends at {end[α=0]}, α=0.1 at "
        "{end[α=0.1]}, α=0.5 at {end[α=0.5]} and α=1 at {end[α=1]}.",
    ),
    "choosing k": (
        "support",
        "On the embedded task, whose vocabulary has 39 tokens, K=5 ends at {end[K=5]} and the whole "
        "vocabulary at {end[full vocabulary]}.",
    ),
    "choosing lasting": (
        "lasting",
        "In runs five times as long on the embedded task, SDPO with α=0.5 ends at {each[SDPO]} with the rate "
        "0.05 per batch of 64, at {each[SDPO, rate per 256 samples]} with the default rate, and at {each[SDPO, "
        "hybrid λ=0.5, rate per 256 samples]} with the default rate and half of the loss from GRPO. With a share "
        "of GRPO that grows to all of the loss, and a learning rate that falls to 0, α=0.5 ends at {each[SDPO + "
        "long_run]}, and α=0 at {each[collapsing + long_run]}.",
    ),
    "choosing cures": (
        "cures",
        "On the embedded task, where SDPO with α=0 ends at {end[collapsing]}: {end[collapsing + α=0.5]} with "
        "α=0.5, {end[collapsing + rate 0.01]} with the rate 0.01, {end[collapsing + SRPO]} with SRPO, "
        "{end[collapsing + trust region]} with the trust region, {end[collapsing + hybrid λ=0.5]} with half "
        "of the loss from GRPO, and {end[collapsing + batch-token-mean]} with the denominator alone.",
    ),
}


def load(folder: Path) -> list[Run]:
    """The demo's runs and the records of a folder."""
    return [*demo_runs(), *tables.load(folder)]


def of_question(runs: Sequence[Run], question: str) -> dict[str, list[Run]]:
    """The runs of each arm of a question, in the order of seeds, without those for choosing settings."""
    found: dict[str, list[Run]] = {}
    for arm in QUESTIONS[question].arms:
        recorded_question, recorded = recorded_as(question, arm)
        of_arm = [
            run
            for run in runs
            if (run["question"], run["arm"]) == (recorded_question, recorded.name)
            and run["seed"] < FIRST_SEED_FOR_CHOOSING
        ]
        if of_arm:
            found[arm.name] = sorted(of_arm, key=lambda run: run["seed"])
    return found


def section(by_arm: tables.Runs, question: str) -> str:
    """Heading, findings, figure, table and command of a question."""
    heading, text, sentences = SECTIONS[question]
    said = "\n".join(f"* {finding}" for finding in findings.said(sentences, by_arm, EARLY_SAMPLES))
    seeds = sorted({run["seed"] for runs in by_arm.values() for run in runs})
    command = ["python", "examples/demo/questions.py", "--question", question, "--seeds", *map(str, seeds)]
    parts = [
        f"### {heading}",
        text,
        said,
        f"![{heading}](images/{image(question)})",
        tables.results(by_arm),
        f"```bash\n{shlex.join(command)}\n```",
    ]
    return "\n\n".join(filter(None, parts))


def image(question: str) -> str:
    """The file name of a question's figure."""
    return f"{PREFIX}-{question}.svg"


def setup(runs: Sequence[Run]) -> str:
    """Model, machine, versions and sizes."""

    def each(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    names = dict.fromkeys(name for run in runs for name in run["versions"])
    versions = [
        f"{name} {each([run['versions'][name] for run in runs if name in run['versions']])}" for name in names
    ]
    usual = [run["cpu_seconds"] for run in runs if run["samples"] == SAMPLES and "cpu_seconds" in run]
    rows = [
        ["model", "`examples/demo/checkpoint`"],
        ["SHA-256 of its weights", str(weights_hash(demo.CHECKPOINT))],
        ["processor", f"{each([run['device'] for run in runs if 'device' in run])}, one thread"],
        ["versions", f"Python {each([run['python'] for run in runs])}, {', '.join(versions)}"],
        ["runs", f"{len(runs)}, most of {SAMPLES} completions"],
        ["held-out questions", str(len(held_out_tasks()))],
        ["seconds of the processor for such a run", tables.spread(usual, "{:.0f}".format)],
    ]
    return tables.markdown(["", ""], rows)


def files(root: Path = ROOT, records: Path = RECORDS) -> dict[Path, str | None]:
    """What the pages and figures are by the records; `None` for a figure that no question has."""
    runs = load(records)
    by_question = {question: of_question(runs, question) for question in QUESTIONS}
    wanted: dict[Path, str | None] = dict.fromkeys((root / IMAGES).glob(f"{PREFIX}-*.svg"))
    for question, by_arm in by_question.items():
        wanted[root / IMAGES / image(question)] = f"{figures.figure(question, by_arm)}\n"
    texts = {question: section(by_arm, question) for question, by_arm in by_question.items()}
    for name, (question, text) in SENTENCES.items():
        (texts[name],) = findings.said([text], by_question[question], EARLY_SAMPLES)
    texts["setup"] = setup([run for run in runs if run["seed"] < FIRST_SEED_FOR_CHOOSING])
    for page in PAGES:
        wanted[root / page] = pages.filled((root / page).read_text(encoding="utf-8"), texts, PLACE)
    return wanted


if __name__ == "__main__":
    raise SystemExit(
        pages.main("Tables and figures of the embedded task.", "examples/demo/results.py", ROOT, files)
    )

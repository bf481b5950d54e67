"""Records as tables in Markdown: the results of a question, and the signs in the log.

A module of `figures.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from arms import CHOOSING, FIRST_SEED_FOR_CHOOSING, GROUP, QUESTIONS, arms, recorded_as
from checks import read_record
from curves import (
    ACCURACY,
    BEST_FROM,
    FALLEN,
    JUDGED,
    LEARNED,
    PROBABILITY,
    SAMPLED,
    Run,
    at,
    best,
    fall,
    lowest_share,
)
from margins import (
    largest_cut_rise,
    largest_entropy_ratio,
    largest_held_out_fall,
    largest_reward_fall,
    leave_one_out,
)
from replay import COLLAPSED, LEAD, entries, problem, warnings
from tasks import TASKS

from sdpo_rl.diagnose.monitors import (
    CUT_RISE_ALONE,
    CUT_RISE_WITH_ENTROPY,
    ENTROPY_RATIO,
    HELD_OUT_FALL,
    REWARD_FALL,
)

Runs = Mapping[str, Sequence[Run]]  # by the name of their arm
NONE = "–"
# Steps of the signs: the first five, with which the monitors compare, and the last five of the first twenty.
FIRST, LATER = range(1, 6), range(16, 21)
SIGNS = {
    "reward": "reward",
    "self_distillation/success_sample_fraction": "rows that see a success",
    "self_distillation/divergence": "divergence",
    "self_distillation/sampled_token_agreement": "sampled-token agreement",
    "self_distillation/student_entropy": "student's entropy",
    "self_distillation/teacher_entropy": "teacher's entropy",
    "self_distillation/teacher_distance": "teacher's distance",
    "completions/clipped_ratio": "cut completions",
    "completions/mean_length": "mean length",
    "grad_norm": "gradient norm",
}
OUTCOMES = ("learned", "fell", "learned nothing")
# What the monitors compare, the limit, and the number of a run.
MARGINS: tuple[tuple[str, float, Callable[[Run], float]], ...] = (
    (
        "rise of the cut completions, student's entropy above its start",
        CUT_RISE_WITH_ENTROPY,
        partial(largest_cut_rise, entropy_rose=True),
    ),
    (
        "rise of the cut completions, student's entropy not above its start",
        CUT_RISE_ALONE,
        partial(largest_cut_rise, entropy_rose=False),
    ),
    ("student's entropy, as a multiple of its start", ENTROPY_RATIO, largest_entropy_ratio),
    ("fall of the training reward", REWARD_FALL, largest_reward_fall),
    ("fall of the held-out reward, to the end", HELD_OUT_FALL, largest_held_out_fall),
)


def load(folder: Path) -> list[Run]:
    """The records of complete runs; on the private API with the accuracy of samples where no judge evaluated."""
    runs = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [shown(run) for run in runs if run is not None and run["complete"]]


def shown(run: Run) -> Run:
    """A record as the pages show it; where a judge evaluated, with the accuracy of samples as `right_samples`."""
    if run.get("accuracy") == JUDGED:
        right = of_samples(run)["points"][-1][ACCURACY] if run["log"] else None
        return {**run, "right_samples": right}
    return of_samples(run) if run.get("task") == "kit" else run


def of_samples(run: Run) -> Run:
    """A run whose accuracy is the share of right completions among those sampled since the evaluation before.

    The first batch is sampled before any step: it is the first point, and counts in the second, too. A supervised
    run samples nothing and keeps its points.
    """
    if not run["log"]:
        return {**run, "accuracy": SAMPLED}
    rewards = [(entry["step"] * run["samples_per_step"], entry["reward"]) for entry in entries(run)]
    start, likelihood, _ = run["points"][0]
    points = [[start, likelihood, rewards[0][1]]]
    for (before, *_), (samples, likelihood, _) in pairwise(run["points"]):
        sampled = [reward for end, reward in rewards if before < end <= samples]
        points.append([samples, likelihood, fmean(sampled)])
    return {**run, "points": points, "accuracy": SAMPLED}


def of_question(runs: Sequence[Run], question: str) -> dict[str, list[Run]]:
    """The runs of each arm of a question, in the order of seeds; none if only one arm has any, of another question.

    Seeds for choosing answer the questions in CHOOSING alone.
    """
    found: dict[str, list[Run]] = {}
    for arm in arms(question):
        recorded_question, recorded = recorded_as(question, arm)
        of_arm = [
            run
            for run in runs
            if (run["question"], run["arm"]) == (recorded_question, recorded.name)
            and (run["seed"] >= FIRST_SEED_FOR_CHOOSING) == (question in CHOOSING)
        ]
        if of_arm:
            found[arm.name] = sorted(of_arm, key=lambda run: run["seed"])
    own = any(run["question"] == question for of_arm in found.values() for run in of_arm)
    if not own and len(found) <= 1:
        return {}
    # One measure for all runs that are compared.
    if is_of_samples(found):
        return {arm: [of_samples(run) for run in of_arm] for arm, of_arm in found.items()}
    return found


def is_of_samples(by_arm: Runs) -> bool:
    """Whether the accuracy of a question's runs is that of samples: the judge did not evaluate all of them."""
    return any(run.get("accuracy") == SAMPLED for runs in by_arm.values() for run in runs)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    """The mean, and the range where there are several.

    Examples:
        >>> spread([0.5, 0.7]), spread([0.5])
        ('0.60 (0.50–0.70)', '0.50')
    """
    if len(values) == 1:
        return form(values[0])
    return f"{form(fmean(values))} ({form(min(values))}–{form(max(values))})"


def results(by_arm: Runs) -> str:
    """The results of each arm."""
    last = max(run["points"][-1][0] for runs in by_arm.values() for run in runs)
    evaluated = set.intersection(
        *({point[0] for point in run["points"]} for runs in by_arm.values() for run in runs)
    )
    chosen = [max(samples for samples in evaluated if samples <= last // part) for part in (4, 2)]
    head = [
        "",
        "seeds",
        *(f"after {samples}" for samples in chosen),
        f"at the end ({last})",
        "best",
        "end / best",
    ]
    head += ["probability at the end", f"fell below {FALLEN:g} of its best"]
    judged = all(run.get("accuracy") == JUDGED for runs in by_arm.values() for run in runs)
    head += ["right samples at the end"] * judged
    rows = []
    for arm, runs in by_arm.items():
        ends = [at(run, last, ACCURACY) for run in runs]
        rows.append(
            [
                arm,
                str(len(runs)),
                *(f"{fmean(at(run, samples, ACCURACY) for run in runs):.2f}" for samples in chosen),
                spread(ends),
                f"{fmean(map(best, runs)):.2f}",
                kept(runs),
                f"{fmean(at(run, last, PROBABILITY) for run in runs):.2f}",
                falls(runs),
                *([right_samples(runs)] if judged else []),
            ]
        )
    return markdown(head, rows)


def right_samples(runs: Sequence[Run]) -> str:
    """The share of right completions among those sampled since the last evaluation but one."""
    known = [run["right_samples"] for run in runs if run.get("right_samples") is not None]
    return spread(known) if known else NONE


def short(by_arm: Runs) -> str:
    """The end of each arm, best first."""
    order = sorted(by_arm, key=lambda arm: -fmean(run["points"][-1][ACCURACY] for run in by_arm[arm]))
    rows = [
        [
            arm,
            str(len(by_arm[arm])),
            spread([run["points"][-1][ACCURACY] for run in by_arm[arm]]),
            kept(by_arm[arm]),
            lowest(by_arm[arm]),
            falls(by_arm[arm]),
        ]
        for arm in order
    ]
    end = "accuracy of samples at the end" if is_of_samples(by_arm) else "accuracy at the end"
    head = ["", "seeds", end, "end / best", "lowest / best before", f"fell below {FALLEN:g} of its best"]
    return markdown(head, rows)


def kept(runs: Sequence[Run]) -> str:
    """Accuracy at the end over the best, of the seed where it is lowest."""
    learned = [run for run in runs if best(run) >= LEARNED]
    return f"{min(run['points'][-1][ACCURACY] / best(run) for run in learned):.2f}" if learned else NONE


def lowest(runs: Sequence[Run]) -> str:
    """The lowest accuracy of any evaluation over the best until then, of the seed where it is lowest."""
    shares = [lowest_share(run)[0] for run in runs if best(run) >= BEST_FROM]
    return f"{min(shares):.2f}" if shares else NONE


def falls(runs: Sequence[Run]) -> str:
    """How many runs fell, and after how many samples."""
    found = [samples for run in runs if (samples := fall(run)) is not None]
    return f"{len(found)} of {len(runs)}, after {', '.join(map(str, sorted(found)))}" if found else NONE


def rates(by_arm: Runs) -> str:
    """The accuracy at the end by the teacher's rate, α and batch; in italics where a run fell."""
    cells: dict[tuple[float, float, int], str] = {}
    for runs in by_arm.values():
        settings = runs[0]["settings"]
        text = spread([run["points"][-1][ACCURACY] for run in runs])
        fell = any(fall(run) is not None for run in runs)
        key = (settings["teacher_update_rate"], settings["alpha"], runs[0]["samples_per_step"])
        cells[key] = f"*{text}*" if fell else text
    columns = sorted({key[1:] for key in cells}, key=lambda column: column[::-1])
    head = ["rate", *(f"α={alpha:g}, batches of {samples}" for alpha, samples in columns)]
    rows = [
        [f"{rate:g}", *(cells.get((rate, *column), NONE) for column in columns)]
        for rate in sorted({key[0] for key in cells})
    ]
    return markdown(head, rows)


def outcome(run: Run) -> str | None:
    """One of OUTCOMES; `None` for a run that did not fall and whose best is below .5."""
    if fall(run) is not None:
        return "fell"
    if best(run) < LEARNED:
        return "learned nothing"
    return "learned" if best(run) >= BEST_FROM else None


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs of SDPO with α=0 in the smallest batches: metrics such as the divergence depend on both."""
    of_sdpo = [run for run in runs if run["method"] == "sdpo" and run["settings"]["alpha"] == 0]
    smallest = min((run["samples_per_step"] for run in of_sdpo), default=0)
    return [run for run in of_sdpo if run["samples_per_step"] == smallest]


def signs(runs: Sequence[Run]) -> str:
    """Medians and ranges of the metrics in the first twenty steps, by outcome of the run."""
    alike = comparable(runs)
    groups = {name: [run for run in alike if outcome(run) == name] for name in OUTCOMES}
    groups = {name: group for name, group in groups.items() if group}
    head = ["", "steps", *(f"{name} ({len(group)} runs)" for name, group in groups.items())]
    rows = []
    for name, label in SIGNS.items():
        for steps in (FIRST, LATER):
            cells = [_range([window(run, name, steps) for run in group]) for group in groups.values()]
            rows.append([label if steps is FIRST else "", f"{steps[0]}–{steps[-1]}", *cells])
    return markdown(head, rows)


def window(run: Run, name: str, steps: range) -> float | None:
    """The mean of a metric over some steps, of those that have it."""
    found = [entry[name] for entry in entries(run) if entry["step"] in steps and name in entry]
    return fmean(found) if found else None


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    return f"{median(known):.2g} ({min(known):.2g}–{max(known):.2g})"


def every_step(runs: Sequence[Run]) -> list[Run]:
    """The runs whose log has every step and the metrics that the monitors read."""
    whole = (run for run in runs if "self_distillation/divergence" in run["log"])
    return [run for run in whole if run["log"]["step"] == list(range(1, len(run["log"]["step"]) + 1))]


def first_warnings(runs: Sequence[Run]) -> str:
    """When accuracy fell, and when the trainer's monitors warned; only runs with one of them."""
    rows = []
    for run in every_step(runs):
        of_training = warnings(run, evaluations=False)
        with_evaluations = warnings(run, evaluations=True)
        if not with_evaluations and fall(run) is None:
            continue
        rows.append(
            [
                run_name(run),
                *(NONE if fell is None else f"after {fell}" for fell in (fall(run), fall(run, COLLAPSED))),
                _said(of_training),
                _said({name: at for name, at in with_evaluations.items() if name not in of_training}),
            ]
        )
    head = ["run", f"below {FALLEN:g} of its best", f"below {COLLAPSED:g}"]
    return markdown([*head, "warnings from the log of training", "from evaluations"], rows)


def run_name(run: Run) -> str:
    """Its arm and seed; with the question where several have an arm of that name."""
    count = sum(arm.name == run["arm"] for arms_of_one in QUESTIONS.values() for arm in arms_of_one)
    question = f" ({run['question']})" if count > 1 else ""
    return f"{run['arm']}{question}, seed {run['seed']}"


def _said(found: Mapping[str, int]) -> str:
    return ", ".join(f"`{name}` after {samples}" for name, samples in found.items()) or NONE


def all_warnings(runs: Sequence[Run]) -> str:
    """How many runs have the warnings that they should; only runs whose log has every step."""
    kept, collapsed = kept_and_collapsed(runs)
    groups = {
        "learned: no warning": kept,
        f"fell below {COLLAPSED:g} of its best: a warning early enough": collapsed,
    }
    rows = [
        [name, str(len(group)), str(sum(problem(run) is None for run in group))]
        for name, group in groups.items()
    ]
    return markdown([f"expected (early: {LEAD} completions before)", "runs", "as expected"], rows)


def kept_and_collapsed(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that should have no warning and those that should have one, of those whose log has every step."""
    whole = every_step(runs)
    return (
        [run for run in whole if outcome(run) == "learned"],
        [run for run in whole if fall(run, COLLAPSED) is not None],
    )


def margins(runs: Sequence[Run]) -> str:
    """How far the limits of the warnings are from the runs on either side; empty with fewer than two on a side."""
    kept, collapsed = kept_and_collapsed(runs)
    if len(kept) < 2 or len(collapsed) < 2:
        return ""
    rows = []
    for name, limit, most in MARGINS:
        below, above = ({run_name(run): most(run) for run in group} for group in (kept, collapsed))
        highest, lowest = max(below, key=below.__getitem__), min(above, key=above.__getitem__)
        correct = leave_one_out(list(below.values()), list(above.values()))
        rows.append(
            [
                name,
                f"{limit:g}",
                f"{below[highest]:.3g} ({highest})",
                f"{above[lowest]:.3g} ({lowest})" if above[lowest] > 0 else NONE,
                f"{correct} of {len(kept) + len(collapsed)}" if above[lowest] > below[highest] else NONE,
            ]
        )
    head = ["", "limit", f"largest of {len(kept)} runs that learned"]
    head += [f"smallest of {len(collapsed)} runs that fell below {COLLAPSED:g} of their best"]
    return markdown([*head, "correct, leave-one-out"], rows)


def setup(runs: Sequence[Run], held_out: int) -> str:
    """Model, machine, versions and sizes."""

    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(run[name]) for run in runs if run[name] is not None))

    versions: dict[str, Any] = {name: None for run in runs for name in run["versions"]}
    texts = [
        f"{name} {', '.join(dict.fromkeys(run['versions'][name] for run in runs if name in run['versions']))}"
        for name in versions
    ]
    usual = min(run["samples"] for run in runs)
    minutes = [run["seconds"] / 60 for run in runs if run["samples"] == usual]
    memory = [run["peak_gib"] for run in runs if run["peak_gib"] is not None]
    task = TASKS[runs[0]["task"]]
    different = len({str(question.prompt) for question in task.held_out(held_out)})
    rows = [
        ["model", each("model")],
        ["SHA-256 of its weights", each("weights_sha256") or NONE],
        ["completions", f"{GROUP} for each prompt at temperature 1, of at most {task.max_completion} tokens"],
        ["device", each("device")],
        ["versions", f"Python {each('python')}, {', '.join(texts)}"],
        ["runs", f"{len(runs)}, most of {usual} completions"],
        ["held-out questions", f"{held_out}, of which {different} are distinct"],
        ["minutes of such a run, with others on the same device", spread(minutes, "{:.1f}".format)],
        ["GiB of a run at most", f"{max(memory):.1f}" if memory else NONE],
    ]
    return markdown(["", ""], rows)

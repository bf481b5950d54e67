"""What came out, in sentences whose numbers are those of the records.

A number stands in a sentence as `{end[ARM]}`, see `numbers`; a sentence about an arm without runs is left out.
A module of `figures.py` and of the embedded demo's `results.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from string import Formatter

from curves import ACCURACY, LEARNED, PROBABILITY, Run, at, best

EARLY = 2240  # samples

# Under the heading of a question.
FINDINGS: dict[str, tuple[str, ...]] = {
    "learns": (
        "SDPO ends at {end[SDPO]}, its three seeds at {each[SDPO]}, and is still rising. Its probability of "
        "the right call is only {probability[SDPO]}: greedy decoding is right more often than a sample.",
        "GRPO ends at {end[GRPO]}: not one completion of its training is right, so it has no reward to learn "
        "from. SDPO without feedback has no signal for the same reason, and ends at {end[SDPO, peers only]}.",
        "With the feedback of other failures SDPO ends at {end[SDPO, shuffled feedback]}: it learns from "
        "what the feedback says of this answer.",
        "Cross-entropy on the right calls is at {early[supervised]} after 2240 completions, and ends at "
        "{end[supervised]}.",
    ),
    "grpo learning rate": (
        "No completion is right at any of them, and all end at {end[GRPO, lr 5e-06]}: there is nothing to "
        "choose by.",
    ),
    "settings": (
        "One seed each: what differs by no more than SDPO's seeds do above is no finding.",
        "SRPO as published (its routing, denominator and weights of tokens) brings α=0 from {end[α=0]} to "
        "{end[α=0, SRPO]}, and the probability of the right call from {probability[α=0]} to "
        "{probability[α=0, SRPO]}.",
        "It is not better in every setting: with α=0.5 it ends at {end[α=0.5, SRPO]}, beside {end[α=0.5]} "
        "without it; with twice the learning rate at {end[α=0, SRPO, lr 2e-05]}, beside {end[α=0, lr "
        "2e-05]}; and with the teacher's rate 0.02 at {end[α=0, SRPO, rate 0.02]}, after {best[α=0, SRPO, "
        "rate 0.02]}.",
        "A half of GRPO's loss ends at {end[α=0, hybrid λ=0.5]}, with a probability of "
        "{probability[α=0, hybrid λ=0.5]}; on its way three evaluations are below 0.05.",
        "SRPO's weights of tokens alone reach {best[α=0, confidence weights]}, and end at "
        "{end[α=0, confidence weights]}.",
        "A tenth of the answers is right first after {begins[α=0]} completions with α=0, {begins[α=0.1]} "
        "with α=0.1 and {begins[α=0.5]} with α=0.5. They end at {end[α=0]}, {end[α=0.1]} and {end[α=0.5]}.",
    ),
    "rate": (
        "α=0 with the rate 0.05 ends at {end[α=0, rate 0.05 per 64]}. Two of the sixteen settings have runs, "
        "which differ in α as well; [the cures](#do-the-cures-cure) have the rate alone.",
    ),
    "cures": (
        "Alone, the setting ends at {each[collapsing]} on two seeds, whose best are {bests[collapsing]}: the "
        "first learns no call that greedy decoding finds, the second loses all.",
        "SRPO as published keeps what it learned ({end[collapsing + SRPO]}, with a probability of "
        "{probability[collapsing + SRPO]}). No part of it does so alone: the routing ends at "
        "{end[collapsing + SRPO routing]}, the denominator (`batch-token-mean`, two seeds) at "
        "{end[collapsing + batch-token-mean]}, and the weights of tokens at {end[collapsing + confidence "
        "weights]}.",
        "A half of GRPO's loss keeps what it learned ({end[collapsing + hybrid λ=0.5]}); a tenth does not "
        "({end[collapsing + hybrid λ=0.1]}, after {best[collapsing + hybrid λ=0.1]}).",
        "A slower teacher, with the rate per 256 completions, ends at {each[collapsing + rate per 256 "
        "samples]} on two seeds, whose best are {bests[collapsing + rate per 256 samples]}: the second falls "
        "at its last evaluation.",
        "The anchor ends at {end[collapsing + anchor 0.1]}, after {best[collapsing + anchor 0.1]}; the "
        "teacher that restarts at {end[collapsing + teacher restart]}, after {best[collapsing + teacher "
        "restart]}; the trust region at {end[collapsing + trust region]}, after {best[collapsing + trust "
        "region]} and several evaluations at 0.",
        "Pass-rate weights learn nothing ({best[collapsing + pass-rate weights]}): they are 0 where a group "
        "fails as a whole.",
        "Two seeds have the first three rows, one has each other row.",
    ),
}
# On the other page, by the name of their place: the questions whose runs they are about, and the text.
SENTENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "choosing rate": (
        ("cures", "settings"),
        "On the private API, α=0 with the rate 0.05 ends at {each[collapsing]} on two seeds where the rate "
        "is per batch of 64, and at {each[collapsing + rate per 256 samples]} where it is per 256 "
        "completions. With SRPO there is no order: 0.01 ends at {end[α=0, SRPO]} and 0.02 at {end[α=0, SRPO, "
        "rate 0.02]} on one seed, 0.05 at {end[collapsing + SRPO]} on another.",
    ),
    "choosing alpha": (
        ("settings",),
        "On the private API, by one seed with the rate 0.01, a tenth of the answers is right first after "
        "{begins[α=0]} completions with α=0, {begins[α=0.1]} with α=0.1 and {begins[α=0.5]} with α=0.5; they "
        "end at {end[α=0]}, {end[α=0.1]} and {end[α=0.5]}.",
    ),
    "choosing cures": (
        ("cures",),
        "On the private API, of what was tried on a setting that collapses (α=0, with a teacher four times "
        "as fast as the paper's):\n\n"
        '* SRPO as published ended at {end[collapsing + SRPO]}: `routing="srpo"` with '
        '`loss_aggregation="batch-token-mean"` and `token_weights="confidence"`. Each of the three alone did '
        "not "
        "prevent the collapse.\n"
        "* A half of GRPO's loss, `grpo_weight=0.5`, ended at {end[collapsing + hybrid λ=0.5]}, a tenth at "
        "{end[collapsing + hybrid λ=0.1]}.\n"
        "* A slower teacher, `teacher_rate_samples=256`, ended at {each[collapsing + rate per 256 samples]}, "
        "and `anchor_weight=0.1` at {end[collapsing + anchor 0.1]}. Their probability of the right answer "
        "stays low: {probability[collapsing + rate per 256 samples]} and {probability[collapsing + anchor "
        "0.1]}, beside {probability[collapsing + SRPO]} with SRPO.\n"
        "* A teacher that restarts, and the trust region, lost a part of what they had: {end[collapsing + "
        "teacher restart]} after {best[collapsing + teacher restart]}, {end[collapsing + trust region]} after "
        "{best[collapsing + trust region]}.\n\n"
        "Most rows have one seed. The two of the slower teacher differ by a quarter, so the order of the "
        "rows in the middle may change with another.",
    ),
}


def numbers(by_arm: Mapping[str, Sequence[Run]], early: int) -> dict[str, dict[str, str]]:
    """What a sentence can name, by arm.

    Means over seeds: `end` is the accuracy at the end, `best` the best, `early` that after some samples, and
    `probability` the probability of the right answer at the end. Of each seed, `each` and `bests` are `end` and
    `best`, and `begins` the samples of the first evaluation at which a tenth of the answers is right.

    Args:
        by_arm: the runs of each arm, in the order of seeds.
        early: the samples of `early`.
    """
    means: dict[str, Callable[[Run], float]] = {
        "end": lambda run: float(run["points"][-1][ACCURACY]),
        "best": best,
        "early": lambda run: at(run, early, ACCURACY),
        "probability": lambda run: float(run["points"][-1][PROBABILITY]),
    }
    found = {
        name: {arm: f"{fmean(map(measure, runs)):.2f}" for arm, runs in by_arm.items()}
        for name, measure in means.items()
    }
    for name, measure in (("each", means["end"]), ("bests", best)):
        found[name] = {arm: _listed([f"{measure(run):.2f}" for run in runs]) for arm, runs in by_arm.items()}
    found["begins"] = {arm: _listed([str(begins(run)) for run in runs]) for arm, runs in by_arm.items()}
    return found


def begins(run: Run) -> int | None:
    """The samples of the first evaluation at which a run has learned anything."""
    return next((int(point[0]) for point in run["points"] if point[ACCURACY] >= LEARNED), None)


def said(sentences: Sequence[str], by_arm: Mapping[str, Sequence[Run]], early: int = EARLY) -> list[str]:
    """The sentences with their numbers, without those about an arm that has no runs."""
    known = numbers(by_arm, early)
    return [sentence.format(**known) for sentence in sentences if _arms(sentence) <= by_arm.keys()]


def _arms(sentence: str) -> set[str]:
    fields = (field for _, field, _, _ in Formatter().parse(sentence) if field)
    return {field.partition("[")[2].removesuffix("]") for field in fields}


def _listed(texts: Sequence[str]) -> str:
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last

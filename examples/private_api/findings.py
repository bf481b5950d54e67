"""The results in sentences, with numbers from the records.

A sentence has a number as `{end[ARM]}`, see `numbers`. A sentence about an arm without runs is left out.
A module of `figures.py` and of the embedded demo's `results.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from string import Formatter

from curves import ACCURACY, LEARNED, PROBABILITY, Run, at, best

EARLY_SAMPLES = 2240  # when `early` is measured on the private API

# Below the heading of a question.
FINDINGS: dict[str, tuple[str, ...]] = {
    "learns": (
        "SDPO ends at {end[SDPO]}; its three seeds end at {each[SDPO]}. The accuracy is still rising: "
        "the best of each seed is one of its last two evaluations. The probability of the right call is "
        "only {probability[SDPO]}, so greedy decoding is right more often than a sample.",
        "GRPO ends at {end[GRPO]}. No completion of its training is right, so all rewards are 0 and it "
        "has nothing to learn from. SDPO without feedback ends at {end[SDPO, peers only]} for the same "
        "reason.",
        "SDPO with the feedback of other failures ends at {end[SDPO, shuffled feedback]}. So SDPO learns "
        "from what the feedback says about the answer at hand.",
        "Cross-entropy on the right calls is at {early[supervised]} after {samples} completions and ends at "
        "{end[supervised]}.",
    ),
    "grpo learning rate": (
        "With each of the three learning rates no completion is right, and GRPO ends at {end[GRPO, lr "
        "5e-06]}. So these runs give no reason to prefer one of them.",
    ),
    "settings": (
        "Each row has one seed. Two seeds of one setting [further below](#what-prevents-the-collapse) "
        "end a quarter apart, and in six of these ten runs the accuracy changes by as much between two "
        "successive evaluations. So smaller differences in this table may be chance.",
        "α=0 with SRPO as published (its routing, denominator and token weights) ends at {end[α=0, "
        "SRPO]}, and at {end[α=0]} without. The probability of the right call is {probability[α=0, "
        "SRPO]}, and {probability[α=0]} without.",
        "SRPO does not help in every setting. With α=0.5 the run ends at {end[α=0.5, SRPO]}, and at "
        "{end[α=0.5]} without SRPO. With α=0 and twice the learning rate it ends at {end[α=0, SRPO, lr "
        "2e-05]}, and at {end[α=0, lr 2e-05]} without. With α=0 and the teacher's rate 0.02 it falls "
        "from {best[α=0, SRPO, rate 0.02]} to {end[α=0, SRPO, rate 0.02]}.",
        "α=0 with half of the loss from GRPO ends at {end[α=0, hybrid λ=0.5]}, with a probability of "
        "{probability[α=0, hybrid λ=0.5]}. Three of its evaluations are below 0.05 after it has begun to "
        "learn.",
        "α=0 with SRPO's token weights alone falls from {best[α=0, confidence weights]} to {end[α=0, "
        "confidence weights]}.",
        "A tenth of the answers is right for the first time after {begins[α=0]} completions with α=0, "
        "{begins[α=0.1]} with α=0.1 and {begins[α=0.5]} with α=0.5. These runs end at {end[α=0]}, "
        "{end[α=0.1]} and {end[α=0.5]}.",
    ),
    "rate": (
        "α=0 with the rate 0.05 ends at {end[α=0, rate 0.05 per 64]}. Only two of the sixteen settings "
        "have runs, and they differ in α as well as in the rate. [The next "
        "comparison](#what-prevents-the-collapse) has two settings that differ in the rate alone.",
    ),
    "cures": (
        "The first three rows have two seeds each, all others seed 0 alone.",
        "The setting alone ends at {end[collapsing]} on both of its seeds. Their best accuracies are "
        "{bests[collapsing]}: seed 0 never answers a held-out question right, seed 1 loses all that it "
        "learned.",
        "SRPO as published does not fall: it ends at {end[collapsing + SRPO]}, with a probability of "
        "{probability[collapsing + SRPO]}. None of its parts alone prevents the collapse. The routing "
        "ends at {end[collapsing + SRPO routing]}, the denominator (`batch-token-mean`) at "
        "{end[collapsing + batch-token-mean]} and the token weights (`confidence`) at {end[collapsing + "
        "confidence weights]}.",
        "Half of the loss from GRPO (λ=0.5) does not fall and ends at {end[collapsing + hybrid λ=0.5]}. "
        "A tenth (λ=0.1) falls from {best[collapsing + hybrid λ=0.1]} to {end[collapsing + hybrid "
        "λ=0.1]}.",
        "A slower teacher, with the same rate per 256 completions instead of 64, ends at "
        "{each[collapsing + rate per 256 samples]}. The best accuracies of the two seeds are "
        "{bests[collapsing + rate per 256 samples]}: the second seed falls at its last evaluation.",
        "With the anchor the run ends at {end[collapsing + anchor 0.1]}, after a best of "
        "{best[collapsing + anchor 0.1]}. With a teacher that restarts it falls from {best[collapsing + "
        "teacher restart]} to {end[collapsing + teacher restart]}. With the trust region it falls from "
        "{best[collapsing + trust region]} to {end[collapsing + trust region]}, and some of its "
        "evaluations are at 0.",
        "Pass-rate weights learn nothing ({best[collapsing + pass-rate weights]}), because they are 0 "
        "where all completions of a group fail.",
    ),
}
# In the prose of a page, by the name of their place: the questions whose runs they are about, and the text.
SENTENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "results summary": (
        ("learns", "cures"),
        "* On the private API SDPO ends at an accuracy of {end[SDPO]} after 9600 completions. GRPO, SDPO "
        "with the feedback of other failures and SDPO without feedback end at {end[GRPO]}. These are "
        "means of three seeds.\n"
        "* With α=0 and a teacher about four times as fast as the paper's, SDPO ends at "
        "{end[collapsing]} on both of two seeds. With the paper's rate it ends at {each[collapsing + "
        "rate per 256 samples]} on the same seeds.\n"
        "* SRPO as published and half of the loss from GRPO also prevented this collapse. They end at "
        "{end[collapsing + SRPO]} and {end[collapsing + hybrid λ=0.5]}, on one seed each, which is too few "
        "to say which one is better.",
    ),
    "choosing summary": (
        ("learns", "cures"),
        "* Give the teacher's rate per completions: the paper's is `teacher_update_rate=0.05` with "
        "`teacher_rate_samples=256`. With α=0 it ends at an accuracy of {each[collapsing + rate per 256 "
        "samples]} on two seeds, where 0.05 per batch of 64 ends at {end[collapsing]} on both.\n"
        "* Keep the α of the preset (0.5 or 1) unless nothing is learned. α=0 begins to learn earlier on the "
        "private API (one seed), but ends lowest on the embedded task (three seeds).\n"
        "* If a run with α=0 still loses what it learned, add SRPO as published or half of the loss from "
        "GRPO. They end at {end[collapsing + SRPO]} and {end[collapsing + hybrid λ=0.5]}, on one seed "
        "each.\n"
        "* Do not choose by small differences in these tables. Most rows have one seed, and SDPO's three "
        "seeds end at {each[SDPO]}.",
    ),
    "choosing rate": (
        ("cures", "settings"),
        "On the private API, α=0 with the rate 0.05 ends at {end[collapsing]} on both of two seeds where the "
        "rate is per batch of 64, and at {each[collapsing + rate per 256 samples]} where it is per 256 "
        "completions. With SRPO the rates per batch of 64 show no order: 0.01 ends at {end[α=0, SRPO]} "
        "and 0.02 at {end[α=0, SRPO, rate 0.02]} on one seed, and 0.05 at {end[collapsing + SRPO]} on "
        "another.",
    ),
    "choosing alpha": (
        ("settings",),
        "On the private API, on one seed with the rate 0.01 per batch of 64, a tenth of the answers is "
        "right for the first time after {begins[α=0]} completions with α=0, {begins[α=0.1]} with α=0.1 "
        "and {begins[α=0.5]} with α=0.5. These runs end at {end[α=0]}, {end[α=0.1]} and {end[α=0.5]}.",
    ),
    "choosing cures": (
        ("cures",),
        "On the private API these options were added to a setting that collapses (α=0, with a teacher "
        "about four times as fast as the paper's):\n\n"
        '* SRPO as published, that is `routing="srpo"` with `loss_aggregation="batch-token-mean"` and '
        '`token_weights="confidence"`, ends at {end[collapsing + SRPO]}. None of the three alone '
        "prevents the collapse.\n"
        "* Half of the loss from GRPO, `grpo_weight=0.5`, ends at {end[collapsing + hybrid λ=0.5]}; a "
        "tenth ends at {end[collapsing + hybrid λ=0.1]}.\n"
        "* A slower teacher, `teacher_rate_samples=256`, ends at {each[collapsing + rate per 256 "
        "samples]}, and `anchor_weight=0.1` at {end[collapsing + anchor 0.1]}. Their probability of the "
        "right answer stays low: {probability[collapsing + rate per 256 samples]} and "
        "{probability[collapsing + anchor 0.1]}, where SRPO has {probability[collapsing + SRPO]}.\n"
        "* A teacher that restarts falls from {best[collapsing + teacher restart]} to {end[collapsing + "
        "teacher restart]}, and the trust region from {best[collapsing + trust region]} to "
        "{end[collapsing + trust region]}.\n\n"
        "Most rows have one seed. The two seeds of the slower teacher end a quarter apart, so a difference of "
        "this size between rows may be chance.",
    ),
}


def numbers(by_arm: Mapping[str, Sequence[Run]], early: int) -> dict[str, dict[str, str]]:
    """The numbers that a sentence can name, as texts by name and arm.

    Means over seeds: `end` is the accuracy at the end, `best` the best accuracy, `early` the accuracy after
    `early` samples, and `probability` the probability of the right answer at the end. Lists with one number per
    seed: `each` has the accuracy at the end, `bests` the best accuracy, and `begins` the samples of the first
    evaluation at which a tenth of the answers is right, or "never".

    Args:
        by_arm: the runs of each arm, in the order of seeds.
        early: number of samples.
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
    found["begins"] = {
        arm: _listed([str(begins(run) or "never") for run in runs]) for arm, runs in by_arm.items()
    }
    return found


def begins(run: Run) -> int | None:
    """The samples of the first evaluation at which a tenth of the answers is right; `None` if none is."""
    return next((int(point[0]) for point in run["points"] if point[ACCURACY] >= LEARNED), None)


def said(
    sentences: Sequence[str], by_arm: Mapping[str, Sequence[Run]], early: int = EARLY_SAMPLES
) -> list[str]:
    """The sentences with their numbers; those about an arm without runs are left out."""
    known = numbers(by_arm, early)
    return [
        sentence.format(samples=early, **known) for sentence in sentences if _arms(sentence) <= by_arm.keys()
    ]


def _arms(sentence: str) -> set[str]:
    fields = (field.partition("[") for _, field, _, _ in Formatter().parse(sentence) if field)
    return {arm.removesuffix("]") for _, bracket, arm in fields if bracket}


def _listed(texts: Sequence[str]) -> str:
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last

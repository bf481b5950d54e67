"""The results in sentences, with numbers from the records.

A sentence has a number as `{end[ARM]}`, see `numbers`. A sentence about an arm without runs is left out.
A module of `figures.py` and of the embedded demo's `results.py`; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from string import Formatter

from curves import ACCURACY, LEARNED, PROBABILITY, Run, at, best

EARLY_SAMPLES = 2240  # when `early` is measured on the private API

# Below the heading of a question.
FINDINGS: dict[str, tuple[str, ...]] = {
    "learns": (
        "SDPO with α=0.5 ends at {end[SDPO]}; its seeds end at {each[SDPO]}. With the chosen settings, α=0 and "
        "SRPO as published, it ends at {end[SDPO, chosen settings]}, seeds at {each[SDPO, chosen settings]}.",
        "GRPO ends at {end[GRPO]}. No completion of its training is right, so all rewards are 0 and it has "
        "nothing to learn from. SDPO without feedback ends at {end[SDPO, peers only]} for the same reason.",
        "With the feedback of other failures, SDPO with α=0.5 ends at {end[SDPO, shuffled feedback]}: it learns "
        "from what the feedback says about the answer at hand. With the chosen settings it ends at {each[SDPO, "
        "chosen settings, shuffled feedback]}. A likely reason, which was not tested: the feedback on another "
        "question names a function, too, and SRPO's GRPO part rewards a sample that tries it where it is right.",
        "Cross-entropy on the right calls answers {early[supervised]} of the held-out questions right after "
        "{samples} training examples, and {end[supervised]} at the end.",
    ),
    "grpo learning rate": (
        "With each of the three learning rates no completion is right, and GRPO ends at {end[GRPO, lr 5e-06]}. So "
        "these runs give no reason to prefer one of them.",
    ),
    "settings": (
        "The settings were chosen by the last column, where α=0 with SRPO as published (its routing, denominator "
        "and token weights) is the best. By the accuracy of the samples it ends at {each[α=0, SRPO]}, half of the "
        "loss from GRPO at {each[α=0, hybrid λ=0.5]}, and SRPO with twice the learning rate at {each[α=0, SRPO, "
        "lr 2e-05]}.",
        "SRPO ends higher than the same setting without it with α=0 ({end[α=0, SRPO]} and {end[α=0]}), and with "
        "α=0 and twice the learning rate ({end[α=0, SRPO, lr 2e-05]} and {end[α=0, lr 2e-05]}), but lower with "
        "α=0.5 ({end[α=0.5, SRPO]} and {end[α=0.5]}).",
        "SRPO with the teacher's rate 0.05 depends on the seed: it ends at {each[α=0, SRPO, rate 0.05]}. The same "
        'setting has three more seeds [below](#what-helps-with-a-fast-teacher), as "collapsing + SRPO".',
        "A learning rate that falls to 0 ends at {end[α=0, SRPO, decay]}, and at {end[α=0, SRPO, lr 2e-05, "
        "decay]} with twice the learning rate.",
    ),
    "rate": (
        "With α=0 and batches of 64 the rates 0 (a frozen teacher), 0.0025, 0.01 and 0.05 end at {end[α=0, rate 0 "
        "per 64]}, {end[α=0, rate 0.0025 per 64]}, {end[α=0, rate 0.01 per 64]} and {end[α=0, rate 0.05 per 64]}. "
        "The three seeds with 0.05 end at {each[α=0, rate 0.05 per 64]}.",
        "In batches of 256 the rates 0.01 and 0.05 end at {end[α=0, rate 0.01 per 256]} and {end[α=0, rate 0.05 "
        "per 256]}, after a quarter of the steps.",
        "[Below](#what-helps-with-a-fast-teacher) the rate 0.05 per 256 completions is compared with 0.05 per "
        "batch of 64.",
    ),
    "alpha": ("The seeds of α=0 end at {each[α=0]}, those of α=0.5 at {each[α=0.5]}.",),
    "cures": (
        "The setting alone ends at {each[collapsing]}. With the rate per 256 completions, the paper's batch, it "
        "ends at {each[collapsing + rate per 256 samples]} on the same seeds.",
        "Half of the loss from GRPO (λ=0.5) ends highest, at {each[collapsing + hybrid λ=0.5]}; a tenth ends at "
        "{each[collapsing + hybrid λ=0.1]}. SRPO as published ends at {each[collapsing + SRPO]}.",
        "The anchor ends at {each[collapsing + anchor 0.1]}, a teacher that restarts at {each[collapsing + "
        "teacher restart]} and the trust region at {each[collapsing + trust region]}.",
        "Of SRPO's three parts, alone: the routing ends at {each[collapsing + SRPO routing]}, the denominator "
        "(`batch-token-mean`) at {each[collapsing + batch-token-mean]} and the token weights (`confidence`) at "
        "{each[collapsing + confidence weights]}.",
        "Pass-rate weights learn nothing ({best[collapsing + pass-rate weights]}), because they are 0 where all "
        "completions of a group fail.",
        "The last column shows what a comparison with one spelling hides: with λ=0.5 the three seeds have "
        "{spelled[collapsing + hybrid λ=0.5]} there, because two of them write the call between backticks. The "
        "judge accepts that, and the mean of their accuracy is the highest of the table.",
        "Two of the three seeds of the setting alone end by reciting the teacher's prompt: sentences of it, such "
        "as `The correct solution is:`, stand before the call or in its place, and many completions are cut.",
    ),
    "lasting": (
        "The seeds end at {each[SDPO, chosen settings]}; their best are {bests[SDPO, chosen settings]}.",
        "Greedy completions of held-out questions equal the one spelling in {spelled[SDPO, chosen settings]} of "
        "the cases, so they are right at least as often.",
    ),
}
# In the prose of a page, by the name of their place: the questions whose runs they are about, and the text.
SENTENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "results summary": (
        ("learns", "cures"),
        "* On the private API, after 9600 completions, a share of {end[SDPO]} of SDPO's samples is right with "
        "α=0.5, and {end[SDPO, chosen settings]} with α=0 and SRPO as published. With GRPO, and with SDPO without "
        "feedback, it is {end[GRPO]}.\n"
        "* With shuffled feedback the first setting ends at {end[SDPO, shuffled feedback]}, the second at "
        "{each[SDPO, chosen settings, shuffled feedback]} (two seeds).\n"
        "* A teacher about four times as fast as the paper's ends lower. With α=0, in batches of 64, the seeds "
        "end at {each[collapsing]}, and at {each[collapsing + rate per 256 samples]} with the paper's rate per "
        "completions.\n"
        "* The fast teacher with half of the loss from GRPO ends at {end[collapsing + hybrid λ=0.5]}, with SRPO "
        "as published at {end[collapsing + SRPO]}.",
    ),
    "choosing summary": (
        ("learns", "cures", "rate", "settings"),
        "* Leave the teacher's rate at its default, 0.05 per 256 completions as in the paper. On the private API, "
        "with α=0 in batches of 64, it ends at {each[collapsing + rate per 256 samples]}; 0.05 per batch ends at "
        "{each[collapsing]} on the same seeds, and a frozen teacher at {each[α=0, rate 0 per 64]}.\n"
        "* Keep the α of the preset (0.5 or 1) unless nothing is learned. α=0 ends higher on the private API, but "
        "lowest on the embedded task (three seeds each).\n"
        "* If samples stay much worse than greedy answers, add half of the loss from GRPO or SRPO as published. "
        "On the private API they end at {end[collapsing + hybrid λ=0.5]} and {end[collapsing + SRPO]}, means of "
        "three seeds.\n"
        "* Do not choose by small differences in these tables: the fast teacher with SRPO ends at "
        "{each[collapsing + SRPO]} on three seeds, and at {each[α=0, SRPO, rate 0.05]} on two others.",
    ),
    "choosing rate": (
        ("cures", "settings"),
        "On the private API, α=0 with the rate 0.05 ends at {each[collapsing]} where the rate is per batch of 64, "
        "and at {each[collapsing + rate per 256 samples]} where it is per 256 completions. With SRPO, on two "
        "seeds, the rates 0.01, 0.02 and 0.05 per batch of 64 end at {end[α=0, SRPO]}, {end[α=0, SRPO, rate "
        "0.02]} and {end[α=0, SRPO, rate 0.05]}.",
    ),
    "choosing alpha": (
        ("alpha",),
        "On the private API, with the rate 0.01 per batch of 64, a tenth of the samples is right for the first "
        "time after {begins[α=0]} completions with α=0, and after {begins[α=0.5]} with α=0.5.",
    ),
    "choosing cures": (
        ("cures",),
        "On the private API these options were added to α=0 with a teacher about four times as fast as the "
        "paper's, which ends at {end[collapsing]} alone:\n\n"
        "* Half of the loss from GRPO, `grpo_weight=0.5`, ends at {end[collapsing + hybrid λ=0.5]}; a tenth ends "
        "at {end[collapsing + hybrid λ=0.1]}.\n"
        '* SRPO as published, that is `routing="srpo"` with `loss_aggregation="batch-token-mean"` and '
        '`token_weights="confidence"`, ends at {end[collapsing + SRPO]}.\n'
        "* The trust region ends at {end[collapsing + trust region]}, a teacher that restarts at {end[collapsing "
        "+ teacher restart]}, the default rate at {end[collapsing + rate per 256 samples]} and "
        "`anchor_weight=0.1` at {end[collapsing + anchor 0.1]}.",
    ),
}


def numbers(by_arm: Mapping[str, Sequence[Run]], early: int) -> dict[str, dict[str, str]]:
    """The numbers that a sentence can name, as texts by name and arm.

    Means over seeds: `end` is the accuracy at the end, `best` the best accuracy, `early` the accuracy after
    `early` samples, and `probability` the probability of the right answer at the end. Lists with one number per
    seed: `each` has the accuracy at the end, `bests` the best accuracy, `spelled` that of the comparison with one
    spelling (`tables.of_samples`), and `begins` the samples of the first evaluation at which a tenth of the answers
    is right, or "never".

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
    lists = {"each": means["end"], "bests": best, "spelled": lambda run: float(run.get("spelled", math.nan))}
    for name, measure in lists.items():
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

"""The results in sentences, with numbers from the records.

A sentence has a number as `{end[ARM]}`, see `numbers`. A sentence about an arm without runs is left out.
A module of `figures.py` and of the embedded demo's `results.py`; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from string import Formatter

from curves import ACCURACY, LEARNED, PROBABILITY, Run, at, best, fall, lowest_share

EARLY_SAMPLES = 2240  # when `early` is measured on the private API

# Below the heading of a question.
FINDINGS: dict[str, tuple[str, ...]] = {
    "learns": (
        "SDPO with α=0.5 ends at {end[SDPO]}; its seeds end at {each[SDPO]}. With the chosen settings (α=0, half "
        "of the loss from GRPO, the teacher's rate 0.05 per batch of 64 and the learning rate 2e-5) the seeds end "
        "at {each[SDPO, chosen settings]}.",
        "GRPO ends at {end[GRPO]}. No completion of its training is right, so all rewards are 0 and it has "
        "nothing to learn from. SDPO without feedback ends at {end[SDPO, peers only]} for the same reason.",
        "With the feedback of other failures, SDPO ends at {end[SDPO, shuffled feedback]} with α=0.5 and at "
        "{end[SDPO, chosen settings, shuffled feedback]} with the chosen settings: it learns from what the "
        "feedback says about the answer at hand.",
        "Cross-entropy on the right calls answers {early[supervised]} of the held-out questions right after "
        "{samples} training examples, and {end[supervised]} at the end.",
    ),
    "grpo learning rate": (
        "With each of the three learning rates no completion is right, and GRPO ends at {end[GRPO, lr 5e-06]}. So "
        "these runs give no reason to prefer one of them.",
    ),
    "settings": (
        "Half of the loss from GRPO with the teacher's rate 0.05 answers every question on both seeds, with the "
        "learning rate 1e-5 and with 2e-5. These runs do not tell the two apart; the second was taken.",
        "Without GRPO and SRPO greedy answers are far better than samples. α=0 alone ends at {end[α=0]}, and "
        "{right[α=0]} of its samples are right; with half of the loss from GRPO it ends at {end[α=0, hybrid "
        "λ=0.5]} and {right[α=0, hybrid λ=0.5]}, with SRPO at {end[α=0, SRPO]} and {right[α=0, SRPO]}. So both "
        "raise the share of right samples, and leave greedy accuracy about the same.",
        "With α=0.5, half of the loss from GRPO raises the share of right samples from {right[α=0.5]} to "
        "{right[α=0.5, hybrid λ=0.5]}, but greedy accuracy is no better: it ends at {end[α=0.5, hybrid λ=0.5]}, "
        "without it at {end[α=0.5]}. SRPO learns nothing with α=0.5: {end[α=0.5, SRPO]}.",
        "SRPO with the teacher's rate 0.05 depends on the seed: it ends at {each[α=0, SRPO, rate 0.05]}.",
        "With SRPO a learning rate that falls to 0 ends at {end[α=0, SRPO, decay]}, and at {end[α=0, SRPO, lr "
        "2e-05, decay]} with twice the learning rate; a constant one ends at {end[α=0, SRPO]} and {end[α=0, SRPO, "
        "lr 2e-05]}.",
    ),
    "rate": (
        "With α=0 and batches of 64 a teacher that never moves ends at {each[α=0, rate 0 per 64]}, and the rate "
        "0.0025 at {each[α=0, rate 0.0025 per 64]}. The seeds end at {each[α=0, rate 0.01 per 64]} with 0.01, and "
        "at {each[α=0, rate 0.05 per 64]} with 0.05. {right[α=0, rate 0 per 64]}, {right[α=0, rate 0.0025 per "
        "64]}, {right[α=0, rate 0.01 per 64]} and {right[α=0, rate 0.05 per 64]} of the samples are right.",
        "With α=0.5 and batches of 64 the rate 0.01 is the best, too: {each[α=0.5, rate 0.01 per 64]}. A teacher "
        "that never moves ends at {each[α=0.5, rate 0 per 64]}, and the rate 0.0025 at {each[α=0.5, rate 0.0025 "
        "per 64]}. The rate 0.05 is no better than with α=0: it ends at {each[α=0.5, rate 0.05 per 64]}, with "
        "{right[α=0.5, rate 0.05 per 64]} of the samples right at the end; on every seed more than half of the "
        "samples then have text of the teacher's prompt.",
        "In batches of 256, with a quarter of the steps, the fastest of these rates is the best with α=0: it "
        "ends at {each[α=0, rate 0.05 per 256]}. A teacher that never moves ends at {each[α=0, rate 0 per 256]}, "
        "and the rates 0.0025 and 0.01 end at {end[α=0, rate 0.0025 per 256]} and {end[α=0, rate 0.01 per 256]}: "
        "all three lose part of a best of {best[α=0, rate 0 per 256]}, {best[α=0, rate 0.0025 per 256]} and "
        "{best[α=0, rate 0.01 per 256]}. With α=0.5 little is learned in so few steps, least with the fastest: "
        "{end[α=0.5, rate 0 per 256]}, {end[α=0.5, rate 0.0025 per 256]}, {end[α=0.5, rate 0.01 per 256]} and "
        "{end[α=0.5, rate 0.05 per 256]}.",
        "So with α=0 one rate per completion, 0.05 per 256, ends highest in both sizes of batch: it is 0.013 in "
        "one update of 64 ([below](#what-helps-with-a-fast-teacher)) and 0.05 in one of 256. The number of steps "
        "counts as well: 0.0025 per 64 and 0.01 per 256 are the same rate per completion, and end at {end[α=0, "
        "rate 0.0025 per 64]} and {end[α=0, rate 0.01 per 256]}. With α=0.5 the batches of 256 learn too little "
        "to tell.",
        "The rate of one update has a limit of its own. 0.05 per 64 completions, four times as fast, collapses "
        "with α=0 in batches of 64 ([further below](#does-it-last)), and in [batches of "
        "256](#is-a-teacher-too-fast-per-completion-or-per-update), where it is 0.19 in one update, nothing is "
        "learned.",
    ),
    "alpha": (
        "More is learned with a smaller α: {end[α=0]}, {end[α=0.1]}, {end[α=0.5]} and {end[α=1]} with 0, 0.1, 0.5 "
        "and 1; the ranges of 0, 0.1 and 0.5 overlap. A tenth of the held-out questions is answered for the first "
        "time after {begins[α=0]} completions with α=0, and after {begins[α=1]} with α=1.",
    ),
    "support": (
        "K=5 ends at {end[K=5]}, K=20 at {end[K=20]} and K=100 at {end[K=100]}; the whole vocabulary at {end[full "
        "vocabulary]}. The K tokens are the student's most probable ones, and a name that it has never seen is "
        "not among the first.",
        "Whether the other tokens are one category or left out makes no measurable difference: without them K=20 "
        "ends at {end[K=20, no tail]}.",
    ),
    "cures": (
        "The setting alone ends at {each[fast teacher]}, and with the rate per 256 completions, the paper's batch, "
        "at {each[fast teacher + rate per 256 samples]}. {right[fast teacher]} and {right[fast teacher + rate per "
        "256 samples]} of the samples are right.",
        "With half of the loss from GRPO (λ=0.5) it ends at {each[fast teacher + hybrid λ=0.5]}, and {right[fast "
        "teacher + hybrid λ=0.5]} of the samples are right, the most of this table. With a tenth it ends at "
        "{each[fast teacher + hybrid λ=0.1]}, and {right[fast teacher + hybrid λ=0.1]} of the samples are right.",
        "SRPO as published ends at {each[fast teacher + SRPO]}. Of its three parts, alone: the routing ends at "
        "{each[fast teacher + SRPO routing]}, the denominator (`batch-token-mean`) at {each[fast teacher + "
        "batch-token-mean]}, and the token weights (`confidence`) at {each[fast teacher + confidence weights]}.",
        "A teacher that restarts ends at {each[fast teacher + teacher restart]}. The trust region ends at "
        "{each[fast teacher + trust region]}, after a best of {bests[fast teacher + trust region]}, and the "
        "anchor at {each[fast teacher + anchor 0.1]}.",
        "Pass-rate weights learn nothing ({best[fast teacher + pass-rate weights]}), because they are 0 where all "
        "completions of a group fail, and the entry clip neither ({best[fast teacher + entry clip 0.05]}).",
        "Alone, the fast teacher spreads the text of its own prompt: beside or instead of a call, sentences of it "
        "are written, such as `Correctly solve the original question.`",
    ),
    "large batches": (
        "These runs were made with arguments on which a second function can return the same value "
        "([above](#how-to-read-the-tables-and-figures)).",
        "With SRPO and 0.04 per update, {each[SRPO, 0.04 per update]} of the samples are right at the end.",
        "With 0.19 per update nothing is learned on any of nine runs: {end[SRPO, 0.19 per update]} with SRPO, "
        "{end[hybrid λ=0.5, 0.19 per update]} with half of the loss from GRPO, and {end[hybrid λ=0.5, 0.19 per "
        "update, lr 2e-05]} with the chosen settings, whose learning rate is twice as high. Completions grow until "
        "nearly all are cut.",
        "In batches of 64, with 0.05 per update, the chosen settings [learn](#does-sdpo-learn-what-grpo-cannot). "
        "So the same rate per completion can work in small batches and fail in large ones. Whether the larger "
        "update or the larger batch is the reason was not tested.",
    ),
    "lasting": (
        "With the default rate of the teacher and a share of GRPO that grows linearly from half to all of the "
        "loss (λ=0.5 to 1) no seed falls. With a learning rate that falls to 0, the setting that was chosen [on "
        "other seeds](#which-settings-last), they end at {each[default rate + hybrid λ=0.5 to 1, decay]}, the "
        "highest accuracy of each, no evaluation is below {lowest[default rate + hybrid λ=0.5 to 1, decay]} of the "
        "best before, and {right[default rate + hybrid λ=0.5 to 1, decay]} of the samples are right; "
        "after 9600 completions they are at {fifth[default rate + hybrid λ=0.5 to 1, decay]} on average. With a "
        "constant learning rate they end at {each[default rate + hybrid λ=0.5 to 1]}; the lowest evaluation is at "
        "{lowest[default rate + hybrid λ=0.5 to 1]} of the best before.",
        "The fast teacher alone collapses on all three seeds: from a best of {bests[fast teacher]} to {each[fast "
        "teacher]}. The earliest fall below 0.8 of the best is after {first_fall[fast teacher]} completions. At "
        "the end each recorded reply is about the feedback of the teacher's prompt, which the student never sees: "
        "`The feedback from unsuccessful attempts is incorrect because` …",
        "Of seven remedies, one at a time, two keep every evaluation above 0.8 of the best before, on these "
        "seeds. With a share of GRPO that grows from half to all of the loss the fast teacher ends at {each[fast "
        "teacher + hybrid λ=0.5 to 1]}, with {right[fast teacher + hybrid λ=0.5 to 1]} of the samples right, and "
        "no evaluation is below {lowest[fast teacher + hybrid λ=0.5 to 1]}; with twice the learning rate, on two "
        "other seeds, this was not so ([below](#which-settings-last)). With SRPO as published it ends at "
        "{each[fast teacher + SRPO]}; the lowest evaluation is at {lowest[fast teacher + SRPO]} of the best "
        "before, at the end of one run. With SRPO's routing alone it ends at {each[fast teacher + SRPO routing]}, "
        "but one seed was at {lowest[fast teacher + SRPO routing]} of its best on the way.",
        "The other remedies that hold [after 9600 completions](#what-helps-with-a-fast-teacher) do not last: the "
        "default rate ends at {each[fast teacher + rate per 256 samples]}, half of the loss from GRPO throughout "
        "at {each[fast teacher + hybrid λ=0.5]}, a teacher that restarts at {each[fast teacher + teacher "
        "restart]}, and a tenth from GRPO at {each[fast teacher + hybrid λ=0.1]}. The settings that were chosen "
        "by shorter runs, half from GRPO with twice the learning rate, end at {each[SDPO, chosen settings]}.",
        "In fourteen of the 21 runs whose teacher moves by 0.05 per 64 completions most of the recorded replies, "
        "which are greedy, have text of the teacher's prompt, such as `Correctly solve the original question.`: "
        "with the growing share of GRPO on one seed, with SRPO on one, with its routing alone on two. On another "
        "seed of the growing share each reply has other words that the question does not ask for (`Further:`), "
        "and on both nearly all completions are cut. The judge accepts text beside a right call, so the reward "
        "does not penalize it; one that accepts nothing beside a call would reject these replies.",
        "With the default rate and a growing share at most a tenth of the completions of the last tenth of the "
        "steps are cut, and the recorded replies of these six runs have no text of the teacher's prompt. Samples "
        "of some runs have it ([in numbers](metrics.md#text-of-the-templates)), and so have recorded replies of "
        "three of the four runs for choosing.",
    ),
    "lasting settings": (
        "Of seven settings one ends at its highest accuracy on both seeds, {each[default rate + hybrid λ=0.5 to "
        "1, decay]}: it was chosen. With a constant learning rate these seeds end at {each[default rate + hybrid "
        "λ=0.5 to 1]}, and with half of the loss from GRPO throughout at {each[default rate + hybrid λ=0.5]}.",
        "Without GRPO the default rate (fast teacher + rate per 256 samples) ends at {each[fast teacher + rate "
        "per 256 samples]}, after a best of {bests[fast teacher + rate per 256 samples]}, and {right[fast teacher "
        "+ rate per 256 samples]} of the samples are right.",
        "With a fast teacher the routing of SRPO does not end near its best on both seeds ({each[fast teacher + "
        "SRPO routing]}), after a dip to {lowest[fast teacher + SRPO routing]} of it, nor, with twice the "
        "learning rate, a learning rate that falls ({each[SDPO, chosen settings, decay]}) or a growing share of "
        "GRPO ({each[SDPO, chosen settings, λ=0.5 to 1]}), which was at {lowest[SDPO, chosen settings, λ=0.5 to "
        "1]} of its best on the way.",
    ),
    "lora": (
        "With the learning rate 3e-4 adapters end at {each[LoRA r=16, lr 0.0003]}, within the range of all weights "
        "with 1e-5 ({each[all weights]}), but later, and with fewer right samples: a tenth of the held-out "
        "questions is answered for the first time after {begins[LoRA r=16, lr 0.0003]} completions, with all "
        "weights after {begins[all weights]}. {right[LoRA r=16, lr 0.0003]} and {right[all weights]} of the "
        "samples are right. One of the seeds falls at the last evaluation.",
        "With the learning rate 1e-4 they end at {each[LoRA r=16, lr 0.0001]}, and {right[LoRA r=16, lr 0.0001]} "
        "of the samples are right.",
    ),
}
# The same for other tasks, by the task and the question.
OTHER_FINDINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("house_style", "learns"): (
        "With the settings that were chosen on the private API, SDPO ends at {each[SDPO, chosen settings]}, that "
        "is with five, four and four of the six held-out functions, after a best of {bests[SDPO, chosen "
        "settings]}; two of the seeds fall at the end of the run. {right[SDPO, chosen settings]} of the samples "
        "are right. The recorded replies of two seeds begin with words that answer the teacher's prompt, such as "
        "`Here is the corrected solution:`.",
        "SDPO with α=0.5 ends at {each[SDPO]}, with {right[SDPO]} of its samples right: its answers explain what "
        "to do, as an answer to the teacher's prompt would, and are cut at 48 tokens before the code.",
        "GRPO ends at {each[GRPO]}: no completion of its training is right.",
    ),
}
# In the prose of a page, by the name of their place: the questions whose runs they are about, and the text. An arm
# that several of them have needs its question behind its name.
SENTENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "results summary": (
        ("learns", "cures", "lasting", "large batches"),
        "* On the private API, after 9600 completions, SDPO with α=0.5 answers {end[SDPO]} of the held-out "
        "questions right, and {end[SDPO, chosen settings (learns)]} with settings that were chosen among "
        "seventeen: α=0, half of the loss from GRPO, a teacher about four times as fast as the paper's, and twice "
        "the learning rate. GRPO and SDPO without feedback answer {end[GRPO]}, and so does SDPO with shuffled "
        "feedback, with both settings.\n"
        "* With α=0 and this fast teacher alone, the model reaches {bests[fast teacher (lasting)]} on three seeds "
        "and loses all of it within 48000 completions: it learns to recite its teacher's prompt. The log shows it "
        "early: [a warning](choosing.md#before-a-collapse) comes thousands of completions before, but in other "
        "runs, which keep what they learned, as well.\n"
        "* Of seven remedies, one at a time, two keep every evaluation at 0.8 of the best before or more, on "
        "these seeds. With a share of GRPO that grows from half to all of the loss the seeds end at {each[fast "
        "teacher + hybrid λ=0.5 to 1]} after 48000 completions, and the lowest evaluation is at {lowest[fast "
        "teacher + hybrid λ=0.5 to 1]} of the best before; on two other seeds, with twice the learning rate, [one "
        "went far lower](#which-settings-last). With SRPO as published they end at {each[fast teacher + SRPO "
        "(lasting)]}, and the lowest is at {lowest[fast teacher + SRPO (lasting)]} of the best before, at the end "
        "of one run; on the embedded task SRPO [does not last](#embedded-five-times-the-samples). Its routing "
        "alone ends at {each[fast teacher + SRPO routing (lasting)]}, after a dip to {lowest[fast teacher + SRPO "
        "routing (lasting)]} of the best on one seed. Half of the loss from GRPO throughout delays the collapse: "
        "{each[fast teacher + hybrid λ=0.5 (lasting)]}.\n"
        "* With the growing share of GRPO, the default rate of the teacher and a learning rate that falls, the "
        "seeds end at {each[default rate + hybrid λ=0.5 to 1, decay]}, the highest accuracy of each, and in the "
        "last tenth of the steps at most a tenth of the completions are cut at the length limit. These settings, "
        "the preset `long_run`, were chosen among seven, on other seeds.\n"
        "* With most settings text of the teacher's prompt appears beside the calls, at least in samples: the "
        "judge of this task accepts it.\n"
        "* In batches of 256, with the teacher's rate of the chosen settings per completion, nothing is learned: "
        "{end[hybrid λ=0.5, 0.19 per update, lr 2e-05]} on three seeds.",
    ),
    "choosing summary": (
        ("learns", "alpha", "cures", "lasting", "settings", "rate"),
        "* **The teacher's rate.** On the private API, with α=0, the default ends at {each[fast teacher + rate "
        "per 256 samples (cures)]}, with {right[fast teacher + rate per 256 samples (cures)]} of the samples "
        "right. With 0.05 per batch of 64 it ends at {each[fast teacher (cures)]}, with {right[fast teacher "
        "(cures)]} of the samples right. After 48000 completions the two are at {each[fast teacher + rate per 256 "
        "samples (lasting)]}, and at {each[fast teacher (lasting)]}. A teacher that never moves ends at {each[α=0, "
        "rate 0 per 64]}.\n"
        "* **α.** On the private API α=0 ends at {end[α=0 (alpha)]} and α=0.5 at {end[α=0.5 (alpha)]}, with the "
        "rate 0.01 per batch of 64. On the embedded task α=0 ends lower, and with a fast teacher it collapses "
        "([the divergence](#the-divergence)).\n"
        "* **A part of GRPO's loss.** Half of it raises the share of right samples on the private API from "
        "{right[α=0 (settings)]} to {right[α=0, hybrid λ=0.5]} with α=0 (two seeds), and from "
        "{right[fast teacher (cures)]} to {right[fast teacher + hybrid λ=0.5 (cures)]} with a "
        "fast teacher, too. A share that grows from half to all of the loss, with the default rate of the teacher "
        "and a learning rate that falls, is at {each[default rate + hybrid λ=0.5 to 1, decay]} after "
        "48000 completions.\n"
        "* **Small differences** in these tables mean nothing: a function is mostly answered or not as a whole, "
        "so 0.1 is about one of twelve functions. The fast teacher with SRPO ends at {each[fast teacher + SRPO "
        "(cures)]} on three seeds, and at {each[α=0, SRPO, rate 0.05]} on two others.",
    ),
    "choosing rate": (
        ("cures", "settings", "rate"),
        "On the private API, α=0 with the rate 0.05 ends at {each[fast teacher]} where the rate is per batch of "
        "64, and at {each[fast teacher + rate per 256 samples]} where it is per 256 completions. With SRPO, on two "
        "seeds, the rates 0.01, 0.02 and 0.05 per batch of 64 end at {end[α=0, SRPO]}, {end[α=0, SRPO, rate "
        "0.02]} and {end[α=0, SRPO, rate 0.05]}. A fast teacher is no better with α=0.5: with 0.05 per batch of 64 "
        "the seeds end at {each[α=0.5, rate 0.05 per 64]}, with {right[α=0.5, rate 0.05 per 64]} of the samples "
        "right. And a teacher can be too slow: in batches of 64 one that never moves ends at {end[α=0, rate 0 per "
        "64]} with α=0 and at {end[α=0.5, rate 0 per 64]} with α=0.5, the rate 0.01 at {end[α=0, rate 0.01 per "
        "64]} and {end[α=0.5, rate 0.01 per 64]}.",
    ),
    "choosing alpha": (
        ("alpha",),
        "On the private API, with the rate 0.01 per batch of 64, a tenth of the held-out questions is answered for "
        "the first time after {begins[α=0]} completions with α=0, after {begins[α=0.1]} with α=0.1, after "
        "{begins[α=0.5]} with α=0.5, and after {begins[α=1]} with α=1.",
    ),
    "choosing k": (
        ("support",),
        "On the private API, where the student has never seen the names that it is to write, K=5 ends at "
        "{each[K=5]}, K=20 at {each[K=20]}, K=100 at {each[K=100]}, and the whole vocabulary at {each[full "
        "vocabulary]}.",
    ),
    "choosing lora": (
        ("lora",),
        "On the private API, with α=0.5, adapters end at {each[LoRA r=16, lr 0.0003]} with the learning rate 3e-4, "
        "with {right[LoRA r=16, lr 0.0003]} of the samples right, and at {each[LoRA r=16, lr 0.0001]} with 1e-4, "
        "with {right[LoRA r=16, lr 0.0001]}; all weights end at {each[all weights]} with 1e-5, with {right[all "
        "weights]}. Adapters begin later: a tenth of the held-out questions is answered for the first time after "
        "{begins[LoRA r=16, lr 0.0003]} completions with 3e-4, after {begins[LoRA r=16, lr 0.0001]} with 1e-4, and "
        "after {begins[all weights]} with all weights.",
    ),
    "choosing cures": (
        ("cures",),
        "On the private API these options were added to α=0 with a teacher about four times as fast as the "
        "paper's, which ends at {each[fast teacher]} alone, with {right[fast teacher]} of the samples right:\n\n"
        "* Half of the loss from GRPO, `grpo_weight=0.5`, ends at {each[fast teacher + hybrid λ=0.5]}, with "
        "{right[fast teacher + hybrid λ=0.5]} of the samples right; a tenth ends at {each[fast teacher + hybrid "
        "λ=0.1]}, with {right[fast teacher + hybrid λ=0.1]} of the samples right, and its completions grow.\n"
        '* SRPO as published, that is `routing="srpo"` with `loss_aggregation="batch-token-mean"` and '
        '`token_weights="confidence"`, ends at {each[fast teacher + SRPO]}; its routing alone ends at {each[fast '
        "teacher + SRPO routing]}.\n"
        "* The default rate ends at {each[fast teacher + rate per 256 samples]}, a teacher that restarts at "
        "{each[fast teacher + teacher restart]}, the trust region at {each[fast teacher + trust region]}, and "
        "`anchor_weight=0.1` at {each[fast teacher + anchor 0.1]}.",
    ),
    "choosing lasting": (
        ("lasting",),
        "In runs five times as long on the private API the fast teacher alone ends at {each[fast teacher]}. With "
        "one remedy it ends:\n\n"
        "* at {each[fast teacher + hybrid λ=0.5 to 1]} with a share of GRPO that grows from half to all of the "
        "loss (`grpo_weight=0.5, grpo_weight_final=1.0`): no evaluation is below {lowest[fast teacher + hybrid "
        "λ=0.5 to 1]} of the best before. With twice the learning rate one of two other seeds [went far "
        "lower](results.md#which-settings-last);\n"
        "* at {each[fast teacher + hybrid λ=0.5]} with half of it throughout: the earliest fall below 0.8 of the "
        "best that lasts to the end comes after {first_fall[fast teacher + hybrid λ=0.5]} completions instead of "
        "{first_fall[fast teacher]}; and at {each[fast teacher + hybrid λ=0.1]} with a tenth;\n"
        "* at {each[fast teacher + SRPO]} with SRPO as published, never below {lowest[fast teacher + SRPO]} of "
        "the best before, where one seed ends, and at {each[fast teacher + SRPO routing]} with its routing alone, "
        "which was at {lowest[fast teacher + SRPO routing]} of the best before on one seed;\n"
        "* at {each[fast teacher + rate per 256 samples]} with the default rate, and at {each[fast teacher + "
        "teacher restart]} with a teacher that restarts.\n\n"
        "With the default rate of the teacher and the growing share of GRPO no seed falls: {each[default rate + "
        "hybrid λ=0.5 to 1]}, and {each[default rate + hybrid λ=0.5 to 1, decay]} with a learning rate that falls "
        "to 0, the highest accuracy of each seed. Whether the distillation adds anything late in such a run is "
        "not known: GRPO alone from a checkpoint at which most samples are right was not run. From the start GRPO "
        "learns nothing here.",
    ),
}


def numbers(by_arm: Mapping[str, Sequence[Run]], early: int) -> dict[str, dict[str, str]]:
    """The numbers that a sentence can name, as texts by name and arm.

    Means over seeds: `end` is the accuracy at the end, `best` the best accuracy, `early` the accuracy after
    `early` samples, `probability` the probability of the right answer at the end, and `right` the share of right
    samples there; `fifth` is the accuracy after a fifth of the samples. Lists with one
    number per seed: `each` has the
    accuracy at the end, `bests` the best accuracy, and `begins` the samples of the first evaluation at which a
    tenth of the answers is right. `first_fall` is the smallest number of samples after which a seed is below .8 of
    its best for good. It and `begins` may be "never". `lowest` is the smallest share of a seed's best so far.

    Args:
        by_arm: the runs of each arm, in the order of seeds.
        early: number of samples.
    """
    means: dict[str, Callable[[Run], float]] = {
        "end": lambda run: float(run["points"][-1][ACCURACY]),
        "best": best,
        "early": lambda run: at(run, early, ACCURACY),
        "fifth": lambda run: at(run, run["points"][-1][0] // 5, ACCURACY),
        "probability": lambda run: float(run["points"][-1][PROBABILITY]),
        "right": lambda run: math.nan if run.get("right_samples") is None else float(run["right_samples"]),
    }
    found = {
        name: {arm: f"{fmean(map(measure, runs)):.2f}" for arm, runs in by_arm.items()}
        for name, measure in means.items()
    }
    lists = {"each": means["end"], "bests": best}
    for name, measure in lists.items():
        found[name] = {arm: _listed([f"{measure(run):.2f}" for run in runs]) for arm, runs in by_arm.items()}
    found["begins"] = {
        arm: _listed([str(begins(run) or "never") for run in runs]) for arm, runs in by_arm.items()
    }
    falls = {arm: [samples for run in runs if (samples := fall(run))] for arm, runs in by_arm.items()}
    found["lowest"] = {
        arm: f"{min(lowest_share(run)[0] for run in runs):.2f}" for arm, runs in by_arm.items()
    }
    found["first_fall"] = {arm: str(min(samples, default="never")) for arm, samples in falls.items()}
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

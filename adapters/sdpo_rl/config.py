"""The options of a run, flat, with the source of every default."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, cast, get_args

from sdpo import Templates
from sdpo._validate import check_flag

from . import _config_checks
from .presets import preset_settings

Support = Literal["student", "teacher", "full", "sampled"]
Tail = Literal["bucket", "renormalize"]
Aggregation = Literal["token-mean", "batch-token-mean", "sequence-mean"]
RowWeights = Literal["none", "pass_rate"]
TokenWeights = Literal["none", "confidence", "gate", "evidence"]
Routing = Literal["none", "srpo"]
Credit = Literal["token", "sequence"]
TeacherMode = Literal["ema", "frozen", "trust_region", "live", "lora_ema"]
TeacherTick = Literal["generation_batch", "optimizer_step"]
TeacherDtype = Literal["float32", "bfloat16"]
TeacherOffload = Literal["none", "cpu"]
TeacherOnResume = Literal["restore", "restart"]
Policy = Literal["first", "random", "shortest", "longest", "best"]
Truncation = Literal["middle", "left", "right", "error"]
Backend = Literal["auto", "torch", "triton", "logits"]
Packing = Literal["auto", "packed", "groups", "padded"]

_TEMPLATES = Templates()
# Names of TRL's SDPO for fields of this class.
_OTHER_NAMES = {"distillation_topk": "k", "distillation_add_tail": "tail"}


class _DefaultInt(int):
    """A default value; the same number, when it is passed, is a plain `int`."""


class _DefaultStr(str):
    """A default value; the same text, when it is passed, is a plain `str`."""

    __slots__ = ()


def _option(default: Any, text: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


# Of the options that are one of several words.
_CHOICES = {
    "support": get_args(Support),
    "tail": get_args(Tail),
    "loss_aggregation": get_args(Aggregation),
    "row_weights": get_args(RowWeights),
    "token_weights": get_args(TokenWeights),
    "credit": get_args(Credit),
    "routing": get_args(Routing),
    "teacher_mode": get_args(TeacherMode),
    "teacher_tick": get_args(TeacherTick),
    "teacher_dtype": get_args(TeacherDtype),
    "teacher_offload": get_args(TeacherOffload),
    "teacher_on_resume": get_args(TeacherOnResume),
    "demonstration_policy": get_args(Policy),
    "reprompt_truncation": get_args(Truncation),
    "loss_backend": get_args(Backend),
    "packing": get_args(Packing),
}


@dataclass
class SDPOConfig:
    """Everything SDPO adds to a `GRPOConfig`, one flat dataclass.

    It parses from YAML and from the command line (`TrlParser((SDPOConfig, GRPOConfig))`). A bad value is
    refused when the object is made, with the fix in the message; after that it is read-only, and
    `dataclasses.replace(config, alpha=1.0)` makes another. Sources: *paper* is arXiv 2601.20802 v2,
    *reference* the authors' published code, *ours* a choice of this library.

    Args:
        enabled: `False` is GRPO, unchanged. Default `True`.
        alpha: 0 is KL(teacher‖student), 1 is KL(student‖teacher), between them the generalized
            Jensen–Shannon divergence. Default 0.5 (paper §3).
        k: K of the top-K supports. Default 100 (paper §3).
        support: tokens that the divergence is taken over: the top-K of the `student` (default, paper §3) or of
            the `teacher`, the `full` vocabulary, or the `sampled` token (needs `alpha=1`; paper Prop. 2.1).
        tail: `bucket` (default, reference) adds the mass outside the top-K as one more category;
            `renormalize` renormalizes over the K.
        credit: with `support="sampled"`, whose advantage log q − log p a token gets: `token` (default) its own,
            `sequence` the mean of its row, from whole logits. The logit-level credit of the paper's figure 10
            is that of the other supports.
        entry_clip: the most an entry of the vocabulary adds to the divergence of a token, in nats, with
            `support="full"` and from whole logits; OPSD's code (arXiv 2601.18734) uses 0.05. Default `None`: no
            bound.
        token_fraction: share of each row's tokens that keep their divergence (TIP, arXiv 2604.14084): those of
            a high entropy of the student, or of a high divergence. They stand for all tokens of their row.
            Default 1.0: all. Where the rows fit a chunk of the fused loss and there is no GRPO part, the product
            for the gradient of the hidden states has these tokens alone.
        anchor_weight: c of c·KL(student‖reference), added to the divergence of each token, from whole logits
            (StableOPD, arXiv 2604.08527). The reference is the model that training begins with: a copy of its
            trainable weights, in their dtype; with `beta` that of TRL. Default 0.0: none.
        is_clip: upper truncation of π_θ/π_old per token; `None` turns the weights off. Default 2.0
            (reference).
        rollout_is_clip: the same for π_old/π_rollout, when the inference engine or a `rollout_func` reports its own
            log-probabilities (on-policy the student is π_old); `None` turns it off. Default 2.0 (reference).
        loss_aggregation: `token-mean` (default, reference) over all active tokens of the optimizer step,
            `batch-token-mean` over all its completion tokens, with or without a teacher signal, or
            `sequence-mean` over its active rows. Where few rows have a signal, the first and the last give each
            of them a larger share of the step; with `batch-token-mean` the loss shrinks with the share of
            active tokens.
        grpo_weight: λ of λ·GRPO + (1−λ)·SDPO (paper §4.5, where .9 helped a 0.6B model). The mean of GRPO's part
            is that of `GRPOConfig.loss_type`, the mean of SDPO's that of `loss_aggregation`. Default 0.0: no
            GRPO. At 1 the divergence is only measured, and options that weigh it are refused; `enabled=False` is
            GRPO without a teacher.
        grpo_weight_final: λ of the last optimizer step, to which it changes linearly. Default `None`: constant.
        routing: `none` (default), or `srpo` (SRPO, arXiv 2604.02288 §3.1): failed rows with a teacher signal
            have SDPO's loss alone, all others GRPO's alone. SRPO's denominator is
            `loss_aggregation="batch-token-mean"` with `loss_type="dapo"`, GRPOConfig's default.
        row_weights: `none` (default), or `pass_rate` (SC-SDPO, arXiv 2605.27765): √(p(1−p)) of the pass rate p
            of the row's group, over its mean in the generation batch; a factor of the divergence.
        token_weights: `none` (default); `confidence` (SRPO, arXiv 2604.02288 §3.2): exp(−β·H) of the teacher's
            entropy H, over its mean in the row (SRPO's mean is that of the batch; a row's does not depend on
            how a step is split); `gate` (SDAR, arXiv 2605.15155): sigmoid(β·Δ), Δ the teacher's minus the
            student's log-probability of the sampled token; `evidence` (RLSD, arXiv 2604.03128): the advantages
            times (1−m) + m·clip(exp(sign(A)·Δ), 1−ε, 1+ε). The first two are factors of the divergence, the
            last two need a GRPO part. The fused loss computes its chunks twice with `evidence`, and in rows
            that do not fit a chunk with the others if the LM head is trainable or there is a GRPO part.
        token_weights_beta: β of `token_weights`. Default `None`: 1 for `confidence` (SRPO §4.1), 5 for `gate`
            (SDAR).
        evidence_mix: m of `evidence`, the teacher's share. Default 0.5 (RLSD's first value).
        evidence_clip: ε of `evidence`. Default 0.2 (RLSD).
        teacher_mode: `ema` (default, reference), `frozen`, `trust_region` (best in paper Table 4), `live`,
            or `lora_ema`: `ema` that requires adapters.
        teacher_update_rate: weight of the *student* in the moving average, per `teacher_rate_samples` completions.
            Default 0.05 (paper §3).
        teacher_rate_samples: completions that `teacher_update_rate` is given for: an update after n of them has the
            rate 1 − (1 − r)^(n / `teacher_rate_samples`), so that the pace per completion does not depend on the
            size of a batch. n is the completions of all processes in a generation batch (or optimizer step, by
            `teacher_tick`): batches without a signal, which move neither model, and a shorter last one of an epoch
            do not change it.
            Default 256, because the paper's rate was measured with batches of 256. `None`: the rate is that of one
            update, of any number of completions (as in the reference and TRL's SDPO).
        teacher_restart_every: with `teacher_mode="frozen"`, generation batches (or optimizer steps, by
            `teacher_tick`) after which the teacher starts again from the student (arXiv 2607.01763); those without
            a signal are not counted. Default `None`: never.
        trust_region_coef: weight of the live student's logits in the `trust_region` teacher. Default 0.5
            (ours; the paper does not print its value).
        teacher_tick: when the average moves: once per `generation_batch` (default, reference), or per
            `optimizer_step`.
        teacher_dtype: dtype of the averaged weights: `float32` (default, ours: a bfloat16 average does not
            change at small rates), or `bfloat16` with seeded stochastic rounding. Of a bfloat16 model that
            trains whole, float32 is two copies in bytes, and a third during the teacher's forward; bfloat16
            is one. Of adapters, megabytes.
        teacher_offload: `none` (default) or `cpu`: where the averaged weights are stored between forwards.
        teacher_on_resume: `restore` (default) requires a teacher in the checkpoint (and the weights that training
            began with, where `anchor_weight` needs a copy of them); `restart` starts one from the loaded student.
        success_reward_threshold: a completion whose score reaches it is a success. Default 1.0
            (reference's README).
        success_reward_funcs: names of the reward functions whose rewards, added without weights, are that score; a
            function that did not judge the completion adds nothing. Default `None`: the sum of all rewards with
            `GRPOConfig.reward_weights`, which reaches the threshold by a reward for the format too, and does not
            reach it with small weights.
        dont_reprompt_on_self_success: a row is never its own demonstration, and a peer with the same text is one
            only if no other has succeeded. Default `True` (paper's runs).
        demonstration_policy: which success is shown: `random` (default, ours: seeded, no length bias),
            `first` (reference), `shortest`, `longest`, `best`.
        num_demonstrations: largest number of successes in a reprompt. Default 1 (paper).
        remove_thinking_from_demonstration: strip `<think>…</think>`. Default `True` (paper's runs).
        thinking_marks: what the model writes before a thought and after it, also as special tokens. A thought that
            never ends goes to the end of the text, and each of several thoughts goes. Default `<think>`,
            `</think>`; what the tokenizer's response template finds (with gpt-oss, say) needs no marks.
        include_environment_feedback: use the texts that reward functions, environments or the dataset's column
            `feedback` (`privileged_context` in TRL's SDPO) give. Default `True` (paper §4).
        environment_feedback_only_without_solution: feedback is shown only where no demonstration exists.
            Default `True` (paper's runs).
        max_reprompt_length: largest number of tokens of a reprompt. Default 10240 (reference).
        reprompt_truncation: where a too long demonstration or feedback is cut: `middle` (default, ours),
            `left`, `right`; `error` raises with the sizes. The question is never cut.
        reprompt_template: default as in the paper's runs; fields `{prompt}`, `{solution}`, `{feedback}`.
        solution_template: default as in the paper's runs; field `{successful_previous_attempt}`.
        feedback_template: default as in the paper's runs; field `{feedback_raw}`. It calls the attempt
            unsuccessful, and introduces the feedback of every row that did not succeed.
        success_feedback_template: the same for rows that succeeded; field `{feedback_raw}`. Default (ours): the
            published words with "successful"; the published runs have `feedback_template` here too.
        allow_control_tokens: `False` (default, ours): text such as `<|im_end|>` in a demonstration or feedback is
            tokenized as text; `True`: it is a control token and can end the user's turn (reference).
        apply_chat_template_kwargs: extra chat-template arguments for the reprompt alone. Default `{}`
            (reference). `GRPOConfig.chat_template_kwargs` already reaches both sides. Where they change how the
            prompt ends (`enable_thinking`, say), the log warns.
        loss_backend: `auto` (default): the fused loss, Triton where it runs, torch elsewhere; `torch`,
            `triton`; `logits` computes whole logits with the plain loss, for unusual heads.
        loss_chunk_size: tokens whose logits exist at the same time; `None` (default): chosen from the shapes
            and the device's total memory.
        packing: how the rows of a forward are laid out: `packed`, all tokens in one sequence without padding, which
            under `sdpa` holds the prompt of a group once; `groups`, rows of similar length padded together;
            `padded`, all rows padded to the longest. `auto` (default, ours) packs a batch where that saves enough
            if a test at the first step shows that the model computes each packed row as if alone, and takes groups
            otherwise.
        max_tokens_per_forward: largest number of tokens, padding included, of a forward of more than one row.
            Default `None`: chosen from the shapes. It has no effect on `padded`.
        fused_lora_forward: compute a plain LoRA layer by one autograd function in a training step; under Unsloth,
            whose own functions do so, also queries, keys and values that have a bias. `False` keeps PEFT's forward
            there. Default `True` (ours).
        fast_checkpointing_toggle: disable gradient checkpointing for a rollout by the flags of the modules;
            `False` leaves that to TRL. Default `True` (ours).
        diagnostics_patience: generation batches without a single active row before a warning. Default 10.
        credit_rows: completions of each logged step that are written to `sdpo_credit.jsonl` in the output folder
            with what both models said of every token, for `sdpo report`: those of the largest divergence among the
            main process's, from two on one without a signal, from three on a success. The file stays below 16 MiB:
            steps in between are left out. Default 0: none.
        distillation_topk: the name of `k` in TRL's SDPO and the reference; taken by the constructor, not a field.
        distillation_add_tail: likewise for `tail`: `True` is `bucket`, `False` is `renormalize`.

    Raises:
        TypeError: a value of the wrong type, or an unknown option.
        ValueError: a value out of range, or options that contradict each other.

    Source: arXiv 2601.20802 v2, and its reference implementation.

    Examples:
        >>> SDPOConfig(alpha=1.0, k=20).teacher_mode
        'ema'
        >>> SDPOConfig.preset("rich_feedback").teacher_update_rate
        0.01
        >>> SDPOConfig(alpha=3)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: alpha: expected a number in [0, 1], got 3; pass 0 for KL(teacher‖student), 1 for ...
    """

    enabled: bool = _option(True, "Train with SDPO; False is plain GRPO.")
    alpha: float = _option(0.5, "0: KL(teacher||student), 1: KL(student||teacher), between: generalized JSD.")
    k: int = _option(_DefaultInt(100), "K of the top-K supports.")
    support: Support = _option("student", "Which tokens the divergence is taken over.")
    tail: Tail = _option(_DefaultStr("bucket"), "What becomes of the mass outside the top-K.")
    credit: Credit = _option("token", "Whose advantage a token gets; sequence needs whole logits.")
    entry_clip: float | None = _option(None, "Most that an entry adds to a divergence; needs whole logits.")
    token_fraction: float = _option(1.0, "Share of each row's tokens that keep their divergence.")
    anchor_weight: float = _option(0.0, "Weight of the KL to the reference model; needs whole logits.")
    is_clip: float | None = _option(2.0, "Upper truncation of the per-token ratio student/old.")
    rollout_is_clip: float | None = _option(2.0, "Upper truncation of the per-token ratio old/rollout.")
    loss_aggregation: Aggregation = _option("token-mean", "What the loss is a mean of.")
    grpo_weight: float = _option(0.0, "GRPO's share of the loss.")
    grpo_weight_final: float | None = _option(None, "GRPO's share in the last step; unset: constant.")
    routing: Routing = _option("none", "Which rows have GRPO's loss and which SDPO's.")
    row_weights: RowWeights = _option("none", "Weights of rows: none, or by the pass rate of their group.")
    token_weights: TokenWeights = _option("none", "Weights of tokens by what the teacher says.")
    token_weights_beta: float | None = _option(
        None, "How fast a token's weight changes; unset: as published."
    )
    evidence_mix: float = _option(0.5, "Teacher's share of the advantages with token_weights='evidence'.")
    evidence_clip: float = _option(0.2, "How far token_weights='evidence' changes an advantage.")
    teacher_mode: TeacherMode = _option("ema", "Which weights read the reprompt.")
    teacher_update_rate: float = _option(0.05, "Weight of the student in the moving average.")
    teacher_rate_samples: int | None = _option(
        256, "Completions the rate is given for; null in a recipe: those of one update."
    )
    teacher_restart_every: int | None = _option(
        None, "Updates after which a frozen teacher restarts; unset: never."
    )
    trust_region_coef: float = _option(0.5, "Weight of the live student in the trust-region teacher.")
    teacher_tick: TeacherTick = _option("generation_batch", "When the moving average moves.")
    teacher_dtype: TeacherDtype = _option("float32", "Dtype of the averaged weights.")
    teacher_offload: TeacherOffload = _option(
        "none", "Where the averaged weights are stored between forwards."
    )
    teacher_on_resume: TeacherOnResume = _option("restore", "What to do about the teacher on resume.")
    success_reward_threshold: float = _option(1.0, "A score that reaches it is a success.")
    success_reward_funcs: list[str] | None = _option(
        None, "Reward functions whose sum is the score of a success; unset: the weighted sum of all."
    )
    dont_reprompt_on_self_success: bool = _option(True, "A row is never its own demonstration.")
    demonstration_policy: Policy = _option("random", "Which success serves as the demonstration.")
    num_demonstrations: int = _option(1, "Successes shown per reprompt.")
    remove_thinking_from_demonstration: bool = _option(True, "Strip <think>...</think>.")
    thinking_marks: list[str] = _option(
        ["<think>", "</think>"], "What the model writes before a thought and after it."
    )
    include_environment_feedback: bool = _option(True, "Use the texts that reward functions return.")
    environment_feedback_only_without_solution: bool = _option(
        True, "Show feedback only where no demonstration exists."
    )
    max_reprompt_length: int = _option(10240, "Tokens of a reprompt.")
    reprompt_truncation: Truncation = _option("middle", "Where a too long demonstration or feedback is cut.")
    reprompt_template: str = _option(_TEMPLATES.reprompt, "Fields {prompt}, {solution}, {feedback}.")
    solution_template: str = _option(_TEMPLATES.solution, "Field {successful_previous_attempt}.")
    feedback_template: str = _option(_TEMPLATES.feedback, "Field {feedback_raw}.")
    success_feedback_template: str = _option(
        _TEMPLATES.success_feedback, "Field {feedback_raw}; for rows that succeeded."
    )
    allow_control_tokens: bool = _option(
        False, "Let texts such as <|im_end|> in demonstrations and feedback be control tokens."
    )
    # The shape of annotation that command-line parsers read as a text.
    apply_chat_template_kwargs: dict[str, Any] | str | None = _option(
        {}, "Chat-template arguments for the reprompt (JSON)."
    )
    loss_backend: Backend = _option("auto", "How the loss is computed.")
    loss_chunk_size: int | None = _option(None, "Tokens of a chunk; unset: from the shapes.")
    packing: Packing = _option("auto", "How the rows of a forward are laid out.")
    max_tokens_per_forward: int | None = _option(None, "Tokens of a forward; unset: from the shapes.")
    fused_lora_forward: bool = _option(
        True, "One autograd function per plain LoRA layer; False: PEFT's forward."
    )
    fast_checkpointing_toggle: bool = _option(
        True, "Disable checkpointing for a rollout in one pass; False: TRL's."
    )
    diagnostics_patience: int = _option(10, "Generation batches without an active row before a warning.")
    credit_rows: int = _option(0, "Completions of each logged step that are kept for sdpo report.")

    distillation_topk: InitVar[int | None] = None
    distillation_add_tail: InitVar[bool | None] = None

    # Defaults for a dataclass derived from this one, whose constructor does not have the two.
    def __post_init__(
        self,
        distillation_topk: int | None = None,  # noqa: RUF033
        distillation_add_tail: bool | None = None,  # noqa: RUF033
    ) -> None:
        self._take_other_names(distillation_topk, distillation_add_tail)
        _config_checks.check_options(self, _CHOICES)
        self.apply_chat_template_kwargs = self.template_kwargs
        self.templates()
        _config_checks.warn_of_settings_without_effect(self)
        object.__setattr__(self, "_is_made", True)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name)
        super().__delattr__(name)

    def _refuse_change(self, name: str) -> None:
        if vars(self).get("_is_made"):
            raise dataclasses.FrozenInstanceError(
                f"{name}: expected no change of an SDPOConfig, whose options are checked together when it is "
                f"made; use dataclasses.replace(config, {name}=...) before the trainer is constructed"
            )

    def _take_other_names(self, distillation_topk: int | None, distillation_add_tail: bool | None) -> None:
        if distillation_topk is not None:
            if not isinstance(self.k, _DefaultInt) and self.k != distillation_topk:
                raise ValueError(
                    f"distillation_topk: expected the value of k={self.k!r}, got {distillation_topk!r}; "
                    "they name the same option, pass k alone"
                )
            self.k = distillation_topk
        if distillation_add_tail is not None:
            check_flag("distillation_add_tail", distillation_add_tail, meaning="True or False, or tail alone")
            tail: Tail = "bucket" if distillation_add_tail else "renormalize"
            if not isinstance(self.tail, _DefaultStr) and self.tail != tail:
                raise ValueError(
                    f"distillation_add_tail: expected what tail={self.tail!r} says, got "
                    f"{distillation_add_tail!r}; they name the same option, pass tail alone"
                )
            self.tail = tail
        if isinstance(self.k, _DefaultInt):
            self.k = int(self.k)
        if isinstance(self.tail, _DefaultStr):
            self.tail = cast("Tail", str(self.tail))

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`apply_chat_template_kwargs` as a mapping: parsed if it is JSON (command line); `None` is empty."""
        return _config_checks.template_arguments(self.apply_chat_template_kwargs)

    def templates(self) -> Templates:
        """The four templates as the core's `Templates`."""
        return Templates(
            reprompt=self.reprompt_template,
            solution=self.solution_template,
            feedback=self.feedback_template,
            success_feedback=self.success_feedback_template,
        )

    @property
    def uses_topk(self) -> bool:
        """Whether the support is the top-K of a model, so that `k` and `tail` apply."""
        return self.support in ("student", "teacher")

    @property
    def has_policy_loss(self) -> bool:
        """Whether a part of the loss is GRPO's."""
        return self.grpo_weight > 0.0 or bool(self.grpo_weight_final) or self.routing != "none"

    @property
    def weighs_tokens(self) -> bool:
        """Whether weights of the tokens depend on what both models say about them."""
        return self.token_weights != "none" or self.token_fraction < 1.0

    @property
    def whole_logits_option(self) -> str | None:
        """An option that the fused loss does not have, as it was set; `None` without any."""
        if self.entry_clip is not None:
            return f"entry_clip={self.entry_clip:g}"
        if self.anchor_weight > 0.0:
            return f"anchor_weight={self.anchor_weight:g}"
        return "credit='sequence'" if self.credit == "sequence" else None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SDPOConfig:
        """The settings of one of the paper's experiments, another paper or recorded runs, with `overrides` on top.

        `generalization` (paper §3): α=.5, K=100, rate .05, no feedback. `rich_feedback` (§4): α=1, K=20,
        rate .01. `test_time` (§5): as `rich_feedback`. `training_arguments(name)` gives the matching part
        of `GRPOConfig`.

        `long_run` (docs/results.md, "Does it last?"): α=0, K=100, rate .05, and a share of GRPO that grows from .5
        to 1, for a learning rate that falls to 0. Of the four settings that have five seeds in long recorded runs
        of a pretrained model, these alone end at the highest accuracy of every seed. They need rewards.

        `opsd` and `sdft` introduce the feedback, from a column of the dataset, as a reference solution, and take
        KL(teacher‖student) over the vocabulary. `opsd` (arXiv 2601.18734 v3, figure 2, §3.2, §4.1, §4.3.1): a
        frozen teacher, entries of at most .05 as in its code. `sdft` (arXiv 2601.19897 v2, §3): a moving average,
        .01 per 32 completions as in its code.

        Args:
            name: `generalization`, `rich_feedback`, `test_time`, `long_run`, `opsd` or `sdft`.
            **overrides: arguments of the constructor, in place of the preset's.

        Returns:
            A new configuration.

        Raises:
            ValueError: an unknown preset, or a bad value.
            TypeError: an unknown field.
        """
        unknown = sorted(set(overrides) - {f.name for f in dataclasses.fields(cls)} - set(_OTHER_NAMES))
        if unknown:
            raise TypeError(
                f"SDPOConfig: expected names of its fields, got {', '.join(unknown)}; remove them"
            )
        renamed = {_OTHER_NAMES[other] for other in _OTHER_NAMES if overrides.get(other) is not None}
        preset = {field: value for field, value in preset_settings(name).items() if field not in renamed}
        return cls(**{**preset, **overrides})


# Arguments of the constructor alone: without these they would be attributes with stale values, which
# `dataclasses.replace` passes on.
for _name in _OTHER_NAMES:
    delattr(SDPOConfig, _name)
    del SDPOConfig.__dataclass_fields__[_name]

"""Bad input: each case is refused by type, before anything is sampled, in words that lead out of it.

A message names the argument, says what was expected and what came, and, where that is not the same, the fix.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from bad_input import Case, run
from losses import sampled_loss, topk_loss

import sdpo
from sdpo_rl import SDPOConfig, training_arguments

# --- SDPOConfig -------------------------------------------------------------------------------------------


def field(name: str, value: Any, error: type[Exception], *says: str) -> Case:
    return Case(f"{name}={value!r:.30}", lambda: SDPOConfig(**{name: value}), error, (name, *says))


def flag(name: str) -> list[Case]:
    return [
        field(name, value, TypeError, "expected a bool", "True or False", f"got {value!r}")
        for value in (1, "yes", None)
    ]


def fraction(name: str, meaning: str) -> list[Case]:
    values = [
        field(name, value, ValueError, "a number in [0, 1]", meaning, f"got {value!r}")
        for value in (3, -0.1, math.nan)
    ]
    return values + [
        field(name, value, TypeError, "a number", meaning, f"got {value!r}") for value in ("0.5", True, None)
    ]


def count(name: str) -> list[Case]:
    values = [field(name, value, ValueError, "an int in [1, ", f"got {value!r}", "pass") for value in (0, -1)]
    return values + [
        field(name, value, TypeError, "an int", f"got {value!r}", "pass") for value in (2.0, "3", True)
    ]


def choice(name: str, *choices: str) -> list[Case]:
    values = [
        field(name, value, ValueError, "one of", *map(repr, choices), f"got {value!r}")
        for value in ("nonsense", choices[0].upper())
    ]
    return values + [
        field(name, value, TypeError, "one of", *map(repr, choices), f"got {value!r}") for value in (None, 1)
    ]


def clip(name: str) -> list[Case]:
    says = ("finite number > 0", "None to turn the weights off")
    values = [
        field(name, value, ValueError, *says, f"got {value!r}") for value in (0.0, -1.0, math.inf, math.nan)
    ]
    return [*values, field(name, "2", TypeError, *says, "got '2'")]


def template(name: str, *fields: str) -> list[Case]:
    short, wanted = name.removesuffix("_template"), [f"{{{f}}}" for f in fields]
    good = "".join(wanted)
    return [
        Case(f"{name}: {label}", lambda text=text: SDPOConfig(**{name: text}), error, (short, *says))
        for label, text, error, says in (
            ("unknown field", good + "{answer}", ValueError, (*wanted, "unknown ['answer']", "{{ and }}")),
            ("missing field", "".join(wanted[1:]), ValueError, (*wanted, f"missing ['{fields[0]}']")),
            ("repeated field", good + wanted[0], ValueError, (*wanted, f"repeated ['{fields[0]}']")),
            ("positional field", good + "{}", ValueError, (*wanted, "unknown ['']")),
            ("lone brace", good + "{", ValueError, (*wanted, "{{ and }}")),
            ("conversion", good.replace("}", "!r}"), ValueError, (*wanted, "no conversion")),
            ("no text", None, TypeError, ("string", "NoneType")),
        )
    ]


CONFIG: dict[str, list[Case]] = {
    "enabled": flag("enabled"),
    "fused_lora_forward": flag("fused_lora_forward"),
    "fast_checkpointing_toggle": flag("fast_checkpointing_toggle"),
    "alpha": fraction("alpha", "0 for KL(teacher‖student), 1 for KL(student‖teacher)"),
    "k": count("k"),
    "support": [
        *choice("support", "student", "teacher", "full", "sampled"),
        field(
            "support",
            "sampled",
            ValueError,
            "expected alpha=1.0",
            "got alpha=0.5",
            "set alpha=1.0",
        ),
    ],
    "tail": choice("tail", "bucket", "renormalize"),
    "is_clip": clip("is_clip"),
    "rollout_is_clip": clip("rollout_is_clip"),
    "loss_aggregation": choice("loss_aggregation", "token-mean", "batch-token-mean", "sequence-mean"),
    "row_weights": choice("row_weights", "none", "pass_rate"),
    "credit": [
        *choice("credit", "token", "sequence"),
        Case(
            "credit: of a divergence over several tokens",
            lambda: SDPOConfig(credit="sequence"),
            ValueError,
            ("support: expected 'sampled' with credit='sequence'", "got 'student'", "credit='token'"),
        ),
    ],
    "entry_clip": [
        *(
            field("entry_clip", value, error, "finite number > 0", "None for no bound", f"got {value!r}")
            for value, error in ((0.0, ValueError), (math.inf, ValueError), ("1", TypeError))
        ),
        Case(
            "entry_clip: of a part of the vocabulary",
            lambda: SDPOConfig(entry_clip=0.05),
            ValueError,
            ("support: expected 'full' with entry_clip", "got 'student'", "entry_clip=None"),
        ),
        Case(
            "entry_clip: of the fused loss",
            lambda: SDPOConfig(entry_clip=0.05, support="full", loss_backend="triton"),
            ValueError,
            ("loss_backend: expected 'auto' or 'logits' with entry_clip=0.05", "got 'triton'", "change one"),
        ),
    ],
    "token_fraction": [
        *(
            field("token_fraction", value, ValueError, "(0, 1]", "the share of a row's tokens")
            for value in (0.0, 1.5, math.nan)
        ),
        Case(
            "token_fraction: of sampled tokens",
            lambda: SDPOConfig(token_fraction=0.5, support="sampled", alpha=1.0),
            ValueError,
            ("token_fraction: expected 1.0 with support='sampled'", "got 0.5", "another support"),
        ),
    ],
    "anchor_weight": [
        field("anchor_weight", -1.0, ValueError, "0 for none", "got -1.0"),
        field("anchor_weight", math.inf, ValueError, "0 for none", "got inf"),
        field("anchor_weight", "1", TypeError, "got '1'"),
    ],
    "grpo_weight": [
        *fraction("grpo_weight", "GRPO's share of the loss"),
        Case(
            "grpo_weight: with routing",
            lambda: SDPOConfig(grpo_weight=0.5, routing="srpo"),
            ValueError,
            ("grpo_weight: expected its default with routing='srpo'", "got 0.5", "routing='none'"),
        ),
        Case(
            "grpo_weight: of a preset, with routing",
            lambda: SDPOConfig.preset("long_run", routing="srpo"),
            ValueError,
            ("set grpo_weight=0.0 and grpo_weight_final=None, their defaults (a preset may have others)",),
        ),
    ],
    "grpo_weight_final": [
        field("grpo_weight_final", 1.5, ValueError, "[0, 1]", "got 1.5", "in the last step"),
        field("grpo_weight_final", "1", TypeError, "got '1'"),
        Case(
            "grpo_weight_final: with routing",
            lambda: SDPOConfig(grpo_weight_final=0.0, routing="srpo"),
            ValueError,
            ("grpo_weight_final: expected its default with routing='srpo'", "got 0.0", "routing='none'"),
        ),
    ],
    "routing": choice("routing", "none", "srpo"),
    "token_weights": [
        *choice("token_weights", "none", "confidence", "gate", "evidence"),
        *(
            field(
                "token_weights",
                name,
                ValueError,
                "without GRPO's part",
                repr(name),
                "set grpo_weight above 0",
            )
            for name in ("gate", "evidence")
        ),
        Case(
            "token_weights: evidence of rows without a teacher",
            lambda: SDPOConfig(token_weights="evidence", routing="srpo"),
            ValueError,
            ("token_weights", "routing='srpo'", "got 'evidence'", "grpo_weight=1.0"),
        ),
        *(
            Case(
                f"{name}: {value} of a part without a share of the loss, λ to {final}",
                partial(SDPOConfig, grpo_weight=1.0, grpo_weight_final=final, **{name: value}),
                ValueError,
                (name, "with grpo_weight=1.0", f"got {value!r}", "lower grpo_weight"),
            )
            for name, value in (
                ("anchor_weight", 0.1),
                ("row_weights", "pass_rate"),
                ("token_weights", "confidence"),
                ("token_weights", "gate"),
                ("token_fraction", 0.5),
            )
            for final in (None, 1.0)
        ),
    ],
    "evidence_mix": fraction("evidence_mix", "the teacher's share of the advantages"),
    "evidence_clip": [
        field("evidence_clip", value, ValueError, "(0, 1]", "how far an advantage may change")
        for value in (0.0, 1.5, math.nan)
    ],
    "token_weights_beta": [
        field(
            "token_weights_beta", value, error, "finite number > 0", "the published value", f"got {value!r}"
        )
        for value, error in ((0.0, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError))
    ],
    "teacher_mode": choice("teacher_mode", "ema", "frozen", "trust_region", "live", "lora_ema"),
    "teacher_update_rate": fraction("teacher_update_rate", "the weight of the student"),
    "teacher_rate_samples": count("teacher_rate_samples"),
    "teacher_restart_every": count("teacher_restart_every"),
    "credit_rows": [
        field("credit_rows", -1, ValueError, "an int in [0, ", "completions of a logged step", "got -1"),
        *(
            field("credit_rows", value, TypeError, "an int", f"got {value!r}")
            for value in (2.0, "3", True, None)
        ),
    ],
    "trust_region_coef": fraction("trust_region_coef", "the weight of the live student"),
    "teacher_tick": choice("teacher_tick", "generation_batch", "optimizer_step"),
    "teacher_dtype": choice("teacher_dtype", "float32", "bfloat16"),
    "teacher_offload": choice("teacher_offload", "none", "cpu"),
    "teacher_on_resume": choice("teacher_on_resume", "restore", "restart"),
    "success_reward_threshold": [
        field("success_reward_threshold", value, error, "a finite number", f"got {value!r}")
        for error, values in ((ValueError, (math.nan, math.inf)), (TypeError, ("1", None, True)))
        for value in values
    ],
    "success_reward_funcs": [
        field("success_reward_funcs", "correct", TypeError, "a list of strings", "'correct'"),
        field("success_reward_funcs", [1], TypeError, "a list of strings", "[1]"),
        field("success_reward_funcs", [], ValueError, "not empty", "judge success, or None"),
        field("success_reward_funcs", ["a", "a"], ValueError, "different strings", "['a', 'a']"),
    ],
    "dont_reprompt_on_self_success": flag("dont_reprompt_on_self_success"),
    "demonstration_policy": choice("demonstration_policy", "first", "random", "shortest", "longest", "best"),
    "num_demonstrations": count("num_demonstrations"),
    "remove_thinking_from_demonstration": flag("remove_thinking_from_demonstration"),
    "thinking_marks": [
        field("thinking_marks", ["<think>"], ValueError, "two marks", "['<think>']", "pass both"),
        field("thinking_marks", ["<t>", "<t>"], ValueError, "different strings", "two marks of a thought"),
        field("thinking_marks", ["<t>", ""], ValueError, "not empty", "two marks of a thought"),
        field("thinking_marks", "<t>", TypeError, "a list of strings", "'<t>'"),
        field("thinking_marks", None, TypeError, "a list of strings", "None"),
    ],
    "include_environment_feedback": flag("include_environment_feedback"),
    "environment_feedback_only_without_solution": flag("environment_feedback_only_without_solution"),
    "max_reprompt_length": count("max_reprompt_length"),
    "reprompt_truncation": choice("reprompt_truncation", "middle", "left", "right", "error"),
    "allow_control_tokens": flag("allow_control_tokens"),
    "reprompt_template": template("reprompt_template", "prompt", "solution", "feedback"),
    "solution_template": template("solution_template", "successful_previous_attempt"),
    "feedback_template": template("feedback_template", "feedback_raw"),
    "success_feedback_template": template("success_feedback_template", "feedback_raw"),
    "apply_chat_template_kwargs": [
        field("apply_chat_template_kwargs", "{", ValueError, "JSON"),
        field("apply_chat_template_kwargs", "[1]", TypeError, "a dict", "got list"),
        field("apply_chat_template_kwargs", 3, TypeError, "a dict", "got int"),
    ],
    "loss_backend": choice("loss_backend", "auto", "torch", "triton", "logits"),
    "loss_chunk_size": count("loss_chunk_size"),
    "packing": choice("packing", "auto", "packed", "groups", "padded"),
    "max_tokens_per_forward": count("max_tokens_per_forward"),
    "diagnostics_patience": count("diagnostics_patience"),
}

PRESETS = [
    Case("preset", lambda: SDPOConfig.preset("paper"), ValueError, ("preset", "'generalization'", "'paper'")),
    Case("preset's field", lambda: SDPOConfig.preset("test_time", alhpa=1), TypeError, ("alhpa",)),
    Case(
        "preset's value",
        lambda: SDPOConfig.preset("test_time", alpha=3),
        ValueError,
        ("alpha", "[0, 1]", "3"),
    ),
    Case(
        "training_arguments",
        lambda: training_arguments("x"),
        ValueError,
        ("preset", "'rich_feedback'", "'x'"),
    ),
]


def test_every_field_is_in_the_table() -> None:
    assert set(CONFIG) == {f.name for f in dataclasses.fields(SDPOConfig)}


@run([case for cases in CONFIG.values() for case in cases] + PRESETS)
def test_config(case: Case) -> None:
    case.check()


# --- the core ---------------------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 5)
MASK = torch.ones(2, 3, dtype=torch.bool)
ROW = torch.ones(2, dtype=torch.bool)
IDS = torch.zeros(2, 3, 1, dtype=torch.long)


def topk(student: Any = Z, teacher: Any = Z, k: Any = 2, alpha: Any = 0.5, tail: Any = "bucket") -> Any:
    return topk_loss(student, teacher, k=k, alpha=alpha, tail=tail)


def sampled(tokens: torch.Tensor) -> Any:
    return sampled_loss(Z, Z, tokens)


def statistics(tokens: torch.Tensor) -> Any:
    return sdpo.token_statistics(Z, Z, tokens, support="full", temperature=1.0)


def advantages(tokens: torch.Tensor) -> Any:
    return sdpo.token_advantages(Z, Z, tokens)


def gathered(tokens: torch.Tensor) -> Any:
    return sdpo.gather_log_probs(Z, tokens[..., None])


CORE = [
    Case(
        "logits of two shapes",
        lambda: topk(teacher=Z[:, :2]),
        ValueError,
        ("teacher_logits", "(2, 3, 5)", "(2, 2, 5)"),
    ),
    Case("integer logits", lambda: topk(student=Z.long()), TypeError, ("student_logits", "float", "int64")),
    Case("no tensor", lambda: topk(student=[0.0]), TypeError, ("student_logits", "tensor", "list")),
    Case("alpha=3", lambda: topk(alpha=3), ValueError, ("alpha", "[0, 1]", "3")),
    Case("alpha as text", lambda: topk(alpha="1"), TypeError, ("alpha", "number", "str")),
    Case("k=0", lambda: topk(k=0), ValueError, ("k", "[1, 5]", "0")),
    Case("k>V", lambda: topk(k=6), ValueError, ("k", "[1, 5]", "6", "vocabulary")),
    Case("k=2.0", lambda: topk(k=2.0), TypeError, ("k", "int", "float")),
    Case(
        "unknown tail", lambda: topk(tail="drop"), ValueError, ("tail", "'bucket'", "'renormalize'", "'drop'")
    ),
    Case(
        "token ids of another shape",
        lambda: sampled_loss(Z, Z, torch.zeros(2, 4).long()),
        ValueError,
        ("tokens", "(2, 3)", "(2, 4)"),
    ),
    Case(
        "float token ids",
        lambda: sampled_loss(Z, Z, torch.zeros(2, 3)),
        TypeError,
        ("tokens", "integer", "float32"),
    ),
    Case(
        "float mask",
        lambda: sdpo.self_distillation_loss(Z[..., 0], MASK.float(), row_mask=ROW),
        TypeError,
        ("loss_mask", "bool", "float32"),
    ),
    Case(
        "row mask per token",
        lambda: sdpo.self_distillation_loss(Z[..., 0], MASK, row_mask=MASK),
        ValueError,
        ("row_mask", "(2,)", "(2, 3)"),
    ),
    Case(
        "misaligned weights",
        lambda: sdpo.importance_weights(Z[..., 0], Z[..., :2, 0], clip=2.0),
        ValueError,
        ("old_log_probs", "(2, 3)", "(2, 2)"),
    ),
    Case(
        "rewards and groups of two lengths",
        lambda: sdpo.select_demonstrations(
            [1.0], [0, 0], success_threshold=1.0, exclude_self=True, policy="first", seed=0
        ),
        ValueError,
        ("rewards", "2", "1"),
    ),
    Case(
        "unknown template field",
        lambda: sdpo.Templates(feedback="{f}"),
        ValueError,
        ("feedback", "{feedback_raw}", "'f'"),
    ),
    Case(
        "logits of two devices",
        lambda: topk(teacher=Z.to("meta")),
        ValueError,
        ("teacher_logits", "cpu (the device of student_logits)", "meta", ".to('cpu')"),
    ),
    *(
        Case(f"{name} of another device", call, ValueError, (name, "cpu (the device of the logits)", "meta"))
        for name, call in (
            ("tokens", lambda: sampled_loss(Z, Z, IDS[..., 0].to("meta"))),
            ("tokens", lambda: sdpo.token_advantages(Z, Z, IDS[..., 0].to("meta"))),
            ("tokens", lambda: statistics(IDS[..., 0].to("meta"))),
            ("indices", lambda: sdpo.gather_log_probs(Z, IDS.to("meta"))),
        )
    ),
    *(
        Case(
            f"{name} {wrong} of {call.__name__}",
            partial(call, IDS[..., 0] + wrong),
            ValueError,
            (name, "[0, 5)", says),
        )
        for wrong, says in ((-1, "got -1"), (5, "got 5"))
        for name, call in (
            ("tokens", sampled),
            ("tokens", statistics),
            ("tokens", advantages),
            ("indices", gathered),
        )
    ),
    Case(
        "an id twice",
        lambda: sdpo.gather_log_probs(Z, torch.tensor([3, 3]).expand(2, 3, 2)),
        ValueError,
        ("indices", "distinct ids", "got 3 twice", "count twice"),
    ),
    Case(
        "no token ids",
        lambda: sdpo.distillation_loss(Z, Z, support="sampled", alpha=1.0, temperature=1.0),
        TypeError,
        ("tokens", "integer", "NoneType", "pass one"),
    ),
    Case(
        "array", lambda: topk(student=Z.numpy()), TypeError, ("student_logits", "numpy.ndarray", "as_tensor")
    ),
    Case("missing template field", lambda: sdpo.Templates(solution="s"), ValueError, ("solution", "missing")),
]


@run(CORE)
def test_core(case: Case) -> None:
    case.check()

"""Checks whether the installed TRL, Unsloth, transformers and accelerate still have what the trainer relies on.

    python -m sdpo_rl.compat.upgrade_check

prints one line per expectation with the reason for it, and exits with 1 if one does not hold. Where Unsloth is
installed and can be imported, the trainer it has rewritten is checked; `UNSLOTH_ALLOW_CPU=1` makes that possible
without a GPU. Otherwise it is TRL's own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from .unsloth import is_unsloth

_BOTH, _TRL, _UNSLOTH = "TRL and Unsloth", "TRL", "Unsloth"


class Method(NamedTuple):
    """A method that the trainer overrides or calls, and the parameters it relies on."""

    name: str
    parameters: tuple[str, ...]
    reason: str
    where: str = _BOTH

    def __str__(self) -> str:
        return f"GRPOTrainer.{self.name}({', '.join(self.parameters)})"

    def problem(self, trainer: type, config: type) -> str:
        """What is wrong; empty: nothing."""
        definitions = _definitions(trainer, self.name)
        if not definitions:
            return "gone"
        accepted: set[str] = set()
        for definition in definitions:
            parameters = inspect.signature(definition).parameters
            accepted |= set(parameters)
            # A method with **kwargs passes the rest on to the next definition.
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
        missing = [name for name in self.parameters if name not in accepted]
        if not missing:
            return ""
        return f"no parameter {', '.join(missing)}; it has {', '.join(sorted(accepted - {'self'}))}"


class Text(NamedTuple):
    """Words that a method's source must contain: keys, attributes and calls that are not visible otherwise."""

    method: str
    words: tuple[str, ...]
    reason: str
    where: str = _BOTH

    def __str__(self) -> str:
        return f"GRPOTrainer.{self.method} mentions {', '.join(self.words)}"

    def problem(self, trainer: type, config: type) -> str:
        """What is wrong; empty: nothing."""
        definitions = _definitions(trainer, self.method)
        if not definitions:
            return "gone"
        source = "\n".join(inspect.getsource(each) for each in definitions if inspect.isfunction(each))
        missing = [word for word in self.words if word not in source]
        return f"no longer mentions {', '.join(missing)}" if missing else ""


class Attribute(NamedTuple):
    """An attribute of the trainer: assigned to `self` in one of its classes, or defined in one."""

    name: str
    reason: str
    where: str = _BOTH

    def __str__(self) -> str:
        return f"GRPOTrainer.{self.name}"

    def problem(self, trainer: type, config: type) -> str:
        """What is wrong; empty: nothing."""
        return "" if self.name in _attributes(trainer) else "gone"


class Field(NamedTuple):
    """A field of `GRPOConfig`."""

    name: str
    reason: str
    where: str = _BOTH

    def __str__(self) -> str:
        return f"GRPOConfig.{self.name}"

    def problem(self, trainer: type, config: type) -> str:
        """What is wrong; empty: nothing."""
        return "" if self.name in {field.name for field in dataclasses.fields(config)} else "gone"


class Finding(NamedTuple):
    """An expectation, and what is wrong with it; `problem` is empty where it holds."""

    expectation: str
    reason: str
    problem: str


_ENTROPY_CONTROL = ("use_adaptive_entropy", "entropy_coef", "_last_world_entropy", "_entropy_window_stats")
_POLICY_OPTIONS = (
    *("delta", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile"),
    *("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
    *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
)

Expectation = Method | Text | Attribute | Field

EXPECTATIONS: tuple[Expectation, ...] = (
    Method(
        "_calculate_rewards",
        ("inputs", "prompts", "completions", "completion_ids_list"),
        "scores and feedback are collected here",
    ),
    Method("_generate_and_score_completions", ("inputs",), "the teacher's prompts are added to its output"),
    Method("_set_signature_columns_if_needed", (), "the dataset's column of feedback is not removed"),
    Method("_prepare_inputs", ("generation_batch",), "active tokens are counted once per generation batch"),
    Method(
        "compute_loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "the self-distillation loss replaces it",
    ),
    Method(
        "training_step", ("model", "inputs", "num_items_in_batch"), "micro-batches of a step are counted here"
    ),
    Method(
        "_get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
        "the loss's own log-probabilities replace it",
    ),
    Method("_generate_single_turn", (), "sharded processes generate together"),
    Method("_tokenize_prompts", ("prompts",), "the probe samples from the teacher's prompts", _TRL),
    Method("_tool_call_loop", ("prompts", "prompt_ids"), "sharded processes leave it together"),
    Text(
        "_tool_call_loop",
        ("return tool_mask, completions, completion_ids,",),
        "the whole rows are compared with the model's context",
    ),
    Method("train", ("resume_from_checkpoint",), "the checkpoint is validated before the run begins"),
    Method("_get_output_dir", ("trial",), "the teacher is saved in the checkpoint's folder"),
    Method("_get_train_sampler", (), "a resumed run has the row order of the uninterrupted one"),
    Method("get_train_dataloader", (), "preview and probe draw the prompts that training begins with"),
    Method("_init_training_state", (), "a run over a stream is resumed in the pass it was in"),
    Method("create_model_card", ("model_name",), "the options are added to the model card"),
    *(
        Attribute(name, "the model card says SDPO and its paper")
        for name in ("_name", "_paper", "_tag_names")
    ),
    Method("_save_checkpoint", ("model", "trial"), "the teacher is saved with the student"),
    Method("_save_rng_state", ("output_dir",), "the progress of the run is saved"),
    Method("_load_rng_state", ("checkpoint",), "the progress of the run is restored"),
    Method("_load_from_checkpoint", ("resume_from_checkpoint", "model"), "adapters are restored"),
    Method("_load_optimizer_and_scheduler", ("checkpoint",), "the teacher is restored"),
    Method("prediction_step", ("model", "inputs", "prediction_loss_only"), "evaluation is inherited"),
    Method(
        "evaluation_loop",
        ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
        "the loss of an evaluation is the mean over all its tokens",
    ),
    Method("log", ("logs",), "the self-distillation metrics are added"),
    Method("_log_completion_extra", (), "the completions table has a column of feedback"),
    Text(
        "_generate_and_score_completions",
        ('"prompt_ids"', '"prompt_mask"', '"completion_ids"', '"completion_mask"', '"advantages"'),
        "the keys of a scored batch",
    ),
    Text(
        "_generate_and_score_completions",
        ('"old_per_token_logps"', '"sampling_per_token_logps"', "self._calculate_rewards("),
        "log-probabilities for the weights, and the call that computes the rewards",
    ),
    Text(
        "_generate_and_score_completions",
        ('"tool_mask"', '"importance_sampling_ratio"'),
        "tokens that the model did not sample, and the weights of the inference engine",
    ),
    Text(
        "_generate_and_score_completions",
        ('"num_items_in_batch"', '"ref_per_token_logps"'),
        "the denominator and the KL penalty of GRPO's part of the loss",
    ),
    Text(
        "_prepare_inputs",
        ("self._buffered_inputs", "self._step", "self.num_iterations"),
        "which micro-batches belong to one generation batch",
    ),
    Text(
        "__init__",
        ("self.num_generations", "self.num_generations_eval", "self.reward_weights", "self._metrics"),
        "groups, score weights and metrics",
    ),
    Text(
        "_get_per_token_logps_and_entropies",
        ("fused_lm_head=True",),
        "on a CPU the kernel behind it is replaced",
        _TRL,
    ),
    Text("_prepare_inputs", ("steps_per_generation",), "how many micro-batches a generation batch has"),
    Text(
        "__init__", ("self.temperature", "self.chat_template_kwargs"), "settings of student and teacher alike"
    ),
    Text(
        "_compute_loss",
        ("current_gradient_accumulation_steps",),
        "the loss is divided by the accumulation steps here",
        _TRL,
    ),
    Text("compute_loss", ("max_left_pad",), "old log-probabilities are packed to the left", _UNSLOTH),
    Text(
        "_generate_and_score_completions", ("max_left_pad",), "the key that comes with left packing", _UNSLOTH
    ),
    Text(
        "_get_per_token_logps_and_entropies",
        ("UNSLOTH_RETURN_HIDDEN_STATES",),
        "the variable that turns logits into hidden states",
        _UNSLOTH,
    ),
    *(
        Attribute(name, reason)
        for reason, names in {
            "which rows are one group, and how often a generation batch is used": (
                "num_generations",
                "num_generations_eval",
                "num_iterations",
            ),
            "the position within a generation batch": ("_buffered_inputs", "_step"),
            "the number of micro-batches of an optimizer step": ("current_gradient_accumulation_steps",),
            "metrics are logged with the others, and saved": ("_metrics", "_pending_metrics"),
            "evaluations of a run are told from others": ("is_in_train",),
            "the running loss is saved": ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"),
            "a learning rate that a checkpoint replaces is named": ("lr_scheduler",),
            "scores are weighted as rewards are": ("reward_weights",),
            "the probe asks vLLM for no more tokens than it can hold": ("vllm_generation",),
            "student and teacher share temperature and chat template": (
                "temperature",
                "chat_template",
                "chat_template_kwargs",
            ),
            "the teacher's prompt has the tools of the student's": (
                "tools",
                "environment_factories",
                "_env_tools",
                "_batch_environments",
            ),
            "rewards are known by their functions": ("reward_funcs", "reward_func_names"),
            "a run may have no reward function": ("reward_processing_classes", "multi_objective_aggregation"),
            "the completions table has a column of feedback beside the user's": (
                "_logs",
                "_pending_extra_logs",
            ),
            "environments return feedback": ("environments",),
            "preview and probe sample as training does, and leave the environments as they were": (
                *("eos_token_ids", "max_completion_length", "rollout_func", "vllm_mode"),
                *("is_deepspeed_enabled", "_environment_pool"),
            ),
            "the completions table has rows and divergences": ("log_completions",),
            "the dataset's column of feedback is not removed": ("_signature_columns",),
            "whether the model itself generates": ("use_vllm",),
            "experts are balanced as in GRPO": ("aux_loss_enabled", "router_aux_loss_coef"),
            "the reference model of the anchor": ("ref_model", "beta"),
            "a log of the user does not replace one that is due": ("control",),
            "a sharded model is loaded differently": ("is_fsdp_enabled",),
        }.items()
        for name in names
    ),
    *(
        Field(name, "read by the trainer")
        for name in (
            "num_generations",
            "num_iterations",
            "steps_per_generation",
            "generation_batch_size",
            "max_completion_length",
            "chat_template_kwargs",
            "temperature",
            "beta",
            "use_bias_correction_kl",
            "loss_type",
            "epsilon",
            "epsilon_high",
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "gradient_checkpointing",
        )
    ),
    *(Attribute(name, "TRL's controller of the entropy bonus", _TRL) for name in _ENTROPY_CONTROL),
    *(Field(name, "a term of GRPO's part of the loss", _TRL) for name in _POLICY_OPTIONS),
    Field("unsloth_num_chunks", "tells a patched GRPOConfig from one imported before the patch", _UNSLOTH),
)


def check(trainer: type, config: type, expectations: Sequence[Expectation], unsloth: bool) -> list[Finding]:
    """Compare a trainer class and its config class with the expectations that concern them.

    Args:
        trainer: `trl.GRPOTrainer`, Unsloth's or TRL's own.
        config: `trl.GRPOConfig`.
        expectations: what to compare with.
        unsloth: whether the classes are Unsloth's.
    """
    where = (_BOTH, _UNSLOTH if unsloth else _TRL)
    return [
        Finding(str(expected), expected.reason, expected.problem(trainer, config))
        for expected in expectations
        if expected.where in where
    ]


def _definitions(trainer: type, name: str) -> list[Any]:
    """Every definition of a method, outermost first, without decorators."""
    return [inspect.unwrap(vars(cls)[name]) for cls in trainer.__mro__ if name in vars(cls)]


@functools.cache
def _attributes(trainer: type) -> set[str]:
    """Names that the trainer's classes define, and that their methods assign to `self`."""
    names: set[str] = set()
    for cls in trainer.__mro__[:-1]:
        names |= set(vars(cls))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            match node:
                case ast.Attribute(ast.Name("self"), name, ast.Store()):
                    names.add(name)
    return names


def check_models() -> list[Finding]:
    """What the forwards rely on in transformers and accelerate."""
    causal = importlib.import_module("transformers").Qwen2ForCausalLM
    accelerator = importlib.import_module("accelerate").Accelerator
    names: tuple[str, ...] = ("logits_to_keep", "position_ids", "attention_mask")
    parameters = inspect.signature(causal.forward).parameters
    missing = [name for name in names if name not in parameters]
    findings = [
        Finding(
            f"Qwen2ForCausalLM.forward({', '.join(names)})",
            "the head is applied to completion positions alone",
            f"no parameter {', '.join(missing)}" if missing else "",
        )
    ]
    for owner, names, reason in (
        (causal, ("get_output_embeddings",), "finds the head"),
        (accelerator, ("unwrap_model", "autocast", "reduce"), "processes and precision"),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        problem = f"gone: {', '.join(missing)}" if missing else ""
        findings.append(Finding(f"{owner.__name__}.{', '.join(names)}", reason, problem))
    return findings


def check_server() -> list[Finding]:
    """What the weights that are sent to a vLLM server rely on."""
    client = importlib.import_module("trl.generation.vllm_client").VLLMClient
    engine = importlib.import_module("trl.generation.vllm_generation").VLLMGeneration
    send = getattr(client, "update_named_params", None)
    names = ("metadata", "named_params")
    missing = [name for name in names if send and name not in inspect.signature(send).parameters]
    problem = "gone" if send is None else f"no parameter {', '.join(missing)}" if missing else ""
    call = "self.vllm_client.update_named_params("
    calls = call in inspect.getsource(engine.sync_weights)
    return [
        Finding(
            f"VLLMClient.update_named_params({', '.join(names)})",
            "a vLLM server gets copies of merged weights",
            problem,
        ),
        Finding(
            f"VLLMGeneration.sync_weights mentions {call}",
            "a vLLM server gets its weights by it",
            "" if calls else f"no longer mentions {call}",
        ),
    ]


def patch_with_unsloth() -> str:
    """Import Unsloth and let it patch TRL. Returns why not, where that cannot be done; else nothing."""
    if importlib.util.find_spec("unsloth") is None:
        return "not installed"
    if not importlib.import_module("torch").cuda.is_available() and "UNSLOTH_ALLOW_CPU" not in os.environ:
        return "no GPU; set UNSLOTH_ALLOW_CPU=1 to check it without one"
    unsloth = importlib.import_module("unsloth")
    # The import needs the variable; PatchFastRL does nothing while it is set.
    os.environ.pop("UNSLOTH_ALLOW_CPU", None)
    unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
    return ""


def check_installation() -> tuple[list[Finding], str]:
    """All findings on what is installed, and why Unsloth's trainer is not checked; empty where it is."""
    skipped = patch_with_unsloth()
    trl = importlib.import_module("trl")
    findings = check(trl.GRPOTrainer, trl.GRPOConfig, EXPECTATIONS, unsloth=is_unsloth(trl.GRPOTrainer))
    findings += check_models() + check_server()
    if not skipped and not is_unsloth(trl.GRPOTrainer):
        findings.append(
            Finding("PatchFastRL rewrites trl.GRPOTrainer", "the trainer derives from it", "it did not")
        )
    return findings, skipped


def main() -> int:
    """Print the table. Returns the exit status: 1 if an expectation does not hold, else 0."""
    findings, skipped = check_installation()
    for name in ("trl", "transformers", "peft", "accelerate", "torch", "unsloth"):
        print(f"{name} {_version(name)}")
    for finding in findings:
        if finding.problem:
            print(f"BROKEN {finding.expectation}: {finding.problem}\n       needed because: {finding.reason}")
        else:
            print(f"ok     {finding.expectation}: {finding.reason}")
    if skipped:
        print(f"Unsloth's trainer is not checked: {skipped}")
    broken = sum(bool(finding.problem) for finding in findings)
    print(f"{len(findings) - broken} of {len(findings)} expectations hold")
    return 1 if broken else 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())

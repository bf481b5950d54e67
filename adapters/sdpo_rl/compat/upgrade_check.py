"""Which of the private things that the trainer relies on in TRL and Unsloth changed in the installed versions.

    python -m sdpo_rl.compat.upgrade_check

prints one line per expectation with the reason for it, and exits with 1 if one of them broke. Where Unsloth is
installed and can be imported, the trainer that is looked at is the one it has rewritten; `UNSLOTH_ALLOW_CPU=1`
makes that possible without a GPU. Otherwise it is TRL's own.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from .unsloth import is_unsloth

_BOTH, _TRL, _UNSLOTH = "TRL and Unsloth", "TRL", "Unsloth"


class Method(NamedTuple):
    """A method the trainer overrides or calls, the parameters it relies on, and why."""

    name: str
    parameters: tuple[str, ...]
    reason: str
    where: str = _BOTH


class Text(NamedTuple):
    """Words that a method's source must contain: keys, attributes and calls that nothing else shows."""

    method: str
    words: tuple[str, ...]
    reason: str
    where: str = _BOTH


class Attribute(NamedTuple):
    """Something the trainer has: assigned to `self` in one of its classes, or defined in one."""

    name: str
    reason: str
    where: str = _BOTH


class Field(NamedTuple):
    """A field of `GRPOConfig`."""

    name: str
    reason: str
    where: str = _BOTH


class Finding(NamedTuple):
    """One expectation and how it was found; `problem` is empty where it holds."""

    expectation: str
    reason: str
    problem: str


Expectation = Method | Text | Attribute | Field

EXPECTATIONS: tuple[Expectation, ...] = (
    Method(
        "_calculate_rewards",
        ("inputs", "prompts", "completions", "completion_ids_list"),
        "raw rewards and feedback are taken here",
    ),
    Method("_generate_and_score_completions", ("inputs",), "the reprompts are added to what it returns"),
    Method("_prepare_inputs", ("generation_batch",), "active tokens are counted once per generation batch"),
    Method(
        "compute_loss",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "the self-distillation loss takes its place",
    ),
    Method(
        "training_step", ("model", "inputs", "num_items_in_batch"), "keeps the place in an optimizer step"
    ),
    Method(
        "_get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
        "computed in plain torch on a CPU",
    ),
    Method("_generate_single_turn", (), "ranks generate together"),
    Method("_tool_call_loop", (), "every rank goes along to the end of it"),
    Method("train", ("resume_from_checkpoint",), "the checkpoint is looked at before the run begins"),
    Method("_get_output_dir", ("trial",), "the teacher is saved in the checkpoint's folder"),
    Method("_get_train_sampler", (), "a resumed run draws the order of the uninterrupted one"),
    Method("_save_checkpoint", ("model", "trial"), "the teacher is saved beside the student"),
    Method("_save_rng_state", ("output_dir",), "the place in the run is saved"),
    Method("_load_rng_state", ("checkpoint",), "the place in the run is restored"),
    Method("_load_from_checkpoint", ("resume_from_checkpoint", "model"), "adapters are restored"),
    Method("_load_optimizer_and_scheduler", ("checkpoint",), "the teacher is restored"),
    Method("prediction_step", ("model", "inputs", "prediction_loss_only"), "evaluation is inherited"),
    Method(
        "evaluation_loop",
        ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
        "the loss of an evaluation is that of all its tokens together",
    ),
    Method("log", ("logs",), "the self-distillation metrics are added"),
    Method("_log_completion_extra", (), "feedback shows in the completions table"),
    Text(
        "_generate_and_score_completions",
        ('"prompt_ids"', '"prompt_mask"', '"completion_ids"', '"completion_mask"', '"advantages"'),
        "the keys of a scored batch",
    ),
    Text(
        "_generate_and_score_completions",
        ('"old_per_token_logps"', '"sampling_per_token_logps"', "self._calculate_rewards("),
        "log-probabilities for the weights, and the call that hands over the rewards",
    ),
    Text(
        "_generate_and_score_completions",
        ('"tool_mask"', '"importance_sampling_ratio"'),
        "tokens that are not the model's own, and the weights for the inference engine",
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
    Text("_prepare_inputs", ("steps_per_generation",), "how long a generation batch lasts"),
    Text("__init__", ("self.temperature", "self.chat_template_kwargs"), "what student and teacher share"),
    Text(
        "_compute_loss",
        ("current_gradient_accumulation_steps",),
        "the caller divides by the accumulation itself",
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
            "where the run stands within a generation batch": ("_buffered_inputs", "_step"),
            "an optimizer step has so many micro-batches": ("current_gradient_accumulation_steps",),
            "metrics are logged with the others, and saved": ("_metrics",),
            "the running loss is saved": ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"),
            "scores are weighed as rewards are": ("reward_weights",),
            "student and teacher share temperature and chat template": (
                "temperature",
                "chat_template",
                "chat_template_kwargs",
            ),
            "the reprompt names the tools that the prompt named": (
                "tools",
                "environment_factories",
                "_env_tools",
                "_batch_environments",
            ),
            "environments speak of their episodes": ("environments",),
            "who generates": ("use_vllm",),
            "experts are balanced as in GRPO": ("aux_loss_enabled", "router_aux_loss_coef"),
            "a sharded model is loaded otherwise": ("is_fsdp_enabled",),
        }.items()
        for name in names
    ),
    *(
        Field(name, "read to count, group or name things")
        for name in (
            "num_generations",
            "num_iterations",
            "steps_per_generation",
            "generation_batch_size",
            "max_completion_length",
            "chat_template_kwargs",
            "temperature",
            "beta",
            "gradient_checkpointing",
        )
    ),
    Field("unsloth_num_chunks", "tells a patched GRPOConfig from one imported before the patch", _UNSLOTH),
)


def check(trainer: type, config: type, expectations: Sequence[Expectation], unsloth: bool) -> list[Finding]:
    """Hold a trainer class and its config class against the expectations that concern them."""
    attributes = _attributes(trainer)
    looks: dict[type, Callable[[Any], str]] = {
        Method: lambda e: _method_problem(trainer, e),
        Text: lambda e: _text_problem(trainer, e),
        Attribute: lambda e: "" if e.name in attributes else "gone",
        Field: lambda e: "" if e.name in {f.name for f in dataclasses.fields(config)} else "gone",
    }
    findings = []
    for expected in expectations:
        if expected.where != _BOTH and (expected.where == _UNSLOTH) is not unsloth:
            continue
        findings.append(Finding(_describe(expected), expected.reason, looks[type(expected)](expected)))
    return findings


def _describe(expected: Expectation) -> str:
    if isinstance(expected, Method):
        return f"GRPOTrainer.{expected.name}({', '.join(expected.parameters)})"
    if isinstance(expected, Text):
        return f"GRPOTrainer.{expected.method} mentions {', '.join(expected.words)}"
    return f"{'GRPOTrainer' if isinstance(expected, Attribute) else 'GRPOConfig'}.{expected.name}"


def _definitions(trainer: type, name: str) -> list[Any]:
    """Every definition of a method, outermost first, without what decorators put around it."""
    return [inspect.unwrap(vars(cls)[name]) for cls in trainer.__mro__ if name in vars(cls)]


def _attributes(trainer: type) -> set[str]:
    """What the trainer's classes define, and what their methods assign to `self`."""
    found: set[str] = set()
    for cls in trainer.__mro__[:-1]:
        found |= set(vars(cls))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= (
                    {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
                )
    return found


def _method_problem(trainer: type, expected: Method) -> str:
    definitions = _definitions(trainer, expected.name)
    if not definitions:
        return "gone"
    named: set[str] = set()
    for definition in definitions:
        parameters = inspect.signature(definition).parameters
        named |= set(parameters)
        # What a wrapper passes on has its names in the definition below.
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    missing = [name for name in expected.parameters if name not in named]
    return (
        f"no parameter {', '.join(missing)}; it has {', '.join(sorted(named - {'self'}))}" if missing else ""
    )


def _text_problem(trainer: type, expected: Text) -> str:
    definitions = _definitions(trainer, expected.method)
    if not definitions:
        return "gone"
    sources = "\n".join(
        inspect.getsource(definition) for definition in definitions if inspect.isfunction(definition)
    )
    missing = [word for word in expected.words if word not in sources]
    return f"no longer mentions {', '.join(missing)}" if missing else ""


def check_models() -> list[Finding]:
    """What the forwards rely on in transformers, PEFT and accelerate."""
    transformers = importlib.import_module("transformers")
    accelerate = importlib.import_module("accelerate")
    causal = transformers.Qwen2ForCausalLM
    parameters = inspect.signature(causal.forward).parameters
    missing = [
        name for name in ("logits_to_keep", "position_ids", "attention_mask") if name not in parameters
    ]
    found = [
        Finding(
            "Qwen2ForCausalLM.forward(logits_to_keep, position_ids, attention_mask)",
            "the head sees completion positions alone",
            f"no parameter {', '.join(missing)}" if missing else "",
        )
    ]
    for owner, names, reason in (
        (causal, ("get_output_embeddings",), "the head is found by it"),
        (accelerate.Accelerator, ("unwrap_model", "autocast", "reduce"), "ranks and precision"),
    ):
        gone = [name for name in names if not hasattr(owner, name)]
        found.append(
            Finding(
                f"{owner.__name__}.{', '.join(names)}", reason, f"gone: {', '.join(gone)}" if gone else ""
            )
        )
    return found


def patch_with_unsloth() -> str:
    """Import Unsloth and let it patch TRL; why not, where that cannot be done."""
    if importlib.util.find_spec("unsloth") is None:
        return "not installed"
    if not importlib.import_module("torch").cuda.is_available() and "UNSLOTH_ALLOW_CPU" not in os.environ:
        return "no GPU; set UNSLOTH_ALLOW_CPU=1 to look at it all the same"
    unsloth = importlib.import_module("unsloth")
    # The import needs the variable; PatchFastRL does nothing while it is set.
    os.environ.pop("UNSLOTH_ALLOW_CPU", None)
    unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
    return ""


def main() -> int:
    """Print the table; 1 if an expectation broke."""
    skipped = patch_with_unsloth()
    trl = importlib.import_module("trl")
    findings = check(trl.GRPOTrainer, trl.GRPOConfig, EXPECTATIONS, unsloth=is_unsloth(trl.GRPOTrainer))
    findings += check_models()
    if not skipped and not is_unsloth(trl.GRPOTrainer):
        findings.append(
            Finding("PatchFastRL rewrites trl.GRPOTrainer", "the trainer is built over it", "it did not")
        )
    for name in ("trl", "transformers", "peft", "accelerate", "torch", "unsloth"):
        print(f"{name} {_version(name)}")
    for finding in findings:
        if finding.problem:
            print(f"BROKEN {finding.expectation}: {finding.problem}\n       needed because: {finding.reason}")
        else:
            print(f"ok     {finding.expectation}: {finding.reason}")
    if skipped:
        print(f"Unsloth's trainer not looked at: {skipped}")
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

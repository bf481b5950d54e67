"""The pages name every metric that the trainer can log, and every option that a reader may come with."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig
from transformers import TrainingArguments
from trl import GRPOConfig

import sdpo
from sdpo_rl import SDPOConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.sdpo import SDPOConfig as PeerConfig

DOCS = Path(__file__).parents[1] / "docs"
BASE = {field.name for field in dataclasses.fields(TrainingArguments)}


def own(config: type) -> set[str]:
    """Options of a TRL configuration that `TrainingArguments` does not have."""
    return {field.name for field in dataclasses.fields(config)} - BASE


def section(heading: str) -> str:
    return (DOCS / "migrating.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("|---")]


def quoted(text: str) -> set[str]:
    """Names in backticks: what stands before `=`, `(` and after the last dot."""
    return {re.split(r"[=(]", name)[0].split(".")[-1].strip() for name in re.findall(r"`([^`]*)`", text)}


# --- metrics ----------------------------------------------------------------------------------------------

# Between them these runs log everything that the trainer can log.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.conversations(4)}),
    "two passes": ({}, {"num_iterations": 2}),
    "hybrid": (
        {"grpo_weight": 0.5, "loss_backend": "auto", "row_weights": "pass_rate"},
        {"beta": 0.1, "entropy_coef": 0.1},
    ),
    "routed": ({"routing": "srpo", "token_weights": "confidence"}, {}),
    "anchored": (
        {"anchor_weight": 0.1, "loss_backend": "auto"},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
    ),
}


def logged(tmp_path: Path) -> set[str]:
    names: set[str] = set()
    for number, (options, arguments) in enumerate(RUNS.values()):
        model = tiny.model()
        if "beta" in arguments:  # TRL loads its reference from the model's folder
            model.save_pretrained(tmp_path / "model")
            model = type(model).from_pretrained(tmp_path / "model")
        trainer = tiny.trainer(
            tmp_path / str(number), sdpo_config=tiny.config(**options), start=model, max_steps=1, **arguments
        )
        trainer.train()
        names |= {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    return {name for name in names if name.startswith("self_distillation/")}


def unnamed(metrics: set[str], page: str) -> set[str]:
    words = set(re.findall(r"`([\w/]+)`", page))
    return {name for name in metrics if not {name, name.removeprefix("self_distillation/")} & words}


@pytest.mark.filterwarnings("ignore")
def test_the_metrics_page_has_every_metric(tmp_path: Path) -> None:
    metrics = logged(tmp_path)
    must = {
        "divergence",
        "is_clip_fraction",
        "policy_kl",
        "policy_entropy",
        "policy_loss",
        "anchor",
        "row_weight",
        "token_weight",
    }
    assert {f"self_distillation/{name}" for name in must | {"distilled_row_fraction"}} <= metrics
    assert unnamed(metrics, (DOCS / "metrics.md").read_text()) == set()
    assert unnamed({"self_distillation/new"}, "`self_distillation/divergence`") == {"self_distillation/new"}


def test_every_metric_says_what_to_do() -> None:
    rows = [row for row in table((DOCS / "metrics.md").read_text()) if row[0].startswith("`")]
    assert len(rows) > 20
    assert [row for row in rows if len(row) != 3 or not all(cell.strip() for cell in row)] == []


# --- migrating --------------------------------------------------------------------------------------------


def not_covered(options: set[str], text: str) -> set[str]:
    names = quoted(text)
    prefixes = tuple(name.removesuffix("*") for name in names if name.endswith("*"))
    return {name for name in options if name not in names and not (prefixes and name.startswith(prefixes))}


def test_every_option_of_grpo_has_a_row() -> None:
    text = section("From TRL's GRPO")
    assert not_covered(own(GRPOConfig), text) == set()
    assert not_covered({"frobnicate"}, text) == {"frobnicate"}
    named = {name for row in table(text)[1:] for name in quoted(row[0]) if not name.endswith("*")}
    assert named <= own(GRPOConfig)


def test_the_row_of_refused_options_is_that_of_the_trainer() -> None:
    from sdpo_rl._validate import _OF_POLICY
    from sdpo_rl.diagnose.settings import _GRPO_LOSS_OPTIONS

    rows = {row[1]: quoted(row[0]) for row in table(section("From TRL's GRPO"))[1:]}
    (refused,) = (names for effect, names in rows.items() if effect.startswith("refused"))
    assert refused >= set(_OF_POLICY) - {"beta"}
    (policy,) = (names for effect, names in rows.items() if effect.startswith("of GRPO's part"))
    assert policy >= set(_GRPO_LOSS_OPTIONS)


def test_every_option_of_trl_sdpo_has_a_row() -> None:
    text = section("From TRL's experimental SDPO")
    assert not_covered(own(PeerConfig) - own(GRPOConfig), text) == set()


def other_defaults() -> set[tuple[str, str]]:
    """Options that TRL's SDPO shares with GRPOConfig, with both defaults where they differ."""
    theirs, ours = (
        {field.name: field.default for field in dataclasses.fields(config)}
        for config in (PeerConfig, GRPOConfig)
    )
    shared = set(theirs) & set(ours)
    return {(name, f"{theirs[name]} → {ours[name]}") for name in shared if theirs[name] != ours[name]}


def test_shared_options_with_other_defaults_in_trl_sdpo_are_listed() -> None:
    rows = table(section("From TRL's experimental SDPO"))
    head = next(i for i, row in enumerate(rows) if row[0] == "option")
    assert {(row[0].strip("`"), row[1].replace("`", "")) for row in rows[head + 1 :]} == other_defaults()
    assert ("learning_rate", "1e-06 → 1e-06") not in other_defaults()


def test_the_nearest_settings_to_trl_sdpo_are_its_defaults() -> None:
    block = section("From TRL's experimental SDPO").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    theirs = PeerConfig(output_dir="unused", use_cpu=True, bf16=False)
    config = names["config"]
    for name in {field.name for field in dataclasses.fields(config)} - own_of_this_library(theirs):
        assert getattr(config, name) == getattr(theirs, name), name
    assert (config.support, config.alpha) == (
        theirs.distillation_mode.split("_")[0],
        theirs.distillation_alpha,
    )
    assert config.is_clip == theirs.distillation_is_clip
    assert config.max_reprompt_length == theirs.max_reprompt_len


def own_of_this_library(theirs: Any) -> set[str]:
    """Fields of SDPOConfig that are not there, and the templates, which end in line breaks there."""
    ours = {field.name for field in dataclasses.fields(SDPOConfig)}
    templates = {name for name in ours if name.endswith("_template")}
    for name in templates - {"success_feedback_template"}:
        assert getattr(theirs, name).rstrip("\n") == getattr(SDPOConfig(), name)
    return {name for name in ours if not hasattr(theirs, name)} | templates


# Options of SDPOConfig in sdpo-rl 0.0.3, and the names that it exported.
EARLIER = {
    *("enabled", "alpha", "full_logit_distillation", "distillation_topk", "distillation_add_tail", "is_clip"),
    *("teacher_mode", "teacher_update_rate", "success_reward_threshold", "dont_reprompt_on_self_success"),
    *("remove_thinking_from_demonstration", "include_environment_feedback", "max_reprompt_length"),
    *("environment_feedback_only_without_solution", "reprompt_truncation", "apply_chat_template_kwargs"),
    *("reprompt_template", "solution_template", "feedback_template", "SDPOTrainer", "add_tail_bucket"),
    *("aggregate_loss", "apply_importance_sampling_correction", "compute_self_distillation_loss"),
    *("top_k_kl_divergence", "build_teacher_prompts", "compute_self_distillation_mask", "ema_update"),
    *("remove_thinking_tags", "select_demonstration", "EMATeacherCallback", "LoraEMATeacherCallback"),
    *("ema_update_lora_adapters", "init_lora_ema_teacher", "LORA_EMA_TEACHER_ADAPTER"),
}


def test_every_option_of_the_earlier_release_has_a_row() -> None:
    text = section("From `sdpo-rl` 0.0.3")
    assert not_covered(EARLIER, text) == set()
    ours = {field.name for field in dataclasses.fields(SDPOConfig)}
    (same,) = (quoted(row[0]) for row in table(text) if row[1] == "the same" and "`alpha`" in row[0])
    assert same <= ours
    for name in re.findall(r"`sdpo\.(\w+)", text):
        assert hasattr(sdpo, name), name


def test_the_table_of_the_published_code_has_our_defaults() -> None:
    rows = [
        row
        for row in table(section("From the published code (a fork of verl)"))
        if row[0].startswith("`self")
    ]
    assert len(rows) > 12
    ours = {field.name: getattr(SDPOConfig(), field.name) for field in dataclasses.fields(SDPOConfig)}
    checked = 0
    for left, right, *rest in rows:
        name = left.strip("`").split(".")[-1] if right.startswith("the same") else sorted(quoted(right))[0]
        if "," in left or not rest or "→" not in rest[0]:
            continue
        assert rest[0].split("→")[1].strip(' `"') == str(ours[right.split("`")[1] if "`" in right else name])
        checked += 1
    assert checked > 10

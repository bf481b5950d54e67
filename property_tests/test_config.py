"""The configuration: published defaults and presets, validation, YAML and the command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from strategies import Claim
from trl import GRPOConfig, TrlParser

from sdpo_rl import SDPOConfig, training_arguments

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {field.name: field for field in dataclasses.fields(SDPOConfig)}

PUBLISHED = {
    "enabled": True,
    "alpha": 0.5,
    "k": 100,
    "tail": "bucket",
    "is_clip": 2.0,
    "teacher_mode": "ema",
    "teacher_update_rate": 0.05,
    "teacher_rate_samples": 256,
    "success_reward_threshold": 1.0,
    "dont_reprompt_on_self_success": True,
    "remove_thinking_from_demonstration": True,
    "include_environment_feedback": True,
    "environment_feedback_only_without_solution": True,
    "max_reprompt_length": 10240,
    "allow_control_tokens": False,
    "reprompt_template": "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
    "solution_template": "\nCorrect solution:\n\n{successful_previous_attempt}",
    "feedback_template": (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
    ),
    "apply_chat_template_kwargs": {},
}

PRESETS = {
    "generalization": {
        "alpha": 0.5,
        "k": 100,
        "teacher_update_rate": 0.05,
        "include_environment_feedback": False,
    },
    "rich_feedback": {"alpha": 1.0, "k": 20, "teacher_update_rate": 0.01},
    "test_time": {"alpha": 1.0, "k": 20, "teacher_update_rate": 0.01, "teacher_rate_samples": 16},
    "long_run": {
        "alpha": 0.0,
        "k": 100,
        "teacher_update_rate": 0.05,
        "grpo_weight": 0.5,
        "grpo_weight_final": 1.0,
    },
    "opsd": {
        "alpha": 0.0,
        "support": "full",
        "entry_clip": 0.05,
        "loss_aggregation": "sequence-mean",
        "teacher_mode": "frozen",
        "environment_feedback_only_without_solution": False,
        "reprompt_template": (
            "{prompt}{solution}{feedback}\n\nAfter understanding the reference solution, please try to solve this "
            "problem using your own approach below:"
        ),
        "feedback_template": "\n\nHere is a reference solution:\n{feedback_raw}",
        "success_feedback_template": "\n\nHere is a reference solution:\n{feedback_raw}",
    },
    "sdft": {
        "alpha": 0.0,
        "support": "full",
        "loss_aggregation": "sequence-mean",
        "teacher_update_rate": 0.01,
        "teacher_rate_samples": 32,
        "environment_feedback_only_without_solution": False,
        "reprompt_template": (
            "{prompt}{solution}{feedback}\n\nNow answer with a response of your own, including the thinking "
            "process:"
        ),
        "feedback_template": "\n\nThis is an example for a response to the question:\n{feedback_raw}",
        "success_feedback_template": "\n\nThis is an example for a response to the question:\n{feedback_raw}",
    },
}

COMMON = {
    "temperature": 1.0,
    "top_p": 1.0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr_scheduler_type": "constant_with_warmup",
}
SHORT = {"num_generations": 2, "max_completion_length": 1024}
SAMPLING = {"temperature": 1.1, "top_p": 0.95, "top_k": 20}
TRAINING = {
    "generalization": {**COMMON, "learning_rate": 1e-5, "warmup_steps": 10, "num_generations": 8},
    "rich_feedback": {**COMMON, "learning_rate": 1e-6, "warmup_steps": 0, "num_generations": 8},
    "test_time": {**COMMON, "learning_rate": 1e-6, "warmup_steps": 0, "num_generations": 16},
    "long_run": {
        **COMMON,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "num_generations": 8,
    },
    "opsd": {**SHORT, **SAMPLING, "learning_rate": 5e-6, "max_grad_norm": 0.1},
    "sdft": {
        **SHORT,
        "learning_rate": 5e-5,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    },
}

configs = st.builds(
    SDPOConfig,
    enabled=st.booleans(),
    alpha=st.floats(0, 1),
    k=st.integers(2, 500),  # one renormalized token is refused
    support=st.sampled_from(["student", "teacher", "full"]),
    tail=st.sampled_from(["bucket", "renormalize"]),
    is_clip=st.none() | st.floats(0.1, 10),
    teacher_mode=st.sampled_from(["ema", "frozen", "trust_region", "live", "lora_ema"]),
    success_reward_threshold=st.floats(-5, 5),
    success_reward_funcs=st.none() | st.just(["correct", "tests"]),
    thinking_marks=st.sampled_from([["<think>", "</think>"], ["[THINK]", "[/THINK]"]]),
    reprompt_template=st.sampled_from(
        ["{prompt}\n{solution}: {feedback}", "{{}}{prompt}{solution}{feedback}"]
    ),
    apply_chat_template_kwargs=st.dictionaries(st.text("abc", min_size=1), st.booleans() | st.integers()),
    loss_chunk_size=st.none() | st.integers(1, 4096),
)


def parse(arguments: list[str]) -> SDPOConfig:
    return TrlParser((SDPOConfig,)).parse_args_and_config(arguments)[0]


def test_the_defaults_are_the_published_ones() -> None:
    config = dataclasses.asdict(SDPOConfig())
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = dataclasses.asdict(SDPOConfig.preset(name))
    assert config == {**dataclasses.asdict(SDPOConfig()), **PRESETS[name]}
    assert dataclasses.asdict(SDPOConfig.preset(name, alpha=0.0, is_clip=None)) == {
        **config,
        "alpha": 0.0,
        "is_clip": None,
    }


@pytest.mark.parametrize("name", TRAINING)
def test_training_arguments_are_arguments(name: str, tmp_path: Path) -> None:
    arguments = training_arguments(name)
    assert arguments == TRAINING[name]
    made = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=16, **arguments
    )
    assert made.learning_rate == arguments["learning_rate"]
    arguments["learning_rate"] = 7.0
    assert training_arguments(name)["learning_rate"] != 7.0


def test_every_field_is_explained_with_its_default() -> None:
    described = dict(
        re.findall(r"^        (\w+): (.+?)(?=^        \w+: |\n\n)", SDPOConfig.__doc__ or "", re.M | re.S)
    )
    assert described.keys() >= FIELDS.keys()
    assert all(field.metadata["help"] for field in FIELDS.values())
    for name, field in FIELDS.items():
        value = re.escape(str(field.default))
        if isinstance(field.default, int | float | str) and "template" not in name:
            assert re.search(rf"Default `?{value}\b|`{value}`\s+\(default", described[name]), name


Fields = dict[str, Any]


def property_a_config_is_its_fields(rebuilt: Callable[[Fields], SDPOConfig], config: SDPOConfig) -> None:
    assert rebuilt(dataclasses.asdict(config)) == config


def from_fields(fields: Fields) -> SDPOConfig:
    return SDPOConfig(**fields)


def through_yaml(fields: Fields) -> SDPOConfig:
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(fields))
        return parse(["--config", str(path)])


def through_the_command_line(fields: Fields) -> SDPOConfig:
    arguments: list[str] = []
    for name, value in fields.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *value]
        elif name != "success_reward_funcs":  # a list has no text for None
            arguments.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return parse(arguments)


def leaving_out(left_out: Callable[[Any], bool], way: Callable[[Fields], SDPOConfig]) -> Any:
    """A way that treats some values as missing, and so as the defaults."""
    return lambda fields: way({name: value for name, value in fields.items() if not left_out(value)})


CLAIMS = [
    Claim(property_a_config_is_its_fields, way, leaving_out(left_out, way), {"config": configs})
    for way, left_out in (
        (from_fields, lambda value: not value),
        (through_yaml, lambda value: value is None),
        (through_the_command_line, lambda value: value is False),
    )
]
parametrize_claims = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.right.__name__)


@parametrize_claims
def test_a_config_survives(claim: Claim) -> None:
    claim.holds()


@parametrize_claims
def test_a_way_that_drops_values_is_rejected(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_an_error_in_yaml_is_that_of_the_constructor(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("alpha: 3\n")
    with pytest.raises(ValueError, match=r"alpha: expected a number in \[0, 1\]"):
        parse(["--config", str(path)])
    path.write_text("alhpa: 0.5\n")
    with pytest.raises(ValueError, match="alhpa"):
        parse(["--config", str(path)])


def test_numpy_s_numbers_become_python_s() -> None:
    config = SDPOConfig(
        k=np.int64(5),
        max_reprompt_length=np.uint16(9),
        alpha=np.float32(0.25),
        is_clip=np.float64(1.5),
        success_reward_threshold=np.int8(2),
    )
    plain = SDPOConfig(k=5, max_reprompt_length=9, alpha=0.25, is_clip=1.5, success_reward_threshold=2.0)
    assert config == plain
    assert [type(value) for value in vars(config).values()] == [type(value) for value in vars(plain).values()]
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(plain)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", True),
        ("alpha", np.bool_(True)),
        ("alpha", np.float32("nan")),
        ("alpha", 0.5j),
        ("is_clip", "2"),
        ("k", True),
        ("k", 5.0),
        ("k", np.float64(5)),
        ("k", np.array([5])),
    ],
)
def test_other_types_are_refused(field: str, value: Any) -> None:
    error = ValueError if isinstance(value, np.floating) and np.isnan(value) else TypeError
    with pytest.raises(error, match=f"^{field}: expected"):
        SDPOConfig(**{field: value})


def test_template_arguments_may_be_none() -> None:
    assert SDPOConfig(apply_chat_template_kwargs=None) == SDPOConfig()
    assert parse(["--apply_chat_template_kwargs=null"]) == SDPOConfig()
    with pytest.raises(TypeError, match=r"apply_chat_template_kwargs: expected a dict.*got list"):
        SDPOConfig(apply_chat_template_kwargs=[])


def test_both_configs_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "is_clip: null\nalpha: 1\napply_chat_template_kwargs: {enable_thinking: false}\n"
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nlearning_rate: 1.0e-6\n"
    )
    sdpo_config, arguments = TrlParser((SDPOConfig, GRPOConfig)).parse_args_and_config(
        ["--config", str(path)]
    )
    assert (sdpo_config.is_clip, sdpo_config.alpha) == (None, 1)
    assert sdpo_config.apply_chat_template_kwargs == {"enable_thinking": False}
    assert arguments.learning_rate == 1e-6


def test_lists_of_texts_from_code_yaml_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('success_reward_funcs: [correct, tests]\nthinking_marks: ["[THINK]", "[/THINK]"]\n')
    expected = SDPOConfig(
        success_reward_funcs=("correct", "tests"),  # type: ignore[arg-type]
        thinking_marks=["[THINK]", "[/THINK]"],
    )
    options = ["--success_reward_funcs", "correct", "tests", "--thinking_marks", "[THINK]", "[/THINK]"]
    assert parse(["--config", str(path)]) == parse(options) == expected
    assert expected.success_reward_funcs == ["correct", "tests"]
    assert parse([]).success_reward_funcs is None
    assert parse([]).thinking_marks == SDPOConfig().thinking_marks == ["<think>", "</think>"]
    assert SDPOConfig().thinking_marks is not SDPOConfig().thinking_marks


EXAMPLES = sorted((ROOT / "examples").rglob("*.y*ml"))


@pytest.mark.skipif(not EXAMPLES, reason="no YAML among the examples")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    known = {f.name for config in (SDPOConfig, GRPOConfig) for f in dataclasses.fields(config)}
    own = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump({**{k: v for k, v in content.items() if k in known}, **own}))
    config, _ = TrlParser((SDPOConfig, GRPOConfig)).parse_args_and_config(["--config", str(copy)])
    assert isinstance(config, SDPOConfig)


def test_the_names_of_trl_s_sdpo_are_taken_for_k_and_tail() -> None:
    config = SDPOConfig(distillation_topk=50, distillation_add_tail=False)
    assert config == SDPOConfig(k=50, tail="renormalize")
    assert dataclasses.asdict(config).keys() == FIELDS.keys()
    assert dataclasses.replace(config, alpha=1.0).k == 50
    assert SDPOConfig.preset("rich_feedback", distillation_topk=7).k == 7
    assert SDPOConfig(distillation_topk=100, k=100).k == 100
    assert not hasattr(config, "distillation_topk")
    assert not hasattr(SDPOConfig, "distillation_add_tail")
    for other, own in (
        ({"distillation_topk": 4}, {"k": 3}),
        ({"distillation_topk": 50}, {"k": 100}),
        ({"distillation_add_tail": False}, {"tail": "bucket"}),
        ({"distillation_add_tail": True}, {"tail": "renormalize"}),
    ):
        with pytest.raises(ValueError, match="name the same option"):
            SDPOConfig(**other, **own)
    with pytest.raises(TypeError, match="distillation_add_tail: expected a bool, got 1"):
        SDPOConfig(distillation_add_tail=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"support": "full", "k": 7}, ["k=7"]),
        ({"support": "sampled", "alpha": 1.0, "tail": "renormalize"}, ["tail='renormalize'"]),
        ({"teacher_mode": "frozen", "teacher_update_rate": 0.1}, ["teacher_update_rate=0.1"]),
        ({"teacher_mode": "live", "teacher_offload": "cpu"}, ["teacher_offload='cpu'"]),
        ({"teacher_mode": "frozen", "teacher_rate_samples": 64}, ["teacher_rate_samples=64"]),
        ({"teacher_mode": "frozen"}, []),
        ({"teacher_mode": "live", "teacher_rate_samples": None}, []),
        ({"teacher_mode": "trust_region"}, []),
        ({"teacher_mode": "frozen", "teacher_restart_every": 4}, []),
        ({"token_weights_beta": 2.0}, ["token_weights_beta=2.0"]),
        ({"evidence_mix": 0.1, "evidence_clip": 0.3}, ["evidence_mix=0.1", "evidence_clip=0.3"]),
        ({"trust_region_coef": 0.3}, ["trust_region_coef=0.3"]),
        ({"teacher_mode": "trust_region", "trust_region_coef": 0.3}, []),
        ({"teacher_mode": "live", "teacher_tick": "optimizer_step"}, ["teacher_tick='optimizer_step'"]),
        (
            {"teacher_mode": "frozen", "teacher_restart_every": 4, "teacher_tick": "optimizer_step"},
            [],
        ),
        (
            {"include_environment_feedback": False, "environment_feedback_only_without_solution": False},
            ["environment_feedback_only_without_solution=False"],
        ),
        ({"loss_backend": "logits", "loss_chunk_size": 64}, ["loss_chunk_size=64"]),
        ({"support": "full", "entry_clip": 0.05, "loss_chunk_size": 64}, ["loss_chunk_size=64"]),
        ({"support": "full", "enabled": False, "k": 7}, []),
        ({}, []),
    ],
)
def test_a_setting_without_effect_is_named_once(
    options: dict[str, Any], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    SDPOConfig(**options)
    assert [message.partition(" ")[0] for message in caplog.messages] == named


@pytest.mark.parametrize("mode", ["ema", "lora_ema", "live", "trust_region"])
def test_a_teacher_that_follows_does_not_restart(mode: str) -> None:
    with pytest.raises(
        ValueError, match=rf"teacher_mode: expected 'frozen' .*teacher_restart_every, got '{mode}'"
    ):
        SDPOConfig(teacher_mode=mode, teacher_restart_every=10)


def test_one_renormalized_token_is_refused() -> None:
    with pytest.raises(ValueError, match="k: expected at least 2 with tail='renormalize', got 1"):
        SDPOConfig(k=1, tail="renormalize")


def test_a_derived_configuration_has_fields_of_its_own() -> None:
    @dataclasses.dataclass
    class Derived(SDPOConfig):
        remark: str = ""

    derived = Derived(remark="mine", k=7)
    assert (derived.k, derived.remark) == (7, "mine")
    with pytest.raises(ValueError, match="k: expected an int"):
        Derived(k=0)


@pytest.mark.parametrize(
    "copied",
    [
        lambda config: config,
        copy.copy,
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        dataclasses.replace,
        lambda _: parse([]),
    ],
    ids=["made", "copied", "deep-copied", "pickled", "replaced", "parsed"],
)
def test_a_config_is_read_only_once_it_is_made(copied: Callable[[SDPOConfig], SDPOConfig]) -> None:
    config = copied(SDPOConfig())
    for name, value in (("alpha", 7), ("alpha", 0.3), ("alhpa", 0.3)):
        with pytest.raises(
            AttributeError, match=rf"^{name}: expected no change.*replace\(config, {name}=...\)"
        ):
            setattr(config, name, value)
    with pytest.raises(AttributeError, match="alpha: expected no change"):
        del config.alpha
    assert config == SDPOConfig()
    assert dataclasses.replace(config, alpha=0.3) == SDPOConfig(alpha=0.3)
    with pytest.raises(ValueError, match="alpha: expected a number"):
        dataclasses.replace(config, alpha=7)


def test_a_config_keeps_its_own_template_arguments() -> None:
    arguments = {"enable_thinking": False}
    config = SDPOConfig(apply_chat_template_kwargs=arguments)
    arguments["tokenize"] = True
    assert config.apply_chat_template_kwargs == {"enable_thinking": False}


def test_an_unknown_preset_or_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of .*'test_time'.*got 'nonsense'"):
        SDPOConfig.preset("nonsense")
    with pytest.raises(TypeError, match="expected names of its fields, got alhpa; remove"):
        SDPOConfig.preset("test_time", alhpa=1.0)


@pytest.mark.parametrize("name", ["tokenize", "return_dict", "add_generation_prompt", "tools", "padding"])
def test_template_arguments_of_the_renderer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"apply_chat_template_kwargs: .*got {name}, which"):
        SDPOConfig(apply_chat_template_kwargs={name: True})


# --- without TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["trl", "transformers", "accelerate"])
def test_a_missing_library_is_named_with_the_extra_to_install(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from sdpo_rl import SDPOConfig, training_arguments
print(SDPOConfig().k, len(training_arguments("test_time")) > 0)
try:
    from sdpo_rl import SDPOTrainer
except ImportError as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    config, error = result.stdout.splitlines()
    assert config == "100 True"
    assert error.startswith("ImportError sdpo_rl.SDPOTrainer needs ")
    assert error.endswith('which is not installed; pip install "sdpo-rl[trl]"')

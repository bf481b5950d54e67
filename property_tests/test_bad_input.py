"""Bad input: each case is refused by type, before anything is sampled, in words that lead out of it.

A message names the argument, says what was expected and what came, and, where that is not the same, the fix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from trl import GRPOConfig

import sdpo
from sdpo_rl import SDPOConfig, SDPOTrainer, training_arguments


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Any]
    error: type[Exception]
    says: tuple[str, ...]  # the argument, what was expected, what came, the way out

    def check(self, *arguments: Any) -> None:
        with pytest.raises(self.error) as caught:
            self.make(*arguments)
        message = str(caught.value)
        assert not [part for part in self.says if part not in message], message


def run(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


# --- SDPOConfig -------------------------------------------------------------------------------------------


def field(name: str, value: Any, error: type[Exception], *says: str) -> Case:
    return Case(f"{name}={value!r:.30}", lambda: SDPOConfig(**{name: value}), error, (name, *says))


def flag(name: str) -> list[Case]:
    return [field(name, value, TypeError, "True or False", f"got {value!r}") for value in (1, "yes", None)]


def fraction(name: str, meaning: str) -> list[Case]:
    bad = (3, -0.1, float("nan"), "0.5", True, None)
    return [field(name, value, ValueError, "a number in [0, 1]", meaning, f"got {value!r}") for value in bad]


def count(name: str) -> list[Case]:
    return [
        field(name, value, ValueError, "an integer >= 1", f"got {value!r}")
        for value in (0, -1, 2.0, "3", True)
    ]


def choice(name: str, *choices: str) -> list[Case]:
    return [
        field(name, value, ValueError, "one of", *map(repr, choices), f"got {value!r}")
        for value in ("nonsense", None, choices[0].upper(), 1)
    ]


def clip(name: str) -> list[Case]:
    return [
        field(name, value, ValueError, "finite number > 0", "None to turn the weights off", f"got {value!r}")
        for value in (0.0, -1.0, float("inf"), float("nan"), "2")
    ]


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
    "alpha": fraction("alpha", "0: KL(teacher‖student), 1: KL(student‖teacher)"),
    "distillation_topk": count("distillation_topk"),
    "distillation_support": [
        *choice("distillation_support", "student_topk", "teacher_topk", "full", "sampled_token"),
        field(
            "distillation_support",
            "sampled_token",
            ValueError,
            "needs alpha=1.0",
            "got alpha=0.5",
            "set alpha=1.0",
        ),
    ],
    "distillation_add_tail": flag("distillation_add_tail"),
    "is_clip": clip("is_clip"),
    "rollout_is_clip": clip("rollout_is_clip"),
    "loss_aggregation": choice("loss_aggregation", "token-mean", "sequence-mean"),
    "teacher_mode": choice("teacher_mode", "ema", "frozen", "trust_region", "live", "lora_ema"),
    "teacher_update_rate": fraction("teacher_update_rate", "the weight of the student"),
    "trust_region_coef": fraction("trust_region_coef", "the weight of the live student"),
    "teacher_tick": choice("teacher_tick", "generation_batch", "optimizer_step"),
    "teacher_dtype": choice("teacher_dtype", "float32", "bfloat16"),
    "teacher_offload": choice("teacher_offload", "none", "cpu"),
    "teacher_on_resume": choice("teacher_on_resume", "restore", "restart"),
    "success_reward_threshold": [
        field("success_reward_threshold", value, ValueError, "a finite number", f"got {value!r}")
        for value in (float("nan"), float("inf"), "1", None, True)
    ],
    "dont_reprompt_on_self_success": flag("dont_reprompt_on_self_success"),
    "demonstration_policy": choice("demonstration_policy", "first", "random", "shortest", "longest", "best"),
    "num_demonstrations": count("num_demonstrations"),
    "remove_thinking_from_demonstration": flag("remove_thinking_from_demonstration"),
    "include_environment_feedback": flag("include_environment_feedback"),
    "environment_feedback_only_without_solution": flag("environment_feedback_only_without_solution"),
    "max_reprompt_length": count("max_reprompt_length"),
    "reprompt_truncation": choice("reprompt_truncation", "middle", "left", "right", "error"),
    "reprompt_template": template("reprompt_template", "prompt", "solution", "feedback"),
    "solution_template": template("solution_template", "successful_previous_attempt"),
    "feedback_template": template("feedback_template", "feedback_raw"),
    "apply_chat_template_kwargs": [
        field("apply_chat_template_kwargs", "{", ValueError, "JSON"),
        field("apply_chat_template_kwargs", "[1]", TypeError, "a dict", "got list"),
        field("apply_chat_template_kwargs", 3, TypeError, "a dict", "got int"),
    ],
    "loss_backend": choice("loss_backend", "auto", "torch", "triton", "logits"),
    "loss_chunk_size": count("loss_chunk_size"),
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
    return sdpo.topk_distillation_loss(student, teacher, k=k, alpha=alpha, tail=tail)


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
        lambda: sdpo.sampled_token_distillation_loss(Z, Z, torch.zeros(2, 4).long()),
        ValueError,
        ("tokens", "(2, 3)", "(2, 4)"),
    ),
    Case(
        "float token ids",
        lambda: sdpo.sampled_token_distillation_loss(Z, Z, torch.zeros(2, 3)),
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
            ("tokens", lambda: sdpo.sampled_token_distillation_loss(Z, Z, IDS[..., 0].to("meta"))),
            ("tokens", lambda: sdpo.token_advantages(Z, Z, IDS[..., 0].to("meta"))),
            ("indices", lambda: sdpo.gather_log_probs(Z, IDS.to("meta"))),
        )
    ),
    Case(
        "array", lambda: topk(student=Z.numpy()), TypeError, ("student_logits", "numpy.ndarray", "as_tensor")
    ),
    Case("missing template field", lambda: sdpo.Templates(solution="s"), ValueError, ("solution", "missing")),
]


@run(CORE)
def test_core(case: Case) -> None:
    case.check()


# --- the trainer ------------------------------------------------------------------------------------------


def silent(**changes: Any) -> Any:
    """A model that must not be asked to generate."""
    model = tiny.model(**changes)

    def generate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was asked to generate")

    model.generate = generate
    return model


def train(path: Path, **changes: Any) -> None:
    tiny.trainer(path, **{"start": silent(), **changes}).train()


def ends_with(turn: dict[str, Any]) -> Dataset:
    return Dataset.from_dict({"prompt": [tiny.user("fine"), [*tiny.user("q"), turn]]})


def regrouped(path: Path) -> None:
    arguments = tiny.arguments(path)
    arguments.num_generations = 3
    SDPOTrainer(
        model=silent(),
        args=arguments,
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.judge,
        train_dataset=tiny.conversations(),
    )


def nothing_trains(path: Path) -> None:
    model = silent()
    model.requires_grad_(False)
    train(path, start=model)


def by_name(path: Path) -> None:
    tiny.model().save_pretrained(path / "model")
    train(path, start=str(path / "model"), sdpo_config=SDPOConfig(distillation_topk=103))


def streamed(path: Path) -> None:
    rows = [{"prompt": [{"role": "assistant", "content": "a"}]}] * 8
    train(path, train_dataset=IterableDataset.from_generator(lambda: iter(rows)))


def no_dataset(path: Path) -> None:
    SDPOTrainer(
        model=silent(),
        args=tiny.arguments(path),
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.judge,
    )


TRAINER = [
    Case(
        "config of another kind",
        lambda path: train(path, sdpo_config={"alpha": 1.0}),
        TypeError,
        ("sdpo_config", "SDPOConfig", "dict"),
    ),
    Case(
        "k beyond the vocabulary",
        lambda path: train(path, sdpo_config=SDPOConfig(distillation_topk=103)),
        ValueError,
        ("distillation_topk", "103", "102", "lower it"),
    ),
    Case(
        "k beyond the vocabulary of a model by name", by_name, ValueError, ("distillation_topk", "103", "102")
    ),
    Case("no dataset", no_dataset, ValueError, ("train_dataset",)),
    Case(
        "empty dataset",
        lambda path: train(path, train_dataset=tiny.conversations(0)),
        ValueError,
        ("train_dataset", "empty", "at least one row"),
    ),
    Case(
        "empty evaluation dataset",
        lambda path: train(path, eval_dataset={"held": tiny.conversations(0)}),
        ValueError,
        ("eval_dataset['held']", "empty", "at least one row"),
    ),
    Case(
        "no prompt column",
        lambda path: train(path, train_dataset=Dataset.from_dict({"question": ["q"]})),
        ValueError,
        ("train_dataset", "'prompt'", "['question']"),
    ),
    Case(
        "ends with the assistant",
        lambda path: train(path, train_dataset=ends_with({"role": "assistant", "content": "a"})),
        ValueError,
        ("train_dataset", "prompt 1", "'assistant'", "must end with one"),
    ),
    Case(
        "ends with the system",
        lambda path: train(path, eval_dataset=ends_with({"role": "system", "content": "a"})),
        ValueError,
        ("eval_dataset", "prompt 1", "'system'", "must end with one"),
    ),
    Case("streamed rows that end with the assistant", streamed, ValueError, ("prompt 0", "'assistant'")),
    Case(
        "prompts that are numbers",
        lambda path: train(path, train_dataset=Dataset.from_dict({"prompt": [1, 2]})),
        TypeError,
        ("train_dataset", "prompt 0", "string", "got 1"),
    ),
    *(
        Case(
            f"{name}, before the training",
            lambda path, name=name: tiny.trainer(
                path, start=silent(), train_dataset=tiny.conversations(4, **{name: [None, "cat", None, None]})
            ),
            ValueError,
            ("train_dataset", f"rows carry {name};", "text only", "drop the column", "enabled=False"),
        )
        for name in ("image", "images", "audio", "video")
    ),
    Case(
        "images of an evaluation",
        lambda path: tiny.trainer(
            path, start=silent(), eval_dataset=tiny.conversations(4, images=[[], ["cat.png"], [], []])
        ),
        ValueError,
        ("eval_dataset", "rows carry images;", "text only"),
    ),
    Case(
        "images, row by row",
        lambda path: train(
            path, train_dataset=tiny.conversations(8, image=["cat.png"] * 8).to_iterable_dataset()
        ),
        ValueError,
        ("rows carry image;", "text only", "drop the column"),
    ),
    Case(
        "no pad token",
        lambda path: train(path, processing_class=tiny.tokenizer(pad_token=None)),
        ValueError,
        ("processing_class", "pad token", "tokenizer.pad_token = tokenizer.eos_token"),
    ),
    Case(
        "a batch that the group does not divide",
        lambda path: train(path, per_device_train_batch_size=6),
        ValueError,
        ("generation_batch_size (6)", "divisible by num_generations", "4"),
    ),
    Case(
        "a group that no longer divides the batch",
        regrouped,
        ValueError,
        ("generation_batch_size (8)", "num_generations (3)", "per_device_train_batch_size"),
    ),
    Case(
        "a reward that cannot be called",
        lambda path: train(path, reward_funcs=[tiny.judge, 3.0]),
        TypeError,
        ("reward_funcs[1]", "a function", "float"),
    ),
    Case(
        "no reward in the place of one",
        lambda path: train(path, reward_funcs=[tiny.judge, None]),
        TypeError,
        ("reward_funcs[1]", "a function", "NoneType"),
    ),
    Case(
        "a feedback column of lists",
        lambda path: train(path, train_dataset=tiny.conversations(feedback=[["a", "b"]] * 8)),
        TypeError,
        ("train_dataset: the column 'feedback'", "strings or None", "list", "join"),
    ),
    Case(
        "a feedback column of lists, row by row",
        lambda path: train(
            path, train_dataset=tiny.conversations(feedback=[["a", "b"]] * 8).to_iterable_dataset()
        ),
        TypeError,
        ("the column 'feedback'", "strings or None", "list", "join"),
    ),
    Case(
        "lora_ema without adapters",
        lambda path: train(path, sdpo_config=tiny.config(teacher_mode="lora_ema")),
        ValueError,
        ("teacher_mode='lora_ema'", "adapters", "has none", "peft_config", "teacher_mode='ema'"),
    ),
    Case(
        "a KL term that would be dropped",
        lambda path: train(path, beta=0.04),
        ValueError,
        ("beta=0.04", "KL penalty", "enabled=False"),
    ),
    Case(
        "an entropy bonus that would be dropped",
        lambda path: train(path, entropy_coef=0.01),
        ValueError,
        ("entropy_coef=0.01", "entropy bonus", "enabled=False"),
    ),
    Case(
        "a loss on some tokens alone",
        lambda path: train(path, top_entropy_quantile=0.2),
        ValueError,
        ("top_entropy_quantile=0.2", "highest entropy", "top_entropy_quantile=1.0", "enabled=False"),
    ),
    Case(
        "a second clip",
        lambda path: train(path, delta=4.0),
        ValueError,
        ("delta=4.0", "is_clip", "delta=None", "enabled=False"),
    ),
    Case(
        "a mask of rows",
        lambda path: train(path, off_policy_mask_threshold=0.5),
        ValueError,
        ("off_policy_mask_threshold=0.5", "off-policy rows", "enabled=False"),
    ),
    Case(
        "importance weights of sequences",
        lambda path: train(path, importance_sampling_level="sequence"),
        ValueError,
        ("importance_sampling_level='sequence'", "whole sequences", "importance_sampling_level='token'"),
    ),
    Case(
        "rewards in the place of args",
        lambda path: SDPOTrainer(silent(), tiny.judge),
        TypeError,
        ("args", "GRPOConfig", "function", "reward_funcs=..."),
    ),
    Case("no model", lambda path: SDPOTrainer(args=tiny.arguments(path)), TypeError, ("model", "None")),
    Case("nothing trains", nothing_trains, ValueError, ("requires_grad", "nothing to train")),
    Case(
        "an argument that nobody takes",
        lambda path: SDPOTrainer(model=silent(), args=tiny.arguments(path), sdpo_cfg=SDPOConfig()),
        TypeError,
        ("SDPOTrainer", "'sdpo_cfg'", "did you mean sdpo_config?"),
    ),
    *(
        Case(
            f"another trainer's word, {name}",
            lambda path, name=name: SDPOTrainer(
                model=silent(), args=tiny.arguments(path), reward_funcs=tiny.judge, **{name: None}
            ),
            TypeError,
            ("SDPOTrainer", repr(name), "did you mean", *meant),
        )
        for name, *meant in (
            ("config", "sdpo_config", "args"),
            ("tokenizer", "processing_class"),
            ("training_args", "args"),
            ("dataset", "train_dataset"),
            ("reward_functions", "reward_funcs"),
        )
    ),
    Case(
        "a word that is like no other",
        lambda path: SDPOTrainer(model=silent(), args=tiny.arguments(path), zzz=1),
        TypeError,
        ("SDPOTrainer", "'zzz'", "expected one of", "'processing_class'", "'sdpo_config'", "'train_dataset'"),
    ),
]


@run(TRAINER)
def test_trainer(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_a_good_trainer_does_ask_the_model_to_generate(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [{"image": [None] * 8}, {"images": [[]] * 8}, {"audio": [None] * 8, "video": [[]] * 8}],
    ids=lambda columns: ", ".join(columns),
)
def test_columns_that_hold_no_media_are_accepted(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, train_dataset=tiny.conversations(**columns))


def test_arrays_are_media_and_empty_ones_are_not(tmp_path: Path) -> None:
    """Of an array of several numbers the truth cannot be asked."""
    for shape, refused in (((8, 3), True), ((8, 0), False)):
        data = tiny.conversations(image=torch.zeros(shape).tolist()).with_format(
            "numpy", columns=["image"], output_all_columns=True
        )
        with pytest.raises(
            ValueError if refused else AssertionError, match="image" if refused else "generate"
        ):
            train(tmp_path, train_dataset=data)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "bnpo"},
        {"loss_type": "sapo", "sapo_temperature_neg": 1.1},
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"mask_truncated_completions": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_shapes_the_replaced_objective_alone_is_accepted(tmp_path: Path, changes: Any) -> None:
    """Unsloth sets some of these by itself."""
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, **changes)


def test_terms_and_masks_are_grpo_s_when_disabled(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, sdpo_config=SDPOConfig(enabled=False), top_entropy_quantile=0.2, delta=4.0)


# --- reward functions, once they have spoken --------------------------------------------------------------


def returning(value: Any) -> Callable[[Path], None]:
    def badly_behaved(completions: list[Any], **_: Any) -> Any:
        return value(len(completions)) if callable(value) else value

    def make(path: Path) -> None:
        trainer = tiny.trainer(path, reward_funcs=badly_behaved)
        before = [p.clone() for p in trainer.model.parameters()]
        try:
            trainer.train()
        finally:
            assert all(map(torch.equal, before, trainer.model.parameters()))

    return make


def says(text: Any) -> Callable[[int], Any]:
    return lambda rows: [(0.0, text)] * rows


NAME = "'badly_behaved'"
REWARDS = [
    Case(
        "too few", returning(lambda rows: [0.0] * (rows - 1)), ValueError, (NAME, "7 items", "8 completions")
    ),
    Case(
        "too many", returning(lambda rows: [0.0] * (rows + 1)), ValueError, (NAME, "9 items", "8 completions")
    ),
    Case(
        "scores, and then texts",
        returning(lambda rows: ([0.0] * rows, ["why"] * rows)),
        ValueError,
        (NAME, "pair of lists", "one (score, feedback) pair per row", "list(zip(scores, texts))"),
    ),
    Case("none at all", returning(None), TypeError, (NAME, "NoneType", "one item per row")),
    Case("one number", returning(1.0), TypeError, (NAME, "float", "one item per row")),
    Case("a text", returning("12345678"), TypeError, (NAME, "str", "one item per row")),
    Case("a mapping", returning({"score": 1.0}), TypeError, (NAME, "dict", "one item per row")),
    Case("texts", returning(lambda rows: ["good"] * rows), TypeError, (NAME, "row 0", "a number", "'good'")),
    Case("feedback that is no text", returning(says(7)), TypeError, (NAME, "row 0", "string or None", "int")),
    Case(
        "triples",
        returning(lambda rows: [(1.0, "a", 2)] * rows),
        TypeError,
        (NAME, "row 0", "(score, feedback)"),
    ),
    Case(
        "pairs the wrong way round",
        returning(lambda rows: [("good", 1.0)] * rows),
        TypeError,
        (NAME, "row 0", "string or None", "float"),
    ),
    Case(
        "other keys",
        returning(lambda rows: [{"reward": 1.0}] * rows),
        ValueError,
        (NAME, "row 0", "'score'", "['reward']"),
    ),
    Case(
        "a key too many",
        returning(lambda rows: [{"score": 1.0, "feedbak": "x"}] * rows),
        ValueError,
        (NAME, "row 0", "'feedback'", "['feedbak', 'score']"),
    ),
]


@run(REWARDS)
def test_reward_functions(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_last_feedback_of_the_wrong_length(tmp_path: Path) -> None:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        judge.last_feedback = ["only one"]  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'judge\.last_feedback' returned 1 items for 8 completions"):
        tiny.trainer(tmp_path, reward_funcs=judge).train()


def test_outputs_are_not_returned(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="does not return outputs"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_a_group_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=1)

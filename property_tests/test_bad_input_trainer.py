"""Bad input of a trainer: refused as in test_bad_input.py, and before anything is sampled.

What a reward function returns is known later: it is refused before a weight is updated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from bad_input import Case, run
from datasets import Dataset, IterableDataset
from trl import GRPOConfig, GRPOTrainer

from sdpo_rl import SDPOConfig, SDPOTrainer

# --- the trainer ------------------------------------------------------------------------------------------


def without_generate(**changes: Any) -> Any:
    """A model that must not be asked to generate."""
    model = tiny.model(**changes)

    def generate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was asked to generate")

    model.generate = generate
    return model


def train(path: Path, **changes: Any) -> None:
    tiny.trainer(path, **{"start": without_generate(), **changes}).train()


def earlier_part(kind: str) -> Dataset:
    """A part of this type in the turn before the question."""
    parts = [{"type": kind, kind: "a"}], [{"type": "text", "text": "what is it?"}]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": part} for part in parts]] * 4})


def with_images(path: Path) -> None:
    """What TRL returns when a tool returned an image."""
    trainer = tiny.trainer(path)
    generate = GRPOTrainer._generate_and_score_completions

    def scored(inputs: Any) -> Any:
        return generate(trainer, inputs) | {"pixel_values": torch.zeros(1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: scored(inputs))
        trainer.train()


def ends_with(turn: dict[str, Any]) -> Dataset:
    return Dataset.from_dict({"prompt": [tiny.user("fine"), [*tiny.user("q"), turn]]})


def regrouped(path: Path) -> None:
    arguments = tiny.arguments(path)
    arguments.num_generations = 3
    SDPOTrainer(
        model=without_generate(),
        args=arguments,
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.judge,
        train_dataset=tiny.conversations(),
    )


def nothing_trains(path: Path) -> None:
    model = without_generate()
    model.requires_grad_(False)
    train(path, start=model)


def by_name(path: Path) -> None:
    tiny.model().save_pretrained(path / "model")
    train(path, start=str(path / "model"), sdpo_config=SDPOConfig(k=103))


def streamed(path: Path) -> None:
    rows = [{"prompt": [{"role": "assistant", "content": "a"}]}] * 8
    train(path, train_dataset=IterableDataset.from_generator(lambda: iter(rows)))


def streaming(data: Dataset) -> IterableDataset:
    """The rows of `data`, whose columns are not known before the first."""
    return IterableDataset.from_generator(lambda: iter(list(data)))


def build(path: Path, **changes: Any) -> None:
    """The constructor alone."""
    tiny.trainer(path, **{"start": without_generate(), **changes})


def no_dataset(path: Path) -> None:
    SDPOTrainer(
        model=without_generate(),
        args=tiny.arguments(path),
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.judge,
    )


QUESTIONS = Dataset.from_dict({"question": ["a"] * 8})


def questions() -> IterableDataset:
    """A stream whose columns are not known before the first row."""
    return IterableDataset.from_generator(lambda: iter(QUESTIONS))


TRAINER = [
    Case(
        "config of another kind",
        lambda path: train(path, sdpo_config={"alpha": 1.0}),
        TypeError,
        ("sdpo_config", "SDPOConfig", "dict"),
    ),
    Case(
        "k beyond the vocabulary",
        lambda path: train(path, sdpo_config=SDPOConfig(k=103)),
        ValueError,
        ("k: expected at most 102", "got 103", "lower it"),
    ),
    Case("k beyond the vocabulary of a model by name", by_name, ValueError, ("k", "103", "102")),
    Case("no dataset", no_dataset, ValueError, ("train_dataset",)),
    Case(
        "empty dataset",
        lambda path: train(path, train_dataset=tiny.conversations(0)),
        ValueError,
        ("train_dataset: expected at least one row", "empty", "add rows"),
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
        ("train_dataset", "prompt 1", "'assistant'", "expected a 'user' turn"),
    ),
    Case(
        "ends with the system",
        lambda path: train(path, eval_dataset=ends_with({"role": "system", "content": "a"})),
        ValueError,
        ("eval_dataset", "prompt 1", "'system'", "expected a 'user' turn"),
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
            f"{kind} in an earlier turn",
            lambda path, kind=kind: train(path, train_dataset=earlier_part(kind)),
            ValueError,
            ("train_dataset", "prompt 0", "expected text in every turn", f"type {kind}", "remove the row"),
        )
        for kind in ("image", "image_url", "audio", "video")
    ),
    Case(
        "images from a tool",
        with_images,
        ValueError,
        ("rollout: expected text", "got images (pixel_values)", "return text", "enabled=False"),
    ),
    *(
        Case(
            f"{name}, before the training",
            lambda path, name=name: tiny.trainer(
                path,
                start=without_generate(),
                train_dataset=tiny.conversations(4, **{name: [None, "cat", None, None]}),
            ),
            ValueError,
            ("train_dataset", "expected text", f"rows with {name},", "drop the column", "enabled=False"),
        )
        for name in ("image", "images", "audio", "video")
    ),
    Case(
        "images of an evaluation",
        lambda path: tiny.trainer(
            path,
            start=without_generate(),
            eval_dataset=tiny.conversations(4, images=[[], ["cat.png"], [], []]),
        ),
        ValueError,
        ("eval_dataset", "expected text", "rows with images,"),
    ),
    Case(
        "images, row by row",
        lambda path: train(
            path, train_dataset=tiny.conversations(8, image=["cat.png"] * 8).to_iterable_dataset()
        ),
        ValueError,
        ("prompt: expected text", "rows with image,", "drop the column"),
    ),
    Case(
        "neither a pad token nor an end",
        lambda path: build(path, processing_class=tiny.tokenizer(pad_token=None, eos_token=None)),
        ValueError,
        ("processing_class", "pad token", "end-of-sequence token", "set `tokenizer.pad_token`"),
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
        ("generation_batch_size", "num_generations (3)", "got 8", "per_device_train_batch_size"),
    ),
    Case(
        "more demonstrations than peers",
        lambda path: build(path, sdpo_config=tiny.config(num_demonstrations=4)),
        ValueError,
        ("num_demonstrations: expected at most 3", "of 4 completions", "got 4", "num_generations"),
    ),
    Case(
        "more demonstrations than completions",
        lambda path: build(
            path, sdpo_config=tiny.config(num_demonstrations=5, dont_reprompt_on_self_success=False)
        ),
        ValueError,
        ("num_demonstrations: expected at most 4", "got 5"),
    ),
    *(
        Case(
            f"temperature {value}",
            lambda path, value=value: build(path, temperature=value),
            ValueError,
            ("temperature: expected a finite number > 0", f"got {value}", "set 1.0"),
        )
        for value in (float("inf"), float("nan"))
    ),
    Case(
        "fewer prompts than a generation batch",
        lambda path: build(path, train_dataset=tiny.conversations(3), steps_per_generation=2),
        ValueError,
        (
            "train_dataset: expected at least 4 prompts",
            "generation_batch_size=16 / num_generations=4",
            "got 3",
            "raise num_generations",
            "steps_per_generation",
        ),
    ),
    Case(
        "a stream with fewer prompts than a generation batch",
        lambda path: train(path, train_dataset=tiny.conversations(1).to_iterable_dataset()),
        ValueError,
        ("train_dataset: expected enough prompts for one batch", "got a pass without any", "add prompts"),
    ),
    Case(
        "fewer prompts than an evaluation batch that must be full",
        lambda path: build(path, eval_dataset={"a": tiny.conversations(1)}, dataloader_drop_last=True),
        ValueError,
        (
            "eval_dataset['a']: expected at least 2 prompts",
            "8 completions, 4 per prompt",
            "got 1",
            "dataloader_drop_last=False",
        ),
    ),
    Case(
        "an evaluation without a batch",
        lambda path: tiny.trainer(path, start=without_generate(), dataloader_drop_last=True).evaluate(
            tiny.conversations(1)
        ),
        ValueError,
        ("eval_dataset: expected enough prompts for one batch", "got a pass without any"),
    ),
    Case(
        "a stream whose columns are known, without prompts",
        lambda path: build(path, train_dataset=QUESTIONS.to_iterable_dataset()),
        ValueError,
        ("train_dataset: expected a column 'prompt'", "['question']", "rename"),
    ),
    *(
        Case(
            f"a stream whose columns are not known, without prompts: {name}",
            use,
            ValueError,
            ("dataset: expected rows with a 'prompt'", "got one with ['question']", "rename the column"),
        )
        for name, use in (
            ("training", lambda path: train(path, train_dataset=questions())),
            (
                "evaluation",
                lambda path: tiny.trainer(
                    path, start=without_generate(), eval_dataset=questions()
                ).evaluate(),
            ),
        )
    ),
    Case(
        "no temperature",
        lambda path: build(path, temperature=0.0),
        ValueError,
        ("temperature: expected a finite number > 0", "got 0.0", "set 1.0"),
    ),
    Case(
        "kernels on a CPU",
        lambda path: build(path, sdpo_config=tiny.config(loss_backend="triton")),
        ValueError,
        ("loss_backend", "'triton'", "'auto'"),
    ),
    Case(
        "an empty prompt",
        lambda path: build(path, train_dataset=Dataset.from_dict({"prompt": ["fine", ""]})),
        ValueError,
        ("train_dataset: prompt 1", "non-empty string", "remove the row"),
    ),
    Case(
        "two columns of feedback",
        lambda path: build(
            path, train_dataset=tiny.conversations(feedback=["a"] * 8, privileged_context=["b"] * 8)
        ),
        ValueError,
        ("train_dataset: feedback", "one column", "feedback and privileged_context", "drop"),
    ),
    Case(
        "two columns of feedback, row by row",
        lambda path: train(
            path,
            train_dataset=tiny.conversations(
                feedback=["a"] * 8, privileged_context=["b"] * 8
            ).to_iterable_dataset(),
        ),
        ValueError,
        ("feedback: expected one column", "feedback and privileged_context", "drop"),
    ),
    Case(
        "a model that is none",
        lambda path: SDPOTrainer(model={}, args=tiny.arguments(path)),
        TypeError,
        ("model", "a model's name", "dict"),
    ),
    Case(
        "a reward that cannot be called",
        lambda path: train(path, reward_funcs=[tiny.judge, 3.0]),
        TypeError,
        ("reward_funcs[1]", "a function", "float"),
    ),
    Case(
        "no reward as an item",
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
    *(
        Case(
            f"a column {name}{how}",
            lambda path, name=name, change=change, run=run: run(
                path, train_dataset=change(tiny.conversations(**{name: ["a"] * 8}))
            ),
            ValueError,
            ("columns that reward functions can take as keywords", f"got {name},", "rename"),
        )
        for name in ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
        for how, change, run in (("", lambda data: data, build), (", row by row", streaming, train))
    ),
    Case(
        "a column completions of an evaluation",
        lambda path: build(path, eval_dataset={"held": tiny.conversations(completions=["a"] * 8)}),
        ValueError,
        ("eval_dataset['held']", "completions", "rename"),
    ),
    Case(
        "unknown functions of success",
        lambda path: build(
            path,
            reward_funcs=[tiny.judge, tiny.parity],
            sdpo_config=tiny.config(success_reward_funcs=["parity", "correct"]),
        ),
        ValueError,
        ("success_reward_funcs", "['judge', 'parity']", "got 'correct'", "none of them", "rename"),
    ),
    Case(
        "two functions of success with one name",
        lambda path: build(
            path,
            reward_funcs=[tiny.judge, tiny.judge],
            sdpo_config=tiny.config(success_reward_funcs=["judge"]),
        ),
        ValueError,
        ("success_reward_funcs", "got 'judge'", "2 of them have", "rename"),
    ),
    Case(
        "lora_ema without adapters",
        lambda path: train(path, sdpo_config=tiny.config(teacher_mode="lora_ema")),
        ValueError,
        ("teacher_mode='lora_ema'", "adapters", "got none", "peft_config", "teacher_mode='ema'"),
    ),
    Case(
        "a KL term that would be dropped",
        lambda path: train(path, beta=0.04),
        ValueError,
        ("beta: expected 0.0", "got 0.04", "KL penalty", "grpo_weight", "enabled=False"),
    ),
    Case(
        "a loss type that TRL does not have",
        lambda path: train(path, loss_type="gspo", sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("loss_type: expected one of", "got 'gspo'", "'vespo'"),
    ),
    Case(
        "a level of the importance weights that TRL does not have",
        lambda path: train(path, importance_sampling_level="row", sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("importance_sampling_level: expected 'token' or 'sequence'", "got 'row'"),
    ),
    Case(
        "a largest ratio of 0",
        lambda path: train(path, delta=0.0, sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("delta: expected a number > 0", "got 0.0", "4.0"),
    ),
    Case(
        "more than all tokens",
        lambda path: train(path, top_entropy_quantile=1.5, sdpo_config=tiny.config(routing="srpo")),
        ValueError,
        ("top_entropy_quantile: expected a number in [0, 1]", "got 1.5", "1.0 for all"),
    ),
    Case(
        "a largest ratio below 1",
        lambda path: train(path, loss_type="cispo", sdpo_config=tiny.config(routing="srpo")),
        ValueError,
        ("epsilon_high: expected at least 1 with loss_type='cispo'", "got 0.2", "5.0"),
    ),
    Case(
        "a GRPO part in a step over two generation batches",
        lambda path: train(
            path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            steps_per_generation=2,
            sdpo_config=tiny.config(grpo_weight=0.5),
        ),
        ValueError,
        (
            "steps_per_generation: expected a multiple of gradient_accumulation_steps (4)",
            "got 2",
            "change one",
        ),
    ),
    Case(
        "an entropy bonus that would be dropped",
        lambda path: train(path, entropy_coef=0.01),
        ValueError,
        ("entropy_coef", "got 0.01", "entropy bonus", "enabled=False"),
    ),
    Case(
        "a loss on some tokens alone",
        lambda path: train(path, top_entropy_quantile=0.2),
        ValueError,
        ("top_entropy_quantile", "got 0.2", "highest entropy", "top_entropy_quantile=1.0", "enabled=False"),
    ),
    Case(
        "a second clip",
        lambda path: train(path, delta=4.0),
        ValueError,
        ("delta: expected None", "got 4.0", "is_clip", "delta=None", "enabled=False"),
    ),
    Case(
        "a mask of rows",
        lambda path: train(path, off_policy_mask_threshold=0.5),
        ValueError,
        ("off_policy_mask_threshold", "got 0.5", "off-policy rows", "enabled=False"),
    ),
    Case(
        "importance weights of sequences",
        lambda path: train(path, importance_sampling_level="sequence"),
        ValueError,
        (
            "importance_sampling_level",
            "got 'sequence'",
            "whole sequences",
            "importance_sampling_level='token'",
        ),
    ),
    Case(
        "rewards as args",
        lambda path: SDPOTrainer(without_generate(), tiny.judge, tiny.judge),
        TypeError,
        ("args: expected a GRPOConfig", "got function", "(model, reward_funcs, args, train_dataset)"),
    ),
    Case(
        "args as rewards",
        lambda path: SDPOTrainer(without_generate(), tiny.arguments(path), tiny.judge),
        TypeError,
        ("reward_funcs[0]: expected a function", "GRPOConfig", "(model, reward_funcs, args, train_dataset)"),
    ),
    Case("no model", lambda path: SDPOTrainer(args=tiny.arguments(path)), TypeError, ("model", "None")),
    Case(
        "nothing trains",
        nothing_trains,
        ValueError,
        ("model: expected trainable parameters", "requires_grad", "unfreeze"),
    ),
    Case(
        "an argument that nobody takes",
        lambda path: SDPOTrainer(model=without_generate(), args=tiny.arguments(path), sdpo_cfg=SDPOConfig()),
        TypeError,
        ("SDPOTrainer", "'sdpo_cfg'", "expected sdpo_config"),
    ),
    *(
        Case(
            f"another trainer's name, {name}",
            lambda path, name=name: SDPOTrainer(
                model=without_generate(), args=tiny.arguments(path), reward_funcs=tiny.judge, **{name: None}
            ),
            TypeError,
            ("SDPOTrainer", repr(name), "expected", *meant),
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
        "a name like no other",
        lambda path: SDPOTrainer(model=without_generate(), args=tiny.arguments(path), zzz=1),
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


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompts_of_one_generation_batch_are_enough(tmp_path: Path, stream: bool) -> None:
    prompts = tiny.conversations(4)
    settings: Any = {"steps_per_generation": 2, "max_steps": 1, "eval_dataset": tiny.conversations(1)}
    trainer = tiny.trainer(
        tmp_path, train_dataset=prompts.to_iterable_dataset() if stream else prompts, **settings
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.evaluate()["eval_loss"] >= 0


@pytest.mark.parametrize(
    "columns",
    [{"image": [None] * 8}, {"images": [[]] * 8}, {"audio": [None] * 8, "video": [[]] * 8}],
    ids=lambda columns: ", ".join(columns),
)
def test_columns_that_hold_no_media_are_accepted(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, train_dataset=tiny.conversations(**columns))


def test_arrays_are_media_and_empty_ones_are_not(tmp_path: Path) -> None:
    """An array of several numbers has no truth value."""
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


# --- what reward functions return -------------------------------------------------------------------------


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


def returns_text(text: Any) -> Callable[[int], Any]:
    return lambda rows: [(0.0, text)] * rows


NAME = "'badly_behaved'"
REWARDS = [
    Case(
        "too few",
        returning(lambda rows: [0.0] * (rows - 1)),
        ValueError,
        (NAME, "expected 8 items", "got 7 items"),
    ),
    Case(
        "too many",
        returning(lambda rows: [0.0] * (rows + 1)),
        ValueError,
        (NAME, "expected 8 items", "got 9 items"),
    ),
    Case(
        "scores, and then texts",
        returning(lambda rows: ([0.0] * rows, ["why"] * rows)),
        ValueError,
        (NAME, "pair of lists", "one (score, feedback) pair per row", "list(zip(scores, texts))"),
    ),
    Case(
        "infinite",
        returning(lambda rows: [0.0] * (rows - 1) + [float("inf")]),
        ValueError,
        (NAME, "row 7", "a finite score", "got inf", "clip it"),
    ),
    Case("none at all", returning(None), TypeError, (NAME, "NoneType", "one item per row")),
    Case("one number", returning(1.0), TypeError, (NAME, "float", "one item per row")),
    Case("a text", returning("12345678"), TypeError, (NAME, "str", "one item per row")),
    Case("a mapping", returning({"score": 1.0}), TypeError, (NAME, "dict", "one item per row")),
    Case("texts", returning(lambda rows: ["good"] * rows), TypeError, (NAME, "row 0", "a number", "'good'")),
    Case(
        "feedback that is no text",
        returning(returns_text(7)),
        TypeError,
        (NAME, "row 0", "string or None", "int"),
    ),
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


@pytest.mark.parametrize("name", ["prompts", "completions", "environments"])
def test_columns_that_no_reward_function_gets_are_accepted(tmp_path: Path, name: str) -> None:
    data = tiny.conversations(**{name: ["a"] * 8})
    tiny.trainer(tmp_path, train_dataset=data, remove_unused_columns=True, max_steps=1).train()
    if name == "environments":  # TRL has none to pass
        tiny.trainer(tmp_path, train_dataset=data, max_steps=1).train()
    trainer = SDPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path, max_steps=1),
        processing_class=tiny.tokenizer(),
        reward_funcs=RewardModel(1.0),
        reward_processing_classes=tiny.tokenizer(),
        train_dataset=data,
    )
    trainer.train()


class RewardModel(torch.nn.Module):
    """Gives every completion the same reward."""

    def __init__(self, reward: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(_name_or_path="org/judge-model")
        self.reward = torch.nn.Parameter(torch.tensor(reward))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.reward.expand(len(input_ids), 1))


@pytest.mark.parametrize("reward", [float("inf"), -float("inf")])
def test_an_infinite_reward_of_a_reward_model_is_refused(tmp_path: Path, reward: float) -> None:
    trainer = SDPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path),
        processing_class=tiny.tokenizer(),
        reward_funcs=[tiny.judge, RewardModel(reward)],
        reward_processing_classes=[None, tiny.tokenizer()],
        train_dataset=tiny.conversations(),
    )
    with pytest.raises(ValueError, match=f"'judge-model': expected finite rewards, got {reward}; clip"):
        trainer.train()


def test_an_infinite_sum_of_rewards_is_refused(tmp_path: Path) -> None:
    def large(completions: list[Any], **_: Any) -> list[float]:
        return [3e38] * len(completions)

    with pytest.raises(ValueError, match=r"reward_weights: expected a finite sum.*of large, parity, got"):
        tiny.trainer(tmp_path, reward_funcs=[large, tiny.parity], reward_weights=[10.0, 1.0]).train()


def test_what_is_not_judged_is_not_infinite(tmp_path: Path) -> None:
    def partly(completions: list[Any], **_: Any) -> list[Any]:
        return [(None, float("nan"), 1.0, 0.0)[row % 4] for row in range(len(completions))]

    def never(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = tiny.trainer(tmp_path, reward_funcs=[partly, never])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["self_distillation/best_score"] == 1.0 for entry in logged)
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in logged)


def test_last_feedback_of_the_wrong_length(tmp_path: Path) -> None:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        judge.last_feedback = ["only one"]  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'judge\.last_feedback': expected 8 items.*got 1 items"):
        tiny.trainer(tmp_path, reward_funcs=judge).train()


def test_outputs_are_not_returned(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="expected return_outputs=False"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_a_group_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=1)

"""Bad data of a trainer: refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bad_input import Case, run
from bad_trainer_input import build, streaming, train, without_generate
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from sdpo_rl import SDPOTrainer


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


def streamed(path: Path) -> None:
    rows = [{"prompt": [{"role": "assistant", "content": "a"}]}] * 8
    train(path, train_dataset=IterableDataset.from_generator(lambda: iter(rows)))


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


DATA = [
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
        ("train_dataset", "prompt 1", "'assistant'", "expected a 'user' or 'tool' turn at the end"),
    ),
    Case(
        "ends with the system",
        lambda path: train(path, eval_dataset=ends_with({"role": "system", "content": "a"})),
        ValueError,
        ("eval_dataset", "prompt 1", "'system'", "expected a 'user' or 'tool' turn at the end"),
    ),
    Case(
        "a tool's result without a question",
        lambda path: train(
            path, train_dataset=Dataset.from_dict({"prompt": [[{"role": "tool", "content": "7"}]]})
        ),
        ValueError,
        ("train_dataset", "prompt 0", "expected a 'user' turn, into which", "'tool'", "add one"),
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
            ("train_dataset", "prompt 0", "expected text in every turn", f"type {kind}", "leave them out"),
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
]


@run(DATA)
def test_data(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


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

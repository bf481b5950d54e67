"""What users of GRPO expect, and what the trainer promises besides its loss."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import tiny
import torch
import trl
from datasets import Dataset
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from reference_step import Method, Recorder, ReferenceStep, trainable
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import integration_utils

import sdpo_rl
from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.step import batch as step_batch
from sdpo_rl.step import runner

FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
PREFIX = "self_distillation/"


def texts(completions: list[Any]) -> list[str]:
    return [tiny.text_of(completion) for completion in completions]


def never(completions: list[Any], **_: Any) -> list[float]:
    """No success and no feedback."""
    return [0.0 for _ in completions]


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# --- GRPO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_disabled_is_grpo(tmp_path: Path, loss_type: str, split: dict[str, Any]) -> None:
    """On-policy the ratio is 1, and the loss −A·log p: a mean per row and then over rows, or over all tokens."""
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(enabled=False),
        loss_type=loss_type,
        temperature=0.8,
        max_steps=3,
        **split,
    )
    recorder = Recorder(trainer)
    trainer.train()
    model = tiny.model()
    for step in recorder.steps:
        model.load_state_dict(step.before, strict=False)
        per_row = []
        for row in step.rows:
            rewards = torch.tensor([tiny.score(r.text) for r in (row, *row.peers)])
            advantage = (rewards[0] - rewards.mean()) / (rewards.std() + 1e-4)
            ids = torch.tensor([row.prompt_ids + row.completion])
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1] / 0.8
            log_probs = logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])
            per_row.append(-advantage * log_probs.flatten())
        by_row = torch.stack([row.mean() for row in per_row]).mean()
        loss = by_row if loss_type == "grpo" else torch.cat(per_row).mean()
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for name, gradient in zip(named, gradients, strict=True):
            assert (gradient - step.gradients[name]).norm() < 1e-5 * norm, name


def test_disabled_logs_nothing_of_sdpo_and_needs_no_signal(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=SDPOConfig(enabled=False, k=10**6),
        num_iterations=2,
        beta=0.0,
        eval_dataset=tiny.conversations(2),
    )
    trainer.train()
    trainer.evaluate()
    assert not [name for entry in trainer.state.log_history for name in entry if PREFIX in name]
    assert logs(trainer, "entropy")
    assert logs(trainer, "rewards/judge/mean")


# --- records of a run: model card and trackers ------------------------------------------------------------

AUTHORS = (
    "botter, Jonas", "beck, Frederike", "Behric, Lejs", "Baumann, Anton", "Bagatella, Marco", "Marta, Daniel",
    "Hakimi, Ido", "Shenfeld, Idan", "Kleine Buening, Thomas", "Guestrin, Carlos", "Krause, Andreas",
)  # fmt: skip


def test_the_model_card_has_the_paper_the_options_and_the_version(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(alpha=0.25), save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    paper = "[Reinforcement Learning via Self-Distillation](https://huggingface.co/papers/2601.20802)"
    assert f"trained with SDPO, a method introduced in {paper}" in card
    assert "Cite SDPO as:" in card
    assert "eprint        = {2601.20802}" in card
    assert [author for author in AUTHORS if author not in card] == []
    assert "DeepSeekMath" not in card
    assert f"Trained with SDPO-RL {sdpo_rl.__version__}" in card
    options = json.loads(card.rpartition("```json")[2].partition("```")[0])
    assert SDPOConfig(**options) == trainer.sdpo_config
    assert card.count("## SDPO options") == 1
    assert "- sdpo" in card.partition("# Model Card")[0]


def test_the_model_card_of_grpo_is_that_of_trl(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path / "ours", sdpo_config=tiny.config(enabled=False))
    theirs = trl.GRPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path / "theirs"),
        processing_class=tiny.tokenizer(),
        reward_funcs=tiny.parity,
        train_dataset=tiny.conversations(),
    )
    cards = []
    for one in (trainer, theirs):
        one.args.output_dir = str(tmp_path)
        tmp_path.mkdir(exist_ok=True)
        one.create_model_card(model_name="m")
        cards.append(sorted((tmp_path / "README.md").read_text().splitlines()))  # tags are a set
    assert cards[0] == cards[1]
    assert any("DeepSeekMath" in line for line in cards[0])


class Tracker(TrainerCallback):
    """Logs the arguments of a run as the callbacks of transformers do, when it starts."""

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}

    def start(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.logged:
            self.logged = {**args.to_dict()}
            assert json.loads(args.to_json_string()).keys() == self.logged.keys()
            assert args.to_sanitized_dict().keys() >= self.logged.keys()

    on_train_begin = on_log = start


class Writer:
    """What TensorBoard's callback needs of a writer."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def add_text(self, name: str, text: str) -> None:
        self.texts[name] = text

    def nothing(self, *_: Any, **__: Any) -> None:
        return None

    add_scalar = flush = close = nothing


def expected_of_trackers(trainer: Any) -> dict[str, Any]:
    options = dataclasses.asdict(trainer.sdpo_config)
    return {"sdpo_rl_version": sdpo_rl.__version__} | {
        f"sdpo_{name}": value for name, value in options.items()
    }


@pytest.mark.parametrize("late", [False, True], ids=["given", "added later"])
@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_trackers_log_the_options(tmp_path: Path, late: bool, use: str) -> None:
    tracker = Tracker()
    trainer = tiny.trainer(
        tmp_path,
        callbacks=None if late else [tracker],
        eval_dataset=tiny.conversations(2),
        save_strategy="steps",
        save_steps=1,
    )
    plain = trainer.args.to_dict()
    if late:
        trainer.add_callback(tracker)
    getattr(trainer, use)()
    assert tracker.logged == {**plain, **expected_of_trackers(trainer)}
    # The arguments themselves, which a checkpoint contains, stay as they were.
    assert trainer.args.to_dict() == plain
    if use == "train":
        saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
        assert saved.to_dict() == plain


def test_tensorboard_logs_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    writer = Writer()
    callback = integration_utils.TensorBoardCallback(writer)
    trainer = tiny.trainer(tmp_path, callbacks=[callback], max_steps=1)
    trainer.train()
    assert expected_of_trackers(trainer).items() <= json.loads(writer.texts["args"]).items()


def test_trackers_of_grpo_log_what_trl_gives_them(tmp_path: Path) -> None:
    tracker = Tracker()
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False), callbacks=[tracker], max_steps=1)
    trainer.train()
    assert tracker.logged == trainer.args.to_dict()


def test_the_options_of_a_trainer_cannot_be_exchanged_or_changed(tmp_path: Path) -> None:
    config = tiny.config(apply_chat_template_kwargs={"tag": "a"})
    trainer = tiny.trainer(tmp_path, sdpo_config=config)
    config.apply_chat_template_kwargs["tag"] = "b"
    assert trainer.sdpo_config.template_kwargs == {"tag": "a"}
    with pytest.raises(AttributeError, match="sdpo_config"):
        trainer.sdpo_config = config
    with pytest.raises(AttributeError, match="alpha: expected no change"):
        trainer.sdpo_config.alpha = 0.1


def test_it_is_a_grpo_trainer(tmp_path: Path) -> None:
    assert isinstance(tiny.trainer(tmp_path), trl.GRPOTrainer)


def test_the_positional_order_is_that_of_grpo(tmp_path: Path) -> None:
    ours, theirs = (list(inspect.signature(cls).parameters) for cls in (SDPOTrainer, trl.GRPOTrainer))
    positional = ours[: ours.index("sdpo_config")]
    assert positional == theirs[: len(positional)]
    assert positional[-1] == "optimizers"
    assert inspect.signature(SDPOTrainer).parameters["sdpo_config"].kind is inspect.Parameter.KEYWORD_ONLY
    optimizer = torch.optim.SGD(tiny.model().parameters())
    given = (
        tiny.model(), tiny.judge, tiny.arguments(tmp_path), tiny.conversations(4), tiny.conversations(8),
        tiny.tokenizer(), None, [ProgressCallback()], (optimizer, None),
    )  # fmt: skip
    trainer = SDPOTrainer(*given, sdpo_config=tiny.config(k=3))
    assert trainer.args is given[2]
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (4, 8)
    assert trainer.processing_class is given[5]
    assert trainer.optimizer is optimizer
    assert trainer.sdpo_config.k == 3
    assert [reward.__name__ for reward in trainer.reward_funcs] == ["judge"]
    with pytest.raises(TypeError, match="reward_funcs"):
        SDPOTrainer(tiny.model(), tiny.arguments(tmp_path))
    with pytest.raises(TypeError, match="args"):
        SDPOTrainer(tiny.model(), tiny.judge, tiny.config())


@pytest.mark.parametrize("fused", [True, False])
def test_lora_layers_have_the_forward_of_peft_where_the_fused_one_is_off(tmp_path: Path, fused: bool) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(fused_lora_forward=fused),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        max_steps=1,
    )
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("q_proj"))
    replaced: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda *_: replaced.append("forward" in vars(layer)))
    trainer.train()
    assert any(replaced) == fused
    assert "forward" not in vars(layer)


def test_a_trainer_patched_too_late_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "GRPOTrainer", type("Patched", (trl.GRPOTrainer,), {}))
    with pytest.raises(RuntimeError, match=r"(?s)patched after.*PatchFastRL.*from sdpo_rl import"):
        tiny.trainer(tmp_path)


# --- constructor ------------------------------------------------------------------------------------------


def test_a_model_by_its_name(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    assert tokenizer("a{}\n<user>")["input_ids"] == [tiny.VOCABULARY.index(t) for t in [*"a{}\n", "<user>"]]
    trainer = tiny.trainer(tmp_path / "out", start=str(tmp_path / "model"), processing_class=tokenizer)
    trainer.train()
    counter_example = tiny.trainer(tmp_path / "counter-example")
    counter_example.train()
    assert same(trainable(trainer.model), trainable(counter_example.model))


def test_the_same_seed_is_the_same_run_and_another_is_another(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, torch.Tensor]:
        trainer = tiny.trainer(
            tmp_path / name,
            sdpo_config=tiny.config(demonstration_policy="random"),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            seed=seed,
            **FOUR,
        )
        trainer.train()
        return trainable(trainer.model)

    first, second, other = run("a", 7), run("b", 7), run("c", 8)
    assert same(first, second)
    assert not same(first, other)


def test_callbacks_are_called(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["step"] += 1

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen["divergence"] += f"{PREFIX}divergence" in logs

    tiny.trainer(tmp_path, callbacks=[Watch()], max_steps=3).train()
    assert seen == {"step": 3, "divergence": 3}


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 4, 2])
def test_evaluation_is_the_mean_divergence_and_changes_no_weight(tmp_path: Path, rows: int) -> None:
    trainer = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.conversations(4),
        num_generations_eval=2,
        per_device_eval_batch_size=rows,
    )
    recorder = Recorder(trainer)
    by_batch: list[float] = []
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        by_batch.append(loss.item())
        return loss

    trainer.compute_loss = watched
    before, teacher = trainable(trainer.model), dict(trainer._teacher.state.params)
    result = trainer.evaluate()
    reference = ReferenceStep(tiny.model(), Method())
    assert len(recorder.evaluated) == 8
    assert all(len(row.peers) == 1 for row in recorder.evaluated)
    loss, _ = reference.step(recorder.evaluated, stale=False)
    assert result["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert result[f"eval_{PREFIX}divergence"] == pytest.approx(loss, rel=1e-5)
    # Batches differ in their tokens, so the mean of their means differs.
    assert len(by_batch) == 8 // rows
    assert (sum(by_batch) / len(by_batch) == pytest.approx(loss, rel=1e-4)) == (rows == 8)
    assert same(before, trainable(trainer.model))
    assert same(teacher, trainer._teacher.state.params)
    assert trainer._teacher.state.ticks == 0
    assert not trainer.model.training or trainer.train()


def test_evaluation_without_a_signal_is_zero(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=never, eval_dataset=tiny.conversations(4))
    result = trainer.evaluate()
    assert result["eval_loss"] == 0.0
    assert "test_loss" not in result
    assert trainer.predict(tiny.conversations(4)).metrics["test_loss"] == 0.0
    assert result[f"eval_{PREFIX}empty_target_batch"] == 1.0


# --- feedback ---------------------------------------------------------------------------------------------


def feedback_on(text: str) -> str | None:
    """Feedback that names its completion; none for some."""
    return f"about [{text}]{{x}}" if len(text) % 3 else None


def pairs(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, feedback_on(text)) for text in texts(completions)]


def mappings(completions: list[Any], **_: Any) -> list[Any]:
    return [{"score": 0.0, "feedback": feedback_on(text)} for text in texts(completions)]


def not_applicable(completions: list[Any], **_: Any) -> list[Any]:
    return [(None, feedback_on(text)) for text in texts(completions)]


def mixed(completions: list[Any], **_: Any) -> list[Any]:
    return [0.0 if feedback_on(text) is None else (0.0, feedback_on(text)) for text in texts(completions)]


async def later(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, feedback_on(text)) for text in texts(completions)]


class WithLastFeedback:
    """Returns floats, and has the texts in an attribute."""

    last_feedback: list[str | None]

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        self.last_feedback = [feedback_on(text) for text in texts(completions)]
        return [0.0] * len(completions)


def first_half(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, (feedback_on(text) or "")[: len(text) // 2]) for text in texts(completions)]


FEEDBACK_SOURCES: dict[str, tuple[Callable[[], Any], Callable[[str], str | None]]] = {
    "pairs": (lambda: pairs, feedback_on),
    "mappings": (lambda: mappings, feedback_on),
    "no score": (lambda: [not_applicable, never], feedback_on),
    "mixed": (lambda: mixed, feedback_on),
    "async": (lambda: later, feedback_on),
    "attribute": (WithLastFeedback, feedback_on),
    "beside a function without feedback": (lambda: [never, pairs], feedback_on),
    "two functions with feedback": (
        lambda: [pairs, mappings],
        lambda text: None if feedback_on(text) is None else f"{feedback_on(text)}\n\n{feedback_on(text)}",
    ),
    "floats": (lambda: never, lambda text: None),
}


def feedback_of(ids: list[int], marker: str = "earlier attempt:\n\n") -> str | None:
    """The feedback in a teacher's prompt."""
    text = "".join(tiny.VOCABULARY[i] for i in ids)
    return text.split(marker)[1].split("\n\nCorrectly solve")[0] if marker in text else None


@pytest.mark.parametrize("name", FEEDBACK_SOURCES)
def test_feedback_reaches_its_row_and_the_table(tmp_path: Path, name: str) -> None:
    make, expected = FEEDBACK_SOURCES[name]
    trainer = tiny.trainer(tmp_path, reward_funcs=make(), log_completions=True, max_steps=1, **FOUR)
    recorder = Recorder(trainer)
    contexts: list[list[int]] = []

    def watch(output: dict[str, Any], batch: Any) -> None:
        for ids, mask in zip(output["teacher_prompt_ids"], output["teacher_prompt_mask"], strict=True):
            contexts.append(ids[mask.bool()].tolist())

    recorder._alter = watch
    trainer.train()
    assert [feedback_of(ids) for ids in contexts] == [expected(row.text) for row in recorder.rows]
    table = pandas.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    shown = table["feedback"] if "feedback" in table else [None] * len(table)
    for completion, text in zip(table["completion"], shown, strict=True):
        assert (text if isinstance(text, str) else None) == expected(tiny.text_of(list(completion)))


def test_a_dataset_column_is_used_for_rows_without_live_feedback(tmp_path: Path) -> None:
    data = tiny.conversations(8, feedback=[f"static {i}" if i % 2 else None for i in range(8)])
    trainer = tiny.trainer(tmp_path, reward_funcs=pairs, train_dataset=data, max_steps=4)
    recorder = Recorder(trainer)
    checked = Counter()

    def watch(output: dict[str, Any], batch: Any) -> None:
        for row, ids, mask in zip(
            batch, output["teacher_prompt_ids"], output["teacher_prompt_mask"], strict=True
        ):
            number = int(row.prompt[-1]["content"].split()[-1])
            static = f"static {number}" if number % 2 else None
            expected = feedback_on(row.text) or static
            assert feedback_of(ids[mask.bool()].tolist()) == expected
            checked["live" if feedback_on(row.text) else static is not None] += 1

    recorder._alter = watch
    trainer.train()
    assert checked.keys() == {"live", True, False}


def test_the_table_stays_aligned_when_a_batch_has_no_feedback(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes_feedback(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        if len(calls) in (1, 4):
            return [(0.0, "about " + text) for text in texts(completions)]
        return [0.0 for _ in completions]

    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=sometimes_feedback,
        log_completions=True,
        max_steps=4,
        eval_dataset=tiny.conversations(1),
        per_device_eval_batch_size=4,
    )
    trainer.evaluate()
    trainer.train()
    for path in (tmp_path / "completions").glob("*.parquet"):
        table = pandas.read_parquet(path)
        for completion, text in zip(table["completion"], table["feedback"], strict=True):
            assert not isinstance(text, str) or text == "about " + tiny.text_of(list(completion))


def own_column(completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
    """Writes a column of the same name as this library's."""
    log_extra("feedback", ["mine: " + text for text in texts(completions)])
    return [0.0] * len(completions)


def later_column(completions: list[Any], log_extra: Any, trainer_state: Any, **given: Any) -> list[float]:
    """Writes that column from the second batch on."""
    if trainer_state.global_step:
        return own_column(completions, log_extra, **given)
    return [0.0] * len(completions)


def feedback(completions: list[Any], **_: Any) -> list[float]:
    """Has the name of that column."""
    return [float(len(text)) for text in texts(completions)]


def completions_tables(path: Path, functions: list[Any], enabled: bool) -> list[Any]:
    """Of three batches; each with its texts."""
    trainer = tiny.trainer(
        path,
        sdpo_config=tiny.config(enabled=enabled),
        reward_funcs=functions,
        log_completions=True,
        max_steps=3,
        eval_dataset=tiny.conversations(1),
        per_device_eval_batch_size=4,
    )
    trainer.evaluate()
    trainer.train()
    files = sorted((path / "completions").glob("*.parquet"))
    return [pandas.read_parquet(file) for file in files]


def column(table: Any, name: str, expected: Callable[[str], Any]) -> bool:
    """Whether a column of the table has what is expected of each text; a missing text is None."""
    shown = [tiny.text_of(list(completion)) for completion in table["completion"]]
    values = [value if value == value else None for value in table[name]]
    return values == [expected(text) for text in shown]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_user_s_own_column_of_feedback_is_left_alone(tmp_path: Path, enabled: bool) -> None:
    for table in completions_tables(tmp_path / "alone", [own_column], enabled):
        assert column(table, "feedback", lambda text: "mine: " + text)
        assert "sdpo_feedback" not in table
    for table in completions_tables(tmp_path / "both", [own_column, pairs], enabled):
        assert column(table, "feedback", lambda text: "mine: " + text)
        assert column(table, "sdpo_feedback", feedback_on)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_reward_function_named_feedback_keeps_its_column(tmp_path: Path, enabled: bool) -> None:
    for table in completions_tables(tmp_path / "alone", [feedback], enabled):
        assert column(table, "feedback", lambda text: float(len(text)))
        assert "sdpo_feedback" not in table
    for table in completions_tables(tmp_path / "both", [feedback, pairs], enabled):
        assert column(table, "feedback", lambda text: float(len(text)))
        assert column(table, "sdpo_feedback", feedback_on)


def test_a_column_of_the_user_that_comes_later_is_not_mixed_with_ours(tmp_path: Path) -> None:
    last = completions_tables(tmp_path, [later_column, pairs], True)[-1]
    assert column(last, "feedback", lambda text: "mine: " + text)
    assert column(last, "sdpo_feedback", feedback_on)


def test_feedback_is_logged_under_grpo_too(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(enabled=False),
        reward_funcs=pairs,
        log_completions=True,
        max_steps=1,
    )
    trainer.train()
    table = pandas.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    expected = [feedback_on(tiny.text_of(list(completion))) for completion in table["completion"]]
    assert [text if isinstance(text, str) else None for text in table["feedback"]] == expected


def test_feedback_can_be_left_out(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(include_environment_feedback=False), reward_funcs=pairs, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}feedback_used_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}feedback_available_fraction")[0] > 0.0


# --- success ----------------------------------------------------------------------------------------------


def test_the_threshold_is_reached_by_a_reward_that_equals_it(tmp_path: Path) -> None:
    """0.7 in float32 is less than the double 0.7."""

    def constant(completions: list[Any], **_: Any) -> list[float]:
        return [0.7 for _ in completions]

    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(success_reward_threshold=0.7), reward_funcs=constant, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}success_group_fraction") == [1.0]
    assert logs(trainer, f"{PREFIX}success_sample_fraction") == [1.0]


def test_the_score_is_the_weighted_sum_of_raw_rewards(tmp_path: Path) -> None:
    def one(completions: list[Any], **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    def sometimes(completions: list[Any], **_: Any) -> list[float | None]:
        return [2.0 if tiny.score(text) else None for text in texts(completions)]

    def run(weights: list[float]) -> float:
        trainer = tiny.trainer(
            tmp_path, reward_funcs=[one, sometimes], reward_weights=weights, max_steps=1, num_generations=2
        )
        recorder = Recorder(trainer)
        trainer.train()
        solved = [tiny.score(row.text) for row in recorder.rows]
        assert 0 < sum(solved) < len(solved)
        groups = [any(solved[i : i + 2]) for i in range(0, len(solved), 2)]
        expected = 0.5 + 2 * weights[1] >= 1.0
        assert logs(trainer, f"{PREFIX}success_group_fraction") == [
            sum(groups) / len(groups) if expected else 0.0
        ]
        return sum(groups)

    assert run([0.5, 0.25])
    run([0.5, 0.2])


def test_rows_that_nobody_judged_are_no_success(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nobody(completions: list[Any], **_: Any) -> list[None]:
        return [None for _ in completions]

    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(success_reward_threshold=-1.0), reward_funcs=nobody, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}success_group_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}empty_target_batch") == [1.0]


# --- metrics ----------------------------------------------------------------------------------------------

NAMES = {
    "success_group_fraction",
    "success_sample_fraction",
    "feedback_available_fraction",
    "feedback_used_fraction",
    "reprompt_sample_fraction",
    "empty_target_batch",
    "divergence",
    "student_topk_mass",
    "teacher_topk_mass",
    "student_tail_mass",
    "teacher_tail_mass",
    "student_entropy",
    "teacher_entropy",
    "sampled_token_agreement",
    "is_clip_fraction",
    "truncated_reprompt_fraction",
    "teacher_distance",
}


def test_metrics_are_logged_under_their_names(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, num_iterations=2, max_steps=4, logging_steps=2, **FOUR)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        names = {name.removeprefix(PREFIX) for name in entry if name.startswith(PREFIX)}
        assert names >= NAMES
        assert all(isinstance(entry[PREFIX + name], float) for name in NAMES)
        assert entry[f"{PREFIX}student_topk_mass"] + entry[f"{PREFIX}student_tail_mass"] == pytest.approx(1.0)
        json.dumps(entry)


def test_the_logged_divergence_is_the_unweighted_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=3, **FOUR)
    trainer.train()
    assert logs(trainer, f"{PREFIX}divergence") == pytest.approx(logs(trainer, "loss"), rel=1e-5)


def test_the_teacher_s_distance_is_that_of_its_weights(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    student, teacher = trainable(trainer.model), trainer._teacher.state.params
    gap = torch.stack([(teacher[name] - student[name]).norm() for name in student]).norm()
    norm = torch.stack([p.norm() for p in student.values()]).norm()
    assert logs(trainer, f"{PREFIX}teacher_distance") == pytest.approx([(gap / norm).item()], rel=1e-5)


def test_a_run_without_signal_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        tiny.trainer(
            tmp_path, sdpo_config=tiny.config(diagnostics_patience=2), reward_funcs=never, max_steps=2
        ).train()
    assert "No row had a teacher signal for 2 generation batches" in caplog.text


# --- teacher updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps", "ticks"),
    [
        ({}, 3, 3),
        (FOUR, 3, 3),
        ({"num_iterations": 2}, 5, 2),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 5, 2),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
            2,
            4,
        ),
    ],
    ids=["plain", "accumulated", "two passes", "two steps a batch", "two batches a step"],
)
def test_one_tick_per_finished_generation_batch(
    tmp_path: Path, changes: dict[str, Any], steps: int, ticks: int
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=steps, **changes)
    trainer.train()
    assert trainer._teacher.state.ticks == ticks


def test_the_teacher_starts_as_the_student_and_has_only_trainable_parameters(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    held, own = trainer._teacher.state.params, trainable(trainer.model)
    assert held.keys() == own.keys()
    assert all("lora" in name for name in held)
    assert same(held, own)
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert any(tensor.abs().sum() > 0 for tensor in held.values())


def test_the_teacher_runs_without_dropout_and_modes_are_restored(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5), max_steps=1
    )
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("lora_dropout.default"))
    modes: list[tuple[bool, bool]] = []
    layer.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        modes.clear()
        return compute(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert (False, False) in modes
    assert modes[-1] == (True, True)
    assert (True, False) not in modes
    assert layer.training


# --- device synchronization -------------------------------------------------------------------------------

SYNCHRONIZING = ("tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def synchronizations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods by which the adapter reads values of tensors from now on; each waits for a GPU."""
    seen: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        true = getattr(torch.Tensor, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            if "sdpo_rl" in Path(sys._getframe(1).f_code.co_filename).parts:
                seen.append(name)
            return true(*args, **kwargs)

        return read

    for name in SYNCHRONIZING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    return seen


@pytest.mark.parametrize("together", [10**6, 100], ids=["one teacher's forward", "several"])
@pytest.mark.parametrize("active", [8, 3, 0])
def test_a_micro_batch_synchronizes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, active: int, together: int
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1, reward_funcs=lambda completions, **_: [(0.0, "no")] * 8)
    trainer.train()
    inputs = trainer._prepare_inputs([*tiny.conversations()])
    inputs["loss_mask"] &= (torch.arange(8) < active)[:, None]
    monkeypatch.setattr(runner, "_TEACHER_TOKENS", together)
    monkeypatch.setattr(runner, "_TEACHER_WIDTH", 32)
    seen = synchronizations(monkeypatch)
    trainer.compute_loss(trainer.model, inputs)
    trainer._teacher.tick(trainer._unwrapped)
    assert seen == ["tolist"]


# --- rows without signal ----------------------------------------------------------------------------------


def rows_forwarded(trainer: Any) -> list[int]:
    """Rows of each training forward (sampling uses a cache, training does not)."""
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("use_cache") is False:
            seen.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_rows_without_signal_cost_no_forward(tmp_path: Path, split: dict[str, Any]) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend="logits", packing="padded"),
        reward_funcs=tiny.parity,
        max_steps=4,
        num_generations=2,
        **split,
    )
    seen = rows_forwarded(trainer)
    trainer.train()
    active = sum(round(8 * part) for part in logs(trainer, f"{PREFIX}reprompt_sample_fraction"))
    assert 0 < active < 32
    assert seen.pop(0) == 3  # the short rows of `reads_padding`
    assert sum(seen) == 2 * active


def test_the_loss_mask_is_computed_once_per_generation_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    true = step_batch.completion_loss_mask

    def counted(completion_mask: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(completion_mask))
        return true(completion_mask, *args)

    monkeypatch.setattr(step_batch, "completion_loss_mask", counted)
    trainer = tiny.trainer(
        tmp_path, eval_dataset=tiny.conversations(2), num_iterations=2, max_steps=4, **FOUR
    )
    trainer.train()
    assert calls == [8, 8]
    trainer.evaluate()
    assert calls == [8, 8, 8]


def test_a_step_without_signal_has_loss_zero_and_changes_nothing(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=never, weight_decay=0.0, max_steps=2, **FOUR)
    recorder, seen, before = Recorder(trainer), rows_forwarded(trainer), trainable(trainer.model)
    trainer.train()
    assert seen == []
    assert logs(trainer, "loss") == [0.0, 0.0]
    assert logs(trainer, f"{PREFIX}empty_target_batch") == [1.0, 1.0]
    assert all((g == 0).all() for step in recorder.steps for g in step.gradients.values())
    assert same(before, trainable(trainer.model))


def test_a_step_after_one_without_signal(tmp_path: Path) -> None:
    calls: list[int] = []

    def second_time(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        return [(0.0, "do better" if len(calls) == 2 else None) for _ in completions]

    trainer = tiny.trainer(tmp_path, reward_funcs=second_time, max_steps=3, **FOUR)
    trainer.train()
    losses = logs(trainer, "loss")
    assert losses[0] == losses[2] == 0.0
    assert losses[1] > 0.0


# --- the length of a reprompt -----------------------------------------------------------------------------


def test_a_reprompt_never_exceeds_its_limit_or_the_model(tmp_path: Path) -> None:
    def verbose(completions: list[Any], **_: Any) -> list[Any]:
        return [(0.0, "x" * 400) for _ in completions]

    for limit, positions in ((150, 512), (10240, 160)):
        trainer = tiny.trainer(
            tmp_path,
            sdpo_config=tiny.config(max_reprompt_length=limit),
            reward_funcs=verbose,
            start=tiny.model(max_position_embeddings=positions),
            max_steps=1,
        )
        widths: list[int] = []
        recorder = Recorder(
            trainer, lambda output, batch, w=widths: w.append(output["teacher_prompt_ids"].shape[1])
        )
        trainer.train()
        longest = max(len(row.completion) for row in recorder.rows)
        assert 100 < widths[0] <= min(limit, positions - 1)
        assert limit == 150 or widths[0] <= positions - min(len(row.completion) for row in recorder.rows)
        assert longest > 1
        assert logs(trainer, f"{PREFIX}truncated_reprompt_fraction") == [1.0]


def test_a_row_whose_question_fills_the_limit_is_dropped(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": [tiny.user("why " * 30)] * 4})
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(max_reprompt_length=100), train_dataset=data, max_steps=1
    )
    trainer.train()
    assert logs(trainer, "loss") == [0.0]
    assert logs(trainer, f"{PREFIX}dropped_reprompt_fraction")[0] > 0.0
    for name in ("success_sample", "feedback_used", "reprompt_sample"):
        assert logs(trainer, f"{PREFIX}{name}_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}feedback_available_fraction")[0] > 0.0


# --- heads that cannot be fused ---------------------------------------------------------------------------

IN_THE_HEAD: dict[str, tuple[Callable[[], PeftConfig], bool]] = {
    "trained tokens of a tied embedding": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[80, 81]),
        True,
    ),
    "trained tokens of the head": (
        lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [80]}),
        False,
    ),
    "ia3": (lambda: IA3Config(target_modules=["lm_head", "q_proj"], feedforward_modules=[]), False),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["lm_head", "q_proj"]), False),
}


def with_an_adapted_head(folder: Path, name: str, backend: str, patch: pytest.MonkeyPatch) -> Any:
    # Some releases of TRL refuse some of these for the sake of its own loss.
    patch.setattr("trl.trainer.grpo_trainer.BaseTunerLayer", type("NoTunerLayer", (), {}), raising=False)
    make, tied = IN_THE_HEAD[name]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(tie_word_embeddings=tied), make())
    return tiny.trainer(folder, start=model, sdpo_config=tiny.config(loss_backend=backend))


@pytest.mark.parametrize("name", IN_THE_HEAD)
def test_an_adapted_head_is_trained_with_whole_logits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends = {}
    for backend in ("auto", "logits"):
        trainer = with_an_adapted_head(tmp_path, name, backend, monkeypatch)
        before = trainable(trainer.model)
        caplog.clear()
        trainer.train()
        ends[backend] = trainable(trainer.model)
        assert not trainer._forward_mode.fused
        warned = [r for r in caplog.records if "falling back to loss_backend='logits'" in r.getMessage()]
        assert len(warned) == (backend == "auto")
        head = [n for n in before if "lm_head" in n or "token" in n]
        assert head
        assert any(not torch.equal(before[n], ends[backend][n]) for n in head)
    assert same(ends["auto"], ends["logits"])


@pytest.mark.parametrize("name", IN_THE_HEAD)
def test_an_explicit_backend_refuses_an_adapted_head(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_an_adapted_head(tmp_path, name, "torch", monkeypatch)
    with pytest.raises(
        ValueError, match=r"LM head: expected a plain linear layer, got peft\.\S+, .*loss_backend='logits'"
    ):
        trainer.train()


def test_one_class_one_name() -> None:
    import sdpo_rl

    assert sdpo_rl.SDPOTrainer is SDPOTrainer
    with pytest.raises(AttributeError, match="no attribute 'SDPOTrianer'"):
        _ = sdpo_rl.SDPOTrianer
    assert {"SDPOConfig", "SDPOTrainer", "training_arguments"} <= set(dir(sdpo_rl))

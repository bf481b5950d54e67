"""The trainer's model card and what trackers log of its options."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import trl
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import sdpo_rl
from sdpo_rl import SDPOConfig

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

"""What the trainer relies on in Unsloth's rewritten `GRPOTrainer`, tested with that trainer on a CPU.

The `observe` functions run in a fresh process (see unsloth_driver.py); the tests read what they saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_unsloth_compat
import unsloth_driver as driver

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))


# --- in the fresh process ---------------------------------------------------------------------------------


def observe_trainer() -> dict[str, Any]:
    """A run with row keys added, and one with a linear loss; all calls are recorded."""
    import torch
    import trl
    from unsloth import FastLanguageModel, PatchFastRL

    seen: dict[str, Any] = {"steps": [], "inner_loss_calls": 0}
    rewritten = trl.GRPOTrainer
    seen["mro"] = [cls.__name__ for cls in rewritten.__mro__]
    PatchFastRL("GRPO", FastLanguageModel)
    seen["second_patch_keeps_class"] = trl.GRPOTrainer is rewritten
    seen["config_has_chunks"] = hasattr(driver.grpo_config(), "unsloth_num_chunks")
    tokens = driver.tokenizer()

    class Watched(rewritten):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            output["row"] = torch.arange(len(output["completion_ids"]))
            output["row_first_token"] = output["completion_ids"][:, 0].clone()
            return output

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            seen["inner_loss_calls"] += 1
            return super()._compute_loss(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            seen["steps"].append(
                {
                    "shapes": {k: list(v.shape) for k, v in inputs.items() if isinstance(v, torch.Tensor)},
                    "rows": inputs["row"].tolist(),
                    "rows_match": bool((inputs["row_first_token"] == inputs["completion_ids"][:, 0]).all()),
                    "columns": old_log_prob_errors(self, model, inputs),
                    "loss": float(loss.detach()),
                }
            )
            return loss

    model = driver.lora_model(tokens)
    driver.randomize_lora(model)
    trainer = Watched(
        model=model, args=driver.grpo_config(num_iterations=2, max_steps=2), reward_funcs=[driver.count_a],
        train_dataset=driver.dataset(), processing_class=tokens,
    )  # fmt: skip
    trainer.train()
    seen["logged"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    gradients: list[float] = []

    class Linear(rewritten):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 3.0 * next(p for p in model.parameters() if p.requires_grad).flatten()[0]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            first = next(p for p in self.model.parameters() if p.requires_grad)
            gradients.append(float(first.grad.flatten()[0]))
            return loss

    Linear(
        model=driver.lora_model(tokens), args=driver.grpo_config(max_steps=1), reward_funcs=[driver.count_a],
        train_dataset=driver.dataset(), processing_class=tokens,
    ).train()  # fmt: skip
    seen["gradients"] = gradients
    return seen


def old_log_prob_errors(trainer: Any, model: Any, inputs: Any) -> list[float]:
    """Largest error of the stored old log-probs: by token rank, and (wrong) by last and first columns."""
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    completion, stored = inputs["completion_ids"], inputs["old_per_token_logps"]
    length = completion.shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits[:, :-1].float()
    truth = torch.log_softmax(logits / trainer.temperature, -1).gather(-1, completion[..., None])[..., 0]
    rank = (ids != trainer.processing_class.pad_token_id).cumsum(1) - 1
    columns = (rank - (ids.shape[1] - stored.shape[1]))[:, -length:].clamp(0, stored.shape[1] - 1)
    active = inputs["completion_mask"].bool()
    return [
        float((values - truth)[active].abs().max())
        for values in (stored.gather(1, columns), stored[:, -length:], stored[:, :length])
    ]


def observe() -> dict[str, Any]:
    return {
        "order": test_unsloth_compat.observe_order(),
        "trainer": observe_trainer(),
        "padding": observe_padding(fast=False),
    }


def observe_padding(fast: bool) -> dict[str, Any]:
    """Errors of the hidden states seen at the LM head, against each row run alone without any padding."""
    import torch
    from unsloth import FastLanguageModel

    tokens = driver.tokenizer()
    model = driver.fast_model(FastLanguageModel, tokens) if fast else driver.lora_model(tokens)
    driver.randomize_lora(model)
    head, captured = model.get_output_embeddings(), []

    def capture(_: Any, args: Any) -> Any:
        captured.append(args[0])
        return (args[0][:, -1:],)

    def hidden(ids: Any, mask: Any, *, keep: int, positions: bool) -> Any:
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False, **extra)
        return captured.pop()

    handle = head.register_forward_pre_hook(capture)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(tokens), (3, 11), generator=generator)
    prompt = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]])
    completion = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    errors: dict[str, Any] = {}
    for mode in ("train", "eval"):
        model.for_training(use_gradient_checkpointing=False) if mode == "train" else model.eval()
        truth = []
        for row in range(3):
            alone = ids[row][torch.cat([prompt, completion], 1)[row].bool()][None]
            length = int(completion[row].sum())
            truth.append(hidden(alone, torch.ones_like(alone), keep=length + 1, positions=False)[0])
        for name, gap in (("outer", 0), ("interior", 2)):
            mask = torch.cat([prompt, torch.zeros(3, gap, dtype=torch.long), completion], 1)
            spread = torch.cat([ids[:, :6], torch.zeros(3, gap, dtype=torch.long), ids[:, 6:]], 1) * mask
            for positions in (True, False):
                for rows in ([0, 1, 2], [0]):
                    found = hidden(spread[rows], mask[rows], keep=6, positions=positions)
                    worst = max(
                        float((found[i, 1 : len(truth[row])] - truth[row][1:]).abs().max())
                        for i, row in enumerate(rows)
                    )
                    errors[f"{name} {mode} positions={positions} rows={len(rows)}"] = worst
    handle.remove()
    return errors


def observe_packing() -> dict[str, Any]:
    """What the tests of the model say of packed rows, and of more than `max_seq_length` tokens together."""
    import torch
    from unsloth import FastLanguageModel

    from sdpo_rl.step import model_check
    from sdpo_rl.step.batch import TokenBatch, left_pad

    tokens = driver.tokenizer()
    model = driver.fast_model(FastLanguageModel, tokens, max_seq_length=128)
    driver.randomize_lora(model)
    model.eval()
    ids, mask = left_pad([list(range(3, 20)), list(range(10, 30))], pad_id=0, device=torch.device("cpu"))
    batch = TokenBatch(ids, mask, [(5, 12), (6, 14)])
    seen: dict[str, Any] = {
        "layout": list(model_check.supported_layout(model, batch)),
        "limit": model_check.sequence_limit(model, batch),
        "max_seq_length": model.max_seq_length,
    }
    # One row that is too long: what the limit is for.
    long = torch.randint(3, len(tokens), (1, 150))
    with torch.no_grad():
        seen["long_row"] = model(input_ids=long, use_cache=False).logits.shape[1]
    return seen


# --- tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return driver.run("test_unsloth_cpu:observe", tmp_path_factory.mktemp("unsloth"))


@pytest.fixture(scope="module")
def trainer_facts(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["trainer"]


@pytest.fixture(scope="module")
def padding_errors(facts: dict[str, Any]) -> dict[str, float]:
    return facts["padding"]


def test_the_right_order_and_what_it_refuses(facts: dict[str, Any]) -> None:
    test_unsloth_compat.check_order(facts["order"])


def test_trl_exports_the_rewritten_class(trainer_facts: dict[str, Any]) -> None:
    assert trainer_facts["mro"][:3] == ["UnslothGRPOTrainer", "_UnslothGRPOTrainer", "_BaseTrainer"]
    assert "GRPOTrainer" not in trainer_facts["mro"]
    assert trainer_facts["second_patch_keeps_class"]
    assert trainer_facts["config_has_chunks"]


def test_only_compute_loss_is_called(trainer_facts: dict[str, Any]) -> None:
    assert trainer_facts["steps"]
    assert trainer_facts["inner_loss_calls"] == 0


def test_row_keys_stay_with_their_rows(trainer_facts: dict[str, Any]) -> None:
    first_batch = trainer_facts["steps"][:2]
    assert sorted(row for step in first_batch for row in step["rows"]) == list(range(8))
    assert [row for step in first_batch for row in step["rows"]] != list(range(8)), "rows are shuffled"
    assert all(step["rows_match"] for step in trainer_facts["steps"])


def test_old_log_probs_are_aligned_by_token_rank(trainer_facts: dict[str, Any]) -> None:
    step = trainer_facts["steps"][0]
    by_rank, last_columns, first_columns = step["columns"]
    assert step["shapes"]["old_per_token_logps"][1] > step["shapes"]["completion_ids"][1]
    assert by_rank < 1e-5
    assert min(last_columns, first_columns) > 0.1


def test_micro_batch_losses_are_summed(trainer_facts: dict[str, Any]) -> None:
    assert trainer_facts["gradients"] == pytest.approx([3.0, 6.0])
    losses = [step["loss"] for step in trainer_facts["steps"]]
    assert trainer_facts["logged"] == pytest.approx([sum(losses[:2]), sum(losses[2:])], abs=1e-6)


def check_padding(errors: dict[str, float]) -> None:
    exact = {name: error for name, error in errors.items() if name.startswith("outer")}
    assert len(exact) == 8
    assert max(exact.values()) < 1e-5, exact
    for name, error in errors.items():
        if "interior" in name and "positions=False" in name:
            assert error > 1e-2, f"{name}: interior pads had no effect"


def test_ragged_rows_equal_rows_alone(padding_errors: dict[str, float]) -> None:
    check_padding(padding_errors)


@pytest.mark.slow
def test_ragged_rows_equal_rows_alone_in_fast_language_model(tmp_path: Path) -> None:
    errors = driver.run("test_unsloth_cpu:observe_padding", tmp_path, interpreter=True, fast=True)
    check_padding(errors)
    # In training mode Unsloth drops the mask unless some row is padded on the left.
    assert errors["interior train positions=True rows=1"] > 1e-2
    assert errors["interior train positions=True rows=3"] < 1e-5


@pytest.mark.slow
def test_fast_language_model_packs_more_rows_than_max_seq_length_holds(tmp_path: Path) -> None:
    seen = driver.run("test_unsloth_cpu:observe_packing", tmp_path, interpreter=True)
    assert seen["layout"] == ["packed", ""]
    # Its `max_position_embeddings`.
    assert seen["limit"] == 512
    assert seen["max_seq_length"] == seen["long_row"] == 128

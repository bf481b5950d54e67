"""The load-balancing loss of a Mixture-of-Experts model: a term of a step like the divergence, and of GRPO's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference_step import Method, Recorder, ReferenceStep, Row, advantage, render, trainable
from torch import Tensor, nn

from sdpo_rl import SDPOTrainer
from sdpo_rl import trainer as trainer_module
from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import forward_mode
from sdpo_rl.step.batch import MicroBatch
from sdpo_rl.step.micro_batch import MicroBatchOutput, StepContext

COEFFICIENT = 0.5
TOLERANCE = 5e-6
PREFIX = "self_distillation/"
FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def balance(model: nn.Module, rows: list[Row]) -> Tensor:
    """Experts · Σ (fraction of tokens routed to an expert) · (its mean probability), every row run alone."""
    config, probabilities = model.config, []
    for row in rows:
        ids = torch.tensor([render(row.prompt, row.prompt[-1]["content"], Method()) + row.completion])
        routed = model(input_ids=ids, output_router_logits=True).router_logits
        probabilities.append(torch.cat([layer.softmax(-1) for layer in routed]))
    p = torch.cat(probabilities)
    taken = torch.zeros_like(p).scatter(-1, p.topk(config.num_experts_per_tok).indices, 1.0)
    return config.num_experts * (taken.mean(0) * p.mean(0)).sum()


def signal(row: Row) -> bool:
    return any(tiny.score(peer.text) and peer.text.strip() for peer in row.peers)


def step_gap(
    tmp_path: Path, *, backend: str = "torch", mean: bool = False, grpo: float = 0.0, **changes: Any
) -> float:
    """Largest relative error of the gradients of two steps; the reference is the loss plus the router loss.

    With a GRPO part of weight `grpo` all micro-batches have the same share of the router loss.
    """

    def runs(row: Row) -> bool:
        return signal(row) or bool(grpo and advantage(row))

    trainer = tiny.trainer(
        tmp_path,
        start=tiny.experts(),
        sdpo_config=tiny.config(
            loss_backend=backend,
            loss_aggregation="sequence-mean" if mean else "token-mean",
            grpo_weight=grpo,
        ),
        reward_funcs=tiny.parity,
        router_aux_loss_coef=COEFFICIENT,
        num_generations=2,
        **changes,
    )
    recorder = Recorder(trainer)
    trainer.train()
    assert trainer._forward_mode.fused == (backend == "torch")
    # `tiny.parity` returns no feedback, which a row with an advantage would be shown beside it.
    method = Method(sequence_mean=mean, grpo=grpo, feedback=False)
    reference, error = ReferenceStep(tiny.experts(), method), 0.0
    size = trainer.args.per_device_train_batch_size
    teacher = recorder.steps[0].before
    for step, logged in zip(recorder.steps, logs(trainer, "aux_loss"), strict=True):
        reference.student.load_state_dict(step.before, strict=False)
        reference.teacher.load_state_dict(teacher, strict=False)
        active = [row for row in step.rows if runs(row)]
        assert 0 < len(active) < len(step.rows) + bool(grpo)
        _, gradients = reference.step(step.rows if grpo else active, stale=False)
        micro_batches = [step.rows[i : i + size] for i in range(0, len(step.rows), size)]
        parts = [[row for row in rows if runs(row)] for rows in micro_batches]
        counts = [float(len(rows) if mean else sum(sum(r.counts) for r in rows)) for rows in parts]
        if grpo:
            counts = [float(bool(rows)) for rows in parts]
        router = torch.stack(
            [balance(reference.student, rows) * n for rows, n in zip(parts, counts, strict=True) if n]
        ).sum()
        # The metric is a mean over the micro-batches with a loss; beside GRPO's part each has the same share.
        assert logged == pytest.approx(router.item() / sum(counts), rel=1e-5)
        router = router / (len(parts) if grpo else sum(counts))
        named = dict(reference.student.named_parameters())
        own = torch.autograd.grad(COEFFICIENT * router, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, own, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name] + gradient
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        gap = torch.stack([(g - step.gradients[name]).norm() for name, g in gradients.items()]).norm()
        error = max(error, (gap / norm).item())
        teacher = {n: (1 - method.rate) * old + method.rate * step.after[n] for n, old in teacher.items()}
    return error


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_a_step_has_the_router_loss_of_its_active_rows(
    tmp_path: Path, split: dict[str, Any], backend: str
) -> None:
    assert step_gap(tmp_path, backend=backend, **split) < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_beside_a_grpo_part_micro_batches_have_equal_weight(
    tmp_path: Path, weight: float, split: dict[str, Any], backend: str
) -> None:
    assert step_gap(tmp_path, backend=backend, grpo=weight, **split) < TOLERANCE


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_row_that_runs_for_other_processes_has_no_router_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    """A micro-batch without a loss calls the model in lockstep, and adds to the step what it adds without."""
    selected, select = [], trainer_module.select_rows

    def record(*args: Any, **kwargs: Any) -> MicroBatch | None:
        selected.append(select(*args, **kwargs))
        return selected[-1]

    monkeypatch.setattr(trainer_module, "select_rows", record)
    monkeypatch.setattr(StepContext, "in_lockstep", property(lambda _: True))
    # With this seed a micro-batch has neither a divergence nor an advantage.
    assert step_gap(tmp_path, grpo=weight, seed=0, **FOUR) < TOLERANCE
    assert {batch.has_loss for batch in selected} == {False, True}


def test_rows_have_equal_weight_under_sequence_mean(tmp_path: Path) -> None:
    assert step_gap(tmp_path, mean=True, **FOUR) < TOLERANCE


def test_rows_that_run_apart_have_the_weights_of_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where padding would change a row, every layout runs the same forwards."""
    monkeypatch.setattr(forward_mode, "reads_padding", lambda *_: True)
    router_losses = {}
    for layout in ("padded", "groups"):
        trainer = tiny.trainer(
            tmp_path,
            start=tiny.experts(),
            sdpo_config=tiny.config(packing=layout),
            router_aux_loss_coef=COEFFICIENT,
            per_device_train_batch_size=2,
            num_generations=2,
            max_steps=1,
            seed=1,
        )
        trainer.train()
        assert logs(trainer, PREFIX + "student_forwards") == [2.0]  # rows of different lengths
        router_losses[layout] = logs(trainer, "aux_loss")
    assert router_losses["padded"] == pytest.approx(router_losses["groups"], rel=1e-5)


def test_a_dropped_or_unweighted_router_loss_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counter-examples: no term at all, and one that is equal for micro-batches of few and of many tokens."""
    true = step_forward.router_loss
    monkeypatch.setattr(step_forward, "router_loss", lambda outputs: true(outputs).detach())
    assert step_gap(tmp_path / "dropped", **FOUR) > 1e-3
    monkeypatch.undo()
    counted = SDPOTrainer._micro_batch_output

    def uniform(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> MicroBatchOutput:
        coefficient, self.router_aux_loss_coef = self.router_aux_loss_coef, 0.0
        output = counted(self, model, inputs, *args, **kwargs)
        self.router_aux_loss_coef = coefficient
        ids, mask = (
            torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], 1)[inputs["row_mask"]]
            for n in ("ids", "mask")
        )
        if not len(ids):
            return output
        loss = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
        share = coefficient * loss * self._window._counts.sum() / self.current_gradient_accumulation_steps
        return output._replace(total=output.total + share)

    monkeypatch.setattr(SDPOTrainer, "_micro_batch_output", uniform)
    assert step_gap(tmp_path / "uniform", **FOUR) > 1e-3


@pytest.mark.parametrize("coefficient", [None, 0.0, COEFFICIENT])
def test_the_coefficient_is_the_trainer_s_or_else_the_model_s(
    tmp_path: Path, coefficient: float | None
) -> None:
    trainer = tiny.trainer(
        tmp_path,
        start=tiny.experts(router_aux_loss_coef=0.25),
        router_aux_loss_coef=coefficient,
        eval_dataset=tiny.conversations(4),
        per_device_eval_batch_size=4,
        **FOUR,
    )
    trainer.train()
    result = trainer.evaluate()
    weight = 0.25 if coefficient is None else coefficient
    router = logs(trainer, "aux_loss") if weight else [0.0, 0.0]
    expected = [d + weight * r for d, r in zip(logs(trainer, f"{PREFIX}divergence"), router, strict=True)]
    assert logs(trainer, "loss") == pytest.approx(expected, rel=1e-5)
    assert ("eval_aux_loss" in result) == bool(weight)
    assert result["eval_loss"] == pytest.approx(
        result[f"eval_{PREFIX}divergence"] + weight * result.get("eval_aux_loss", 0.0), rel=1e-5
    )


def test_a_step_without_signal_has_no_router_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, start=tiny.experts(), reward_funcs=lambda completions, **_: [0.0] * len(completions)
    )
    before = trainable(trainer.model)
    trainer.train()
    assert logs(trainer, "loss") == [0.0, 0.0]
    assert not logs(trainer, "aux_loss")
    assert all(torch.equal(p, before[name]) for name, p in trainable(trainer.model).items())


def test_grpo_on_a_cpu_has_its_router_loss(tmp_path: Path) -> None:
    losses = {}
    for coefficient in (0.0, COEFFICIENT):
        trainer = tiny.trainer(
            tmp_path,
            start=tiny.experts(),
            sdpo_config=tiny.config(enabled=False),
            router_aux_loss_coef=coefficient,
            max_steps=1,
        )
        recorder = Recorder(trainer)
        trainer.train()
        losses[coefficient] = logs(trainer, "loss")[0]
    (router,) = logs(trainer, "aux_loss")
    assert router == pytest.approx(balance(tiny.experts(), recorder.rows).item(), rel=1e-5)
    assert losses[COEFFICIENT] - losses[0.0] == pytest.approx(COEFFICIENT * router, rel=1e-5)


def test_a_model_that_returns_no_router_loss_is_refused(tmp_path: Path) -> None:
    start = tiny.experts()

    class WithoutRouterLoss(type(start)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.aux_loss = None
            return outputs

    start.__class__ = WithoutRouterLoss
    with pytest.raises(
        ValueError, match=r"returns aux_loss, got none; set GRPOConfig\(router_aux_loss_coef=0\.0\)"
    ):
        tiny.trainer(tmp_path, start=start, max_steps=1).train()

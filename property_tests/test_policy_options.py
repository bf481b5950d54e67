"""Every option of GRPO's loss beside distillation: at weight 1 TRL's own loss and gradient, between the mixture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from trl import GRPOTrainer

import sdpo
from sdpo_rl.step import entropy as step_entropy
from sdpo_rl.step import policy as step_policy
from sdpo_rl.step import policy_loss as step_policy_loss
from sdpo_rl.step.batch import teacher_inputs

# Advantages and weights of tokens are float32.
TOLERANCE = 1e-6
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "luspo": {},
    "sapo": {"sapo_temperature_neg": 2.0},
    "cispo": {"epsilon_high": 1.05},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {"importance_sampling_level": "sequence"},
    "delta": {"delta": 1.05},
    "entropy": {"entropy_coef": 0.3},
    "beta": {"beta": 0.2},
    "off-policy": {"off_policy_mask_threshold": 0.02},
    "quantile": {"top_entropy_quantile": 0.43},
}
OFF = {
    "importance_sampling_level": "token",
    "delta": None,
    "entropy_coef": 0.0,
    "beta": 0.0,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "epsilon": 0.1,
    "epsilon_high": None,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_neg": 2.0,
    "use_bias_correction_kl": False,
}
# Of the prompts, the completions, and the rows of the teacher.
PROMPTS, COMPLETIONS, TAUGHT = [3, 5, 2, 4], [6, 1, 7, 5], [True, False, True, False]


def make_batch(seed: int = 0, *, ratios: str = "none") -> dict[str, Any]:
    """A micro-batch of TRL's, with a row whose advantage is 0, a tool's tokens and stale log-probabilities."""
    rng = torch.Generator().manual_seed(seed)
    rows, width, length = len(PROMPTS), max(PROMPTS), max(COMPLETIONS)
    shape = rows, length
    prompt_mask = torch.tensor([[0] * (width - n) + [1] * n for n in PROMPTS])
    completion_mask = torch.tensor([[1] * n + [0] * (length - n) for n in COMPLETIONS])
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[2, 2:4] = 0

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=rng, dtype=torch.float64)

    batch: dict[str, Any] = {
        "prompt_ids": torch.randint(6, 90, (rows, width), generator=rng) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(6, 90, shape, generator=rng) * completion_mask,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.5, -0.75, -1.25, 0.0]),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
        # Filled in below the model: how far the policies are from the present one.
        "old_gap": noise(0.2),
        "ref_gap": noise(0.3),
        "sampling_gap": noise(0.2),
    }
    if ratios == "token":
        batch["importance_sampling_ratio"] = (
            noise(0.3).exp().masked_fill(completion_mask * tool_mask == 0, 1.0)
        )
    elif ratios == "sequence":
        batch["importance_sampling_ratio"] = noise(0.3)[:, :1].exp()
    return batch


def whole_logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, V], every row run alone."""
    length = batch["completion_ids"].shape[1]
    rows = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row]])[None]
        rows.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1][:length])
    return torch.stack(rows)


def log_probs_and_entropy(trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    log_p = (whole_logits(trainer.model, batch) / trainer.temperature).log_softmax(-1)
    sampled = log_p.gather(-1, batch["completion_ids"][..., None])[..., 0]
    return sampled, -(log_p.exp() * log_p).sum(-1)


def with_log_probs(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the log-probabilities of other policies."""
    given = dict(batch)
    with torch.no_grad():
        now, _ = log_probs_and_entropy(trainer, batch)
    for gap, name in (
        ("old_gap", "old_per_token_logps"),
        ("ref_gap", "ref_per_token_logps"),
        ("sampling_gap", "sampling_per_token_logps"),
    ):
        given[name] = now + given.pop(gap)
    given["sampling_per_token_logps"][0, 1] = float("nan")  # the engine could not score it
    if trainer.beta == 0.0:
        del given["ref_per_token_logps"]
    return given


@contextmanager
def options(trainer: Any, **changes: Any) -> Iterator[None]:
    """The trainer with these options of its `GRPOConfig`, as if it had been constructed with them."""
    values = {**OFF, **LOSS_TYPES[changes["loss_type"]], **changes}
    trainer.use_vllm = values.pop("use_vllm", False)
    trainer.vllm_importance_sampling_correction = True
    for name, value in values.items():
        setattr(trainer.args, name, value)
        setattr(trainer, name, value)
    trainer.epsilon_low = values["epsilon"]
    trainer.epsilon_high = values["epsilon_high"] or values["epsilon"]
    trainer._entropy_bonus_enabled = values["entropy_coef"] != 0.0
    trainer._policy_term = step_policy.policy_term(trainer.args)
    yield


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Trainers over a float64 model in evaluation mode, one for each configuration."""
    made: dict[Any, Any] = {}

    def make(**config: Any) -> Any:
        key = tuple(config.items())
        if key not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("run")
            trainer = tiny.trainer(folder, sdpo_config=tiny.config(**config), temperature=0.8)
            trainer.model.double().eval()
            made[key] = trainer
        return made[key]

    return make


def gradients(trainer: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def ours(trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    prompts = [[6 + row, 7, 8, 9 + row] for row in range(len(TAUGHT))]
    inputs = {**batch, **teacher_inputs(batch, prompts, TAUGHT, row_weights=None, pad_id=0)}
    loss = trainer.compute_loss(trainer.model, inputs)
    return loss.detach(), gradients(trainer, loss)


def theirs(trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's own loss, with log-probabilities and entropies from whole logits in float64."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        *log_probs_and_entropy(trainer, batch),
        None,
    )
    try:
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    finally:
        del trainer._get_per_token_logps_and_entropies
    return loss.detach(), gradients(trainer, loss)


def gap(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Of the losses, and of the gradients over all parameters, relative to the second."""
    norm = torch.stack([g.norm() for g in other[1].values()]).norm()
    assert norm > 0
    apart = torch.stack([(one[1][name] - g).norm() for name, g in other[1].items()]).norm()
    return max((apart / norm).item(), abs(one[0] - other[0]).item() / max(abs(other[0]).item(), 0.1))


def compared(trainer: Any, batch: Mapping[str, Any], loss_type: str, **changes: Any) -> float:
    with options(trainer, loss_type=loss_type, **changes):
        given = with_log_probs(trainer, batch)
        return gap(ours(trainer, given), theirs(trainer, given))


def subsets(sizes: list[int]) -> list[tuple[str, ...]]:
    return [some for size in sizes for some in itertools.combinations(OPTIONS, size)]


def together(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for option in names for name, value in OPTIONS[option].items()}


ALL = together(tuple(OPTIONS))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_weight_of_one_is_the_loss_of_trl(trainers: Callable[..., Any], loss_type: str) -> None:
    """With each option, with each pair of them, and with all."""
    trainer = trainers(grpo_weight=1.0)
    for names in subsets([0, 1, 2, len(OPTIONS)]):
        assert compared(trainer, make_batch(), loss_type, **together(names)) < TOLERANCE, names
    assert trainer._forward_mode.fused


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_set_of_options(trainers: Callable[..., Any], loss_type: str) -> None:
    for names in subsets([3, 4, 5]):
        assert compared(trainers(grpo_weight=1.0), make_batch(1), loss_type, **together(names)) < TOLERANCE


@pytest.mark.parametrize("changes", [{}, ALL], ids=["no option", "all"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_from_whole_logits_it_is_the_same(
    trainers: Callable[..., Any], loss_type: str, changes: dict[str, Any]
) -> None:
    trainer = trainers(grpo_weight=1.0, loss_backend="logits")
    assert compared(trainer, make_batch(), loss_type, **changes) < 100 * TOLERANCE  # these logits are float32
    assert not trainer._forward_mode.fused


@pytest.mark.parametrize(
    ("loss_type", "ratios"),
    [("grpo", "token"), ("grpo", "sequence"), ("luspo", "sequence"), ("vespo", "token")],
)
def test_ratios_of_the_inference_engine(trainers: Callable[..., Any], loss_type: str, ratios: str) -> None:
    trainer = trainers(grpo_weight=1.0)
    for changes in ({}, ALL):
        batch = make_batch(ratios=ratios)
        assert compared(trainer, batch, loss_type, use_vllm=True, **changes) < TOLERANCE


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_distance_times_the_ratio(trainers: Callable[..., Any], level: str) -> None:
    changes = {"beta": 0.2, "use_bias_correction_kl": True, "importance_sampling_level": level}
    assert compared(trainers(grpo_weight=1.0), make_batch(), "grpo", **changes) < TOLERANCE


def test_a_batch_of_the_present_policy(trainers: Callable[..., Any]) -> None:
    """Ratios are 1, with a gradient, and no row is off-policy, whatever the inference engine says of it."""
    trainer = trainers(grpo_weight=1.0)
    for loss_type in LOSS_TYPES:
        with options(trainer, loss_type=loss_type, **ALL):
            given = with_log_probs(trainer, make_batch())
            del given["old_per_token_logps"], given["sampling_per_token_logps"]
            assert gap(ours(trainer, given), theirs(trainer, given)) < TOLERANCE, loss_type


# What an option has no part in.
UNCHANGED = {
    *(("delta", loss_type) for loss_type in ("sapo", "cispo", "vespo")),
    ("sequence", "vespo"),
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option_has_an_effect(trainers: Callable[..., Any], loss_type: str) -> None:
    """Equality above would mean little if the options changed nothing."""
    trainer = trainers(grpo_weight=1.0)
    losses = {}
    for name, changes in {"none": {}, **OPTIONS}.items():
        with options(trainer, loss_type=loss_type, **changes):
            losses[name] = theirs(trainer, with_log_probs(trainer, make_batch()))
    for name in OPTIONS:
        if (name, loss_type) in UNCHANGED:
            assert gap(losses[name], losses["none"]) == 0.0
        else:
            assert gap(losses[name], losses["none"]) > 1000 * TOLERANCE, name


# --- between, and routed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "vespo", "luspo"])
def test_between_it_is_the_mixture(trainers: Callable[..., Any], loss_type: str, backend: str) -> None:
    share, parts = 0.3, []
    for weight in (0.0, share, 1.0):
        trainer = trainers(grpo_weight=weight, grpo_weight_final=1.0, loss_backend=backend)
        trainer.state.max_steps = 100  # of which the present one is the first
        with options(trainer, loss_type=loss_type, **ALL):
            parts.append(ours(trainer, with_log_probs(trainer, make_batch())))
    (none, g0), between, (one, g1) = parts
    mixed = {name: share * g1[name] + (1 - share) * g0[name] for name in g1}
    assert gap(between, (share * one + (1 - share) * none, mixed)) < TOLERANCE
    assert gap(parts[0], parts[2]) > 0.1


@pytest.mark.parametrize(
    "changes", [{}, {"beta": 0.2}, {"delta": 1.05}, ALL], ids=["none", "beta", "delta", "all"]
)
def test_routing_leaves_the_rows_without_a_teacher(
    trainers: Callable[..., Any], changes: dict[str, Any]
) -> None:
    """Their losses are those of a batch in which the others were not sampled; `luspo` has no share of lengths."""
    trainer = trainers(routing="srpo")
    with options(trainer, loss_type="luspo", **changes):
        given = with_log_probs(trainer, make_batch())
        taught = torch.tensor(TAUGHT)
        alone = {**given, "tool_mask": given["tool_mask"].masked_fill(taught[:, None], 0)}
        expected = theirs(trainer, alone)
    distilled = trainers(grpo_weight=0.0)
    trained = ours(distilled, given)
    total = expected[0] + trained[0], {name: g + trained[1][name] for name, g in expected[1].items()}
    with options(trainer, loss_type="luspo", **changes):
        assert gap(ours(trainer, given), total) < TOLERANCE


# --- planted errors ---------------------------------------------------------------------------------------


def changed_term(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    true = step_policy.policy_term
    patch.setattr(step_policy, "policy_term", lambda args: replace(true(args), **changes))


def no_gradient_of_the_entropy(patch: pytest.MonkeyPatch) -> None:
    true = sdpo.fused_log_probs_and_entropy

    def detached(*arguments: Any, **given: Any) -> Any:
        both = true(*arguments, **given)
        return both._replace(entropy=both.entropy.detach())

    patch.setattr(sdpo, "fused_log_probs_and_entropy", detached)


def a_quantile_of_each_row(patch: pytest.MonkeyPatch) -> None:
    true = step_entropy.highest

    def of_rows(entropy: Tensor, mask: Tensor, **given: Any) -> Tensor:
        rows = zip(entropy, mask, strict=True)
        return torch.stack([true(one[None], kept[None], **given)[0] for one, kept in rows])

    patch.setattr(step_entropy, "highest", of_rows)


def a_mean_with_the_tool_s_tokens(patch: pytest.MonkeyPatch) -> None:
    true = step_policy_loss.ratio_terms
    patch.setattr(
        step_policy_loss,
        "ratio_terms",
        lambda term, new, old, mask: true(term, new, old, mask.any(-1, keepdim=True).expand(mask.shape)),
    )


def rows_without_an_advantage_are_dropped(patch: pytest.MonkeyPatch) -> None:
    true = step_policy.policy_mask
    patch.setattr(
        step_policy,
        "policy_mask",
        lambda config, term, inputs: true(config, term, inputs) & (inputs["advantages"] != 0.0)[:, None],
    )


PLANTS: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("entropy", no_gradient_of_the_entropy),
    ("quantile", a_quantile_of_each_row),
    ("sequence", a_mean_with_the_tool_s_tokens),
    ("entropy", rows_without_an_advantage_are_dropped),
    ("quantile", rows_without_an_advantage_are_dropped),
    ("beta", rows_without_an_advantage_are_dropped),
    ("delta", partial(changed_term, ratio_limit=math.inf)),
    ("off-policy", partial(changed_term, off_policy_threshold=None)),
    ("beta", partial(changed_term, kl_coef=0.25)),
]


@pytest.mark.parametrize(("option", "plant"), PLANTS)
def test_the_comparison_detects(
    trainers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, option: str, plant: Any
) -> None:
    trainer = trainers(grpo_weight=1.0)
    plant(monkeypatch)
    assert compared(trainer, make_batch(), "grpo", **OPTIONS[option]) > 1000 * TOLERANCE

"""Unsloth: import order, refusals, row groups; the advice about memory and speed; the report; the upgrade check."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import model_families
import pytest
import tiny
import torch
import trl
import unsloth_driver as driver
from hypothesis import given
from hypothesis import strategies as st
from strategies import Claim
from torch import Tensor, nn

import sdpo
from sdpo_rl import training_report
from sdpo_rl.compat import unsloth as unsloth_compat
from sdpo_rl.compat import upgrade_check
from sdpo_rl.diagnose import advice
from sdpo_rl.resume import progress
from sdpo_rl.step import batch as step_batch
from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import runner
from sdpo_rl.step.micro_batch import StepContext

needs_unsloth = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))

RIGHT_ORDER = """
from unsloth import FastLanguageModel, PatchFastRL
PatchFastRL("GRPO", FastLanguageModel)
from sdpo_rl import SDPOTrainer, SDPOConfig
from trl import GRPOConfig
"""
WRONG_ORDER = """
from sdpo_rl import SDPOTrainer, SDPOConfig
from unsloth import FastLanguageModel, PatchFastRL
PatchFastRL("GRPO", FastLanguageModel)
from trl import GRPOConfig
"""
# Without a GPU the import needs a variable that PatchFastRL must not see.
FIRST = """
import os
import sys
os.environ["UNSLOTH_ALLOW_CPU"] = "1"
{early}
import unsloth
del os.environ["UNSLOTH_ALLOW_CPU"]
"""


# --- import order: the lines of the guide, in fresh processes ---------------------------------------------


def run_lines(lines: str, cwd: Path) -> str:
    environment = os.environ | driver.ENVIRONMENT
    paths = [str(driver.HERE), str(driver.HERE.parent), str(driver.HERE.parent / "adapters")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [driver.python(), "-c", lines]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def observe_order() -> str:
    """What the guide's lines, every refused construction and the upgrade check print; runs in a fresh process."""
    from sdpo_rl.compat import upgrade_check

    printed = io.StringIO()
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(RIGHT_ORDER, scope)
        print("MRO", *(cls.__name__ for cls in scope["SDPOTrainer"].__mro__))
        print("CHUNKS", hasattr(tiny.arguments(Path("out")), "unsloth_num_chunks"))
        exec(REFUSALS, scope)
        print("EXIT", upgrade_check.main())
    return printed.getvalue()


def check_order(printed: str) -> None:
    assert "MRO SDPOTrainer " in printed
    assert " UnslothGRPOTrainer _UnslothGRPOTrainer" in printed
    assert "CHUNKS True" in printed
    assert "EXIT 0" in printed, printed[-4000:]
    assert "GRPOConfig.unsloth_num_chunks" in printed, "the upgrade check is of the rewritten trainer"
    for name, words in REFUSED.items():
        message = printed.split(f"BEGIN {name}\n")[1].split("END")[0]
        for word in words:
            assert word in message, name


# Under the right order: every construction that Unsloth would ignore or fail on much later.
REFUSALS = """
import tiny, unsloth_driver, peft, dataclasses
from trl.trainer.grpo_config import GRPOConfig as Config
def refused(name, make):
    print("BEGIN", name)
    try:
        make()
    except ValueError as error:
        print(error)
    print("END")
def build(model, **changes):
    args = changes.pop("args", None) or tiny.arguments("out", max_completion_length=changes.pop("length", 8))
    return SDPOTrainer(model=model, args=args, sdpo_config=tiny.config(), processing_class=tiny.tokenizer(),
                       reward_funcs=tiny.judge, train_dataset=tiny.conversations(), **changes)
lora = peft.LoraConfig(r=4, target_modules=["q_proj"])
ready = lambda: unsloth_driver.bind_modes(peft.get_peft_model(tiny.model(), lora))
short = ready()
short.max_seq_length = 128
pristine = next(cls for cls in Config.__mro__ if not hasattr(cls, "unsloth_num_chunks"))
refused("peft_config", lambda: build(ready(), peft_config=lora))
refused("string", lambda: build("Qwen/Qwen2.5-0.5B"))
refused("plain", lambda: build(peft.get_peft_model(tiny.model(), lora)))
refused("config", lambda: build(ready(), args=trl_before))
refused("length", lambda: build(short, length=128))
""".replace("args=trl_before", 'args=pristine("out", use_cpu=True, bf16=False)')
REFUSED = {
    "peft_config": ["ignores peft_config", "FastLanguageModel.get_peft_model"],
    "string": ["'Qwen/Qwen2.5-0.5B'", "FastLanguageModel.from_pretrained"],
    "plain": ["for_training", "FastLanguageModel.from_pretrained"],
    "config": ["unsloth_num_chunks", *unsloth_compat.IMPORT_ORDER.splitlines()],
    "length": ["max_completion_length=128", "max_seq_length=128"],
}


@needs_unsloth
def test_the_wrong_order_is_refused_with_the_right_one(tmp_path: Path) -> None:
    printed = run_lines(
        # The name must be used before the patch: importing the package alone binds nothing.
        FIRST.format(early="from sdpo_rl import SDPOTrainer, SDPOConfig")
        + WRONG_ORDER
        + "try:\n    SDPOTrainer(model=None, args=None)\nexcept RuntimeError as error:\n    print(error)\n",
        tmp_path,
    )
    for line in unsloth_compat.IMPORT_ORDER.splitlines():
        assert line in printed


def test_the_order_in_the_messages_is_the_guides() -> None:
    stated = [line.strip() for line in unsloth_compat.IMPORT_ORDER.splitlines()]
    assert stated == RIGHT_ORDER.strip().splitlines()


# --- refusals, without Unsloth ----------------------------------------------------------------------------


def usable() -> dict[str, Any]:
    model = SimpleNamespace(for_training=None, max_seq_length=512)
    return {
        "model": model,
        "args": SimpleNamespace(unsloth_num_chunks=-1, max_completion_length=256),
        "peft_config": None,
    }


def test_the_right_construction_is_not_refused() -> None:
    unsloth_compat.check_construction(**usable())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_config": object()}, ["peft_config", "get_peft_model"]),
        ({"model": "Qwen/Qwen2.5-7B"}, ["Qwen/Qwen2.5-7B", "from_pretrained"]),
        ({"model": nn.Linear(1, 1)}, ["Linear", "for_training"]),
        ({"args": SimpleNamespace(max_completion_length=1)}, ["unsloth_num_chunks", "PatchFastRL"]),
        (
            {"args": SimpleNamespace(unsloth_num_chunks=-1, max_completion_length=512)},
            ["max_completion_length=512", "max_seq_length=512"],
        ),
    ],
    ids=["peft_config", "string", "plain", "config", "length"],
)
def test_refusals_name_the_fix(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        unsloth_compat.check_construction(**usable() | change)
    for word in words:
        assert word in str(caught.value)


def fail_inside(name: str) -> None:
    with unsloth_compat.logits_not_hidden_states():
        assert os.environ[name] == "0"
        raise KeyError


def test_the_variable_is_zero_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "UNSLOTH_RETURN_HIDDEN_STATES"
    for before in (None, "1"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with pytest.raises(KeyError):
            fail_inside(name)
        assert os.environ.get(name) == before


# --- attention of packed rows -----------------------------------------------------------------------------


def varlen_attn_after(monkeypatch: pytest.MonkeyPatch, present: Any, setting: str | None, kernel: Any) -> Any:
    """`varlen_attn` of Unsloth's attention, after the trainer has seen what it found in torch."""
    attention = ModuleType("attention_dispatch")
    vars(attention)["_TORCH_VARLEN_ATTN"] = present
    monkeypatch.setitem(sys.modules, unsloth_compat._ATTENTION, attention)
    monkeypatch.setattr(unsloth_compat, "grouped_kernel", lambda: kernel)
    if setting is not None:
        monkeypatch.setenv("UNSLOTH_TORCH_VARLEN", setting)
    unsloth_compat.use_varlen_kernel()
    return vars(attention)["_TORCH_VARLEN_ATTN"]


def test_unsloth_gets_the_kernel_where_it_found_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(*args: Any, **options: Any) -> str:
        calls.append((args, options))
        return "output"

    found = varlen_attn_after(monkeypatch, None, None, kernel)
    assert found(1, 2, scale=None, window_size=(-1, 0), enable_gqa=True) == "output"
    assert calls == [((1, 2), {"scale": None, "window_size": (-1, 0)})]


def kernel_of_unsloth() -> None:
    """What Unsloth found in torch 2.12."""


@pytest.mark.parametrize(
    ("present", "setting", "kernel"),
    [(kernel_of_unsloth, None, print), (None, "0", print), (None, "OFF", print), (None, None, None)],
)
def test_unsloth_keeps_its_own_attention(
    monkeypatch: pytest.MonkeyPatch, present: Any, setting: str | None, kernel: Any
) -> None:
    assert varlen_attn_after(monkeypatch, present, setting, kernel) is present


@needs_unsloth
def test_unsloth_compiles_no_packed_layer_and_none_in_evaluation() -> None:
    """What docs/unsloth.md says; a program that is compiled needs a GPU, so this reads Unsloth's condition."""
    find = "import importlib.util as u; print(u.find_spec('unsloth').submodule_search_locations[0])"
    found = subprocess.run([driver.python(), "-c", find], capture_output=True, text=True, check=True)
    models = Path(found.stdout.strip()) / "models"
    source = (models / "_block_compile.py").read_text()
    _, _, condition = source.partition("mode == _OFF\n            or not self.training")
    assert condition
    assert 'kwargs.get("packed_seq_lengths") is not None' in condition.partition("return original")[0]
    assert "Off before torch 2.11" in (models / "llama.py").read_text()
    attention = (models.parent / "utils" / "attention_dispatch.py").read_text()
    assert "\n_TORCH_VARLEN_ATTN = _load_torch_varlen_attn()" in attention  # what `use_varlen_kernel` sets
    assert "if _TORCH_VARLEN_ATTN is None or not Q.is_cuda" in attention


def test_nothing_is_set_without_unsloths_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsloth_compat, "grouped_kernel", lambda: print)
    for absent in ({}, {unsloth_compat._ATTENTION: ModuleType("another release")}):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "modules", {**sys.modules, **absent})
            if not absent:
                patch.delitem(sys.modules, unsloth_compat._ATTENTION, raising=False)
            unsloth_compat.use_varlen_kernel()
            for module in absent.values():
                assert not hasattr(module, "_TORCH_VARLEN_ATTN")


# --- old log-probabilities --------------------------------------------------------------------------------


def property_old_log_probs_find_their_tokens(
    align: Callable[..., Mapping[str, Any]], data: st.DataObject, rows: int, prompt: int, completion: int
) -> None:
    """Rows are packed to the left by pad id, then right-aligned to the widest left padding; the inverse of it."""
    pad, width = 0, prompt + completion
    ids, mask, expected = [], [], []
    for row in range(rows):
        left = data.draw(st.integers(0, prompt - 1))
        length = data.draw(st.integers(1, completion))
        tokens = [100 * (row + 1) + i for i in range(prompt - left + length)]
        ids.append([pad] * left + tokens + [pad] * (completion - length))
        mask.append([1] * length + [0] * (completion - length))
        expected.append([float(token) for token in tokens[prompt - left :]])
    table = torch.tensor(ids)
    most = max(row.index(next(t for t in row if t != pad)) for row in ids)
    packed = torch.zeros(rows, width)
    for row in range(rows):
        tokens = [token for token in ids[row] if token != pad]
        packed[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.float32)
    inputs = {
        "prompt_ids": table[:, :prompt],
        "completion_ids": table[:, prompt:],
        "completion_mask": torch.tensor(mask),
        "old_per_token_logps": packed[:, width - completion - most :],
    }
    aligned = align(inputs, pad)["old_per_token_logps"]
    assert aligned.shape == (rows, completion)
    for row, values in enumerate(expected):
        assert aligned[row, : len(values)].tolist() == values


def last_columns(inputs: Mapping[str, Any], pad: int) -> Mapping[str, Any]:
    """The counter-example that takes them for right-aligned, as if every prompt were as long."""
    length = inputs["completion_ids"].shape[1]
    return {"old_per_token_logps": inputs["old_per_token_logps"][:, -length:]}


OLD_LOG_PROBS = Claim(
    property_old_log_probs_find_their_tokens,
    unsloth_compat.align_old_log_probs,
    last_columns,
    {"data": st.data()} | {name: st.integers(1, 5) for name in ("rows", "prompt", "completion")},
)


def test_old_log_probs_find_their_tokens() -> None:
    OLD_LOG_PROBS.holds()
    OLD_LOG_PROBS.rejects_counter_example()


def test_a_sampled_pad_token_has_no_old_log_prob() -> None:
    inputs = {
        "prompt_ids": torch.tensor([[5, 6], [5, 6]]),
        "completion_ids": torch.tensor([[7, 0, 8], [7, 8, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "old_per_token_logps": torch.ones(2, 3),
    }
    aligned = unsloth_compat.align_old_log_probs(inputs, 0)["old_per_token_logps"]
    assert aligned[0].isnan().all()
    assert aligned[1, :2].tolist() == [1.0, 1.0]


# --- groups of rows ---------------------------------------------------------------------------------------


Sizes = list[tuple[int, int]]  # tokens of each row's prompt and completion
some_sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)


def mask_of(sizes: Sizes) -> tuple[Tensor, int]:
    """Rows of [left pad | prompt | completion | right pad], and the completion's columns."""
    prompt, completion = (max(column) for column in zip(*sizes, strict=True))
    lines = [[0] * (prompt - p) + [1] * (p + c) + [0] * (completion - c) for p, c in sizes]
    return torch.tensor(lines), completion


def property_groups_hold_every_attended_token_once(
    group_rows: Callable[..., list[step_batch.RowGroup]],
    sizes: Sizes,
    width_limit: int,
    token_limit: int,
) -> None:
    mask, _ = mask_of(sizes)
    groups = group_rows(sizes, width_limit=width_limit, token_limit=token_limit)
    assert [g.rows.start for g in groups] == [0, *(g.rows.stop for g in groups[:-1])]
    assert groups[-1].rows.stop == len(mask)
    for group in groups:
        columns = mask[group.rows, group.columns]
        assert columns.sum() == mask[group.rows].sum()
        assert group.columns.stop + group.right == mask.shape[1]
        if len(columns) > 1:
            assert columns.shape[1] <= width_limit
            assert columns.numel() <= token_limit


def all_rows_at_once(sizes: Sizes, **limits: float) -> list[step_batch.RowGroup]:
    return [step_batch.RowGroup(slice(0, len(sizes)), slice(0, mask_of(sizes)[0].shape[1]), 0)]


def cut_to_the_width(sizes: Sizes, *, width_limit: int, **limits: float) -> list[step_batch.RowGroup]:
    groups = step_batch.row_groups(sizes, width_limit=width_limit, **limits)
    return [
        g._replace(columns=slice(max(g.columns.start, g.columns.stop - width_limit), g.columns.stop))
        for g in groups
    ]


GROUPS = [
    Claim(
        property_groups_hold_every_attended_token_once,
        step_batch.row_groups,
        counter_example,
        {"sizes": some_sizes, "width_limit": st.integers(4, 14), "token_limit": st.integers(4, 60)},
    )
    for counter_example in (all_rows_at_once, cut_to_the_width)
]


def test_groups_hold_every_attended_token_once() -> None:
    GROUPS[0].holds()
    for claim in GROUPS:
        claim.rejects_counter_example()


@given(sizes=some_sizes, width_limit=st.integers(2, 14), token_limit=st.integers(2, 60), states=st.booleans())
def test_groups_change_no_number(sizes: Sizes, width_limit: int, token_limit: int, states: bool) -> None:
    mask, length = mask_of(sizes)
    ids = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    arguments = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": length + 1, "use_cache": False}
    weight = torch.ones(1, 1)
    widths = []

    def forward(inputs: dict[str, Any], *, length: int) -> Any:
        widths.append(inputs["input_ids"].numel())
        assert inputs["logits_to_keep"] == length + 1
        assert inputs["use_cache"] is False
        # The value at a column: its token, and the sum of the tokens that the row attends up to it.
        seen = torch.stack(
            [inputs["input_ids"], (inputs["input_ids"] * inputs["attention_mask"]).cumsum(1)], -1
        )
        hidden = seen.float()[:, -(length + 1) : -1]
        return sdpo.LMHead(hidden, weight) if states else hidden

    groups = step_batch.row_groups(sizes, width_limit=width_limit, token_limit=token_limit)
    grouped = step_forward.run_groups(forward, arguments, groups, length=length)
    assert len(widths) == len(groups)
    together = forward(arguments, length=length)
    if states:
        grouped, together = grouped.hidden, together.hidden
    used = mask[:, -length:].bool()
    assert torch.equal(grouped[used], together[used])
    # A counter-example: columns cut off on the left instead of the right.
    if any(group.right for group in groups):
        assert not torch.equal(grouped.roll(1, 1)[used], together[used])


def test_rows_alike_are_shared_out_evenly() -> None:
    groups = step_batch.row_groups([(7, 3)] * 17, width_limit=20, token_limit=80)
    assert [group.rows.stop - group.rows.start for group in groups] == [6, 6, 5]


def test_rows_that_run_apart_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward limited to its longest row: several groups, the same parameters."""
    after: list[list[Tensor]] = []
    groups: list[int] = []

    def tight(sizes: Sizes, *, width_limit: float, token_limit: float) -> Any:
        longest = max(map(sum, sizes))
        made = step_batch.row_groups(sizes, width_limit=longest, token_limit=2 * longest)
        groups.append(len(made))
        return made

    for limited in (False, True):
        if limited:
            monkeypatch.setattr(runner, "row_groups", tight)
        trainer = tiny.trainer(
            tmp_path,
            sdpo_config=tiny.config(packing="padded"),
            train_dataset=mixed(),
            max_completion_length=24,
            max_steps=2,
        )
        trainer.train()
        after.append([p.detach().clone() for p in trainer.model.parameters()])
    assert max(groups) > 1
    assert max(float((a - b).abs().max()) for a, b in zip(*after, strict=True)) < 1e-5


def mixed() -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [tiny.user("say " + "so " * (30 * (i % 2)) + str(i)) for i in range(8)]}
    )


def test_a_prompt_too_long_for_the_model_is_dropped(tmp_path: Path) -> None:
    """Prompt and completion beyond `max_seq_length`: the row is left out and counted, nothing is cut off."""
    trainer = tiny.trainer(tmp_path, train_dataset=mixed(), max_steps=2, learning_rate=0.0)
    trainer.model.max_seq_length = 80
    widths: list[int] = []
    trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: None if kwargs["use_cache"] else widths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    trainer.train()
    assert max(widths) <= 80
    entry = trainer.state.log_history[0]
    assert entry["self_distillation/dropped_reprompt_fraction"] > 0.0


@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_a_row_of_grpo_too_long_for_the_model_is_refused(tmp_path: Path, packing: str) -> None:
    """GRPO reads the row without a reprompt, so no earlier check has seen its length."""
    config = tiny.config(grpo_weight=0.5, packing=packing)
    trainer = tiny.trainer(tmp_path, train_dataset=mixed(), sdpo_config=config, max_steps=1)
    trainer.model.max_seq_length = 80
    with pytest.raises(
        ValueError, match="rows of at most max_seq_length=80 tokens, got a prompt and completion of"
    ):
        trainer.train()


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize(
    "settings",
    [{"num_iterations": 2}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}],
    ids=["old log-probs", "alone on a process"],
)
def test_a_dropped_row_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, settings: dict[str, Any]
) -> None:
    """TRL computes log-probs of every row, and a process without a row runs one for its collectives."""
    alone = "per_device_train_batch_size" in settings
    monkeypatch.setattr(StepContext, "in_lockstep", property(lambda _: alone))
    config = tiny.config(packing=packing)
    trainer = tiny.trainer(tmp_path, train_dataset=mixed(), sdpo_config=config, max_steps=2, **settings)
    trainer.model.max_seq_length = 80
    lengths: list[int] = []  # of rows, which may be packed into one

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not kwargs["use_cache"]:
            positions = kwargs["position_ids"]  # one test of the model passes none
            last = kwargs["input_ids"].shape[1] - 1 if positions is None else int(positions.max())
            lengths.append(last + 1)

    trainer.model.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    dropped = [
        entry.get("self_distillation/dropped_reprompt_fraction", 0) for entry in trainer.state.log_history
    ]
    assert max(dropped) > 0.0
    assert max(lengths) <= 80


# --- memory -----------------------------------------------------------------------------------------------


def test_out_of_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, max_completion_length=9)
    original = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise original

    monkeypatch.setattr(trainer, "_micro_batch_output", full)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(str(original))
    assert message.count("What determines") == 1
    assert caught.value.__cause__ is original
    for setting in (
        "gradient checkpointing is off",
        "per_device_train_batch_size=8",
        "max_completion_length=9",
        "max_reprompt_length=10240",
        "loss_chunk_size=None",
        "teacher_offload",
        "float32",
    ):
        assert setting in message


def test_other_errors_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(trainer, "_micro_batch_output", lambda *_, **__: [][0])
    with pytest.raises(IndexError, match="list index out of range"):
        trainer.train()


def test_advice_follows_the_settings(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend="logits", teacher_mode="live"),
        gradient_checkpointing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    text = advice.advice(trainer)
    assert "checkpointing" not in text
    assert "per_device_train_batch_size=1 is the least" in text
    assert "loss_backend='logits'" in text
    assert "loss_chunk_size" not in text
    assert "teacher_offload" not in text


# --- speed ------------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {
    "backend": "auto", "quantizable_base": "", "checkpointing": "on (unsloth)", "unsloth": True,
    "layer_classes": "", "weight_bytes": 5, "gpu_bytes": 24,
}  # fmt: skip


def test_a_fast_run_has_no_reasons() -> None:
    assert advice.slow_reasons(**FAST) == []
    assert (
        advice.slow_reasons(**FAST | {"quantizable_base": "bfloat16", "gpu_bytes": 80, "weight_bytes": 14})
        == []
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "logits"}, ["loss_backend='logits'", "auto"]),
        ({"backend": "torch"}, ["loss_backend='torch'", "kernels"]),
        ({"quantizable_base": "bfloat16", "weight_bytes": 14}, ["58%", "load_in_4bit=True"]),
        (
            {"quantizable_base": "bfloat16", "weight_bytes": 14, "unsloth": False},
            ["58%", "BitsAndBytesConfig"],
        ),
        ({"gpu_bytes": 192}, ["gradient checkpointing", "3%"]),
        ({"backend": "torch", "weight_bytes": None, "gpu_bytes": 192}, ["loss_backend='torch'"]),
        ({"layer_classes": "ALayer", "gpu_bytes": 0}, ["ZeRO-3", "--deepspeed_moe_layer_cls_names ALayer,"]),
    ],
)
def test_every_reason_has_a_fix(change: dict[str, Any], words: list[str]) -> None:
    (reason,) = advice.slow_reasons(**FAST | change)
    for word in words:
        assert word in reason


def test_one_warning_at_construction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        tiny.trainer(tmp_path, sdpo_config=tiny.config(loss_backend="logits"))
        tiny.trainer(tmp_path, sdpo_config=tiny.config(loss_backend="auto"))
    assert sum("slower than it needs" in record.message for record in caplog.records) == 1


def under_deepspeed(trainer: Any, *, stage: int = 3, named: str | None = None, **options: Any) -> Any:
    """What the advice reads of a trainer under DeepSpeed; `named` are the classes that accelerate was given."""
    plugin = SimpleNamespace(
        zero_stage=stage,
        transformer_moe_cls_names=named,
        deepspeed_config={"zero_optimization": {"stage": stage, **options}},
    )
    return SimpleNamespace(
        args=trainer.args, accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    )


def layer_classes(trainer: Any, *, model: Any = None, **settings: Any) -> str:
    run = under_deepspeed(trainer, **settings)
    return advice._layer_classes(run, trainer.model if model is None else model)


def test_nothing_is_said_of_weights_that_are_sharded(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    whole = advice._weight_bytes(trainer, trainer.model)
    assert whole == 4 * sum(p.numel() for p in trainer.model.parameters())
    assert advice._weight_bytes(under_deepspeed(trainer, stage=2), trainer.model) == whole
    assert advice._weight_bytes(under_deepspeed(trainer), trainer.model) is None
    fsdp = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(), deepspeed_plugin=None))
    assert advice._weight_bytes(SimpleNamespace(accelerator=fsdp), trainer.model) is None


def test_only_a_base_that_is_not_trained_could_be_quantized(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = tiny.trainer(tmp_path / "a", peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    assert advice._quantizable_base(adapter.model) == "float32"
    for parameter in adapter.model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    assert advice._quantizable_base(adapter.model) == "float32"
    adapter.model.get_base_model().is_loaded_in_4bit = True
    assert advice._quantizable_base(adapter.model) == ""
    full = tiny.trainer(tmp_path / "b")
    assert advice._quantizable_base(full.model) == ""
    assert "load_in_4bit" not in advice.advice(full)


def test_the_layers_of_a_zero3_run_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", raising=False)
    trainer = tiny.trainer(tmp_path)
    assert advice._layer_classes(trainer, trainer.model) == ""
    assert layer_classes(trainer) == "Qwen2DecoderLayer"
    assert layer_classes(trainer, stage=2) == ""
    assert layer_classes(trainer, named="Qwen2DecoderLayer") == ""
    assert layer_classes(trainer, leaf_module={"classes": ["Qwen2DecoderLayer"]}) == ""
    assert layer_classes(trainer, stage3_module_granularity_threshold=4_000_000) == ""
    assert layer_classes(trainer, module_granularity_threshold=4_000_000) == ""
    assert layer_classes(trainer, stage3_module_granularity_threshold=0, leaf_module={}) != ""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "Qwen2DecoderLayer")
    assert layer_classes(trainer) == ""


def test_layers_that_are_not_trained_are_not_named(tmp_path: Path) -> None:
    """As the image encoder of a multimodal model, which the trainer freezes."""
    trainer = tiny.trainer(tmp_path)
    model = model_families.random_model("qwen3_vl")
    assert layer_classes(trainer, model=model) == "Qwen3VLTextDecoderLayer,Qwen3VLVisionBlock"
    model.model.visual.requires_grad_(False)
    assert layer_classes(trainer, model=model) == "Qwen3VLTextDecoderLayer"


def test_layers_are_named_where_their_input_has_a_gradient(tmp_path: Path) -> None:
    """Otherwise DeepSpeed's backward fails with whole layers."""
    from peft import LoraConfig

    def trainer(name: str, *, checkpointing: bool = False) -> Any:
        lora = LoraConfig(r=4, target_modules=["q_proj"])
        return tiny.trainer(tmp_path / name, peft_config=lora, gradient_checkpointing=checkpointing)

    assert layer_classes(trainer("checkpointed", checkpointing=True)) == "Qwen2DecoderLayer"
    adapter = trainer("adapter")
    assert layer_classes(adapter) == ""
    adapter.model.enable_input_require_grads()
    assert layer_classes(adapter) == "Qwen2DecoderLayer"
    frozen = tiny.trainer(tmp_path / "frozen")
    frozen.model.get_input_embeddings().requires_grad_(False)
    assert layer_classes(frozen) == ""


def test_parts_of_a_layer_are_not_named(tmp_path: Path) -> None:
    """`_no_split_modules` is about devices: it may have parts of a layer, or nothing."""
    trainer = tiny.trainer(tmp_path)
    trainer.model._no_split_modules = {"Qwen2MLP", "Qwen2DecoderLayer"}
    assert layer_classes(trainer) == "Qwen2DecoderLayer"
    trainer.model._no_split_modules = None
    assert layer_classes(trainer) == ""
    trainer.model.get_input_embeddings = lambda: None
    assert layer_classes(trainer) == ""


# --- the report, without Unsloth --------------------------------------------------------------------------


def test_the_report_works_without_unsloth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig

    trainer = tiny.trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    capsys.readouterr()
    text = training_report(trainer)
    assert capsys.readouterr().out == text + "\n"
    for part in (
        "over TRL's GRPOTrainer",
        "loaded by transformers, base float32",
        "adapters: default",
        "compute_loss: SDPOTrainer → ",
        "prediction_step: GRPOTrainer",
        f"torch {torch.__version__}",
        "GPU none",
        "python " + sys.version.split()[0],
    ):
        assert part in text
    mebibytes = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) * 4 / 2**20
    assert f"teacher: ema, 4 tensors, {mebibytes:.1f} MiB" in text
    (saving,) = [line for line in text.splitlines() if line.startswith("  _save_checkpoint: ")]
    assert saving.startswith("  _save_checkpoint: ResumableTrainer → ")
    assert "writes the teacher" in saving


def test_the_report_needs_a_trainer() -> None:
    with pytest.raises(TypeError, match="built SDPOTrainer, got int"):
        training_report(3)


def test_the_report_of_grpo(tmp_path: Path) -> None:
    text = training_report(tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False)))
    assert "loss: TRL's GRPO (enabled=False)" in text


# --- the upgrade check ------------------------------------------------------------------------------------


def problems(trainer: type = trl.GRPOTrainer, config: type = trl.GRPOConfig) -> dict[str, str]:
    findings = upgrade_check.check(trainer, config, upgrade_check.EXPECTATIONS, unsloth=False)
    return {finding.expectation.split("(")[0]: finding.problem for finding in findings if finding.problem}


def test_the_installed_versions_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade_check, "patch_with_unsloth", lambda: "not asked for")
    assert problems() == {}
    assert upgrade_check.main() == 0
    assert "expectations hold" in capsys.readouterr().out


def test_planted_changes_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Renamed(trl.GRPOTrainer):
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, token_ids: Any) -> None: ...

    assert "no parameter completion_ids_list" in problems(Renamed)["GRPOTrainer._calculate_rewards"]

    class Passing(trl.GRPOTrainer):
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> None: ...

    assert problems(Passing) == {}, "a wrapper changes nothing"

    class Gone(trl.GRPOTrainer.__mro__[1]):  # type: ignore[misc]
        pass

    assert problems(Gone)["GRPOTrainer._calculate_rewards"] == "gone"
    with monkeypatch.context() as patch:
        patch.setattr(
            trl.GRPOTrainer, "_generate_and_score_completions", lambda self, inputs: {"ids": inputs}
        )
        (text, *_) = [key for key in problems() if "mentions" in key]
        assert "no longer mentions" in problems()[text]
        patch.setattr(upgrade_check, "patch_with_unsloth", lambda: "not asked for")
        assert upgrade_check.main() == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out
    assert "needed because: the keys of a scored batch" in out

    class Trainer:
        use_vllm = False

        def __init__(self, steps: int) -> None:
            self._step, self.tools = steps, self._env_tools
            self._metrics: dict[str, float] = {}

    lost = {key for key, problem in problems(Trainer).items() if problem == "gone"}
    assert {"GRPOTrainer._env_tools", "GRPOTrainer._tr_loss"} <= lost
    assert not {f"GRPOTrainer.{name}" for name in ("use_vllm", "_step", "tools", "_metrics")} & lost

    @dataclasses.dataclass
    class Config:
        beta: float = 0.0

    assert problems(config=Config)["GRPOConfig.num_generations"] == "gone"
    assert "GRPOConfig.beta" not in problems(config=Config)


# What `transformers.Trainer` documents for its subclasses.
PUBLIC = {
    "accelerator",
    "add_callback",
    "args",
    "model",
    "processing_class",
    "push_to_hub",
    "remove_callback",
}
PUBLIC |= {"callback_handler", "is_world_process_zero", "optimizer", "save_model", "state", "train_dataset"}
OUR_KEYS = {
    "teacher_prompt_ids",
    "teacher_prompt_mask",
    "row_mask",
    "loss_mask",
    "row_weights",
    "rollout_row",
}
OUR_KEYS |= {f"policy_{name}" for name in ("mask", "advantages", "weights", "kl_weights", "entropy_weights")}


def inherited(sources: dict[str, str]) -> tuple[set[str], set[str]]:
    """Attributes of a trainer that no part of ours defines, and keys of a batch, as the sources read them."""
    defined, read, keys = set(), set(), set()
    for source in sources.values():
        module = ast.parse(source)
        for part in module.body:
            ours = isinstance(part, ast.ClassDef) and part.name in {"SDPOTrainer", "ResumableTrainer"}
            if ours:
                defined |= {node.name for node in part.body if isinstance(node, ast.FunctionDef)}
                targets = [node.target for node in part.body if isinstance(node, ast.AnnAssign)]
                targets += [t for node in part.body if isinstance(node, ast.Assign) for t in node.targets]
                defined |= {target.id for target in targets}
            for node in ast.walk(part):
                match node:
                    case ast.Attribute(ast.Name("self"), name, ast.Store()) if ours:
                        defined.add(name)
                    case ast.Attribute(ast.Name("self"), name) if ours:
                        read.add(name)
                    case ast.Attribute(ast.Name("trainer"), name):
                        read.add(name)
                    case ast.Attribute(ast.Call(ast.Name("super")), name) if ours:
                        read.add(f"super {name}")
                    case ast.Call(
                        ast.Name("getattr" | "hasattr"), [ast.Name("self"), ast.Constant(name), *_]
                    ) if ours:
                        read.add(name)
                    case ast.Call(
                        ast.Name("getattr" | "hasattr"), [ast.Name("trainer"), ast.Constant(name), *_]
                    ):
                        read.add(name)
                    case ast.Subscript(
                        ast.Name("inputs" | "completions" | "output"), ast.Constant(str(key))
                    ) | ast.Call(
                        ast.Attribute(ast.Name("inputs" | "completions" | "output"), "get"),
                        [ast.Constant(str(key)), *_],
                    ):
                        keys.add(key)
    above = {name.removeprefix("super ") for name in read if name.startswith("super ")}
    below = {name for name in read if not name.startswith("super ")} - defined
    return {name for name in above | below if not name.startswith("__")}, keys


def sources() -> dict[str, str]:
    check = Path(upgrade_check.__file__)
    return {str(path): path.read_text() for path in check.parents[1].rglob("*.py") if path != check}


def test_the_check_knows_all_that_is_inherited() -> None:
    expected = upgrade_check.EXPECTATIONS
    named = {e.name for e in expected if isinstance(e, upgrade_check.Method | upgrade_check.Attribute)}
    words = {word.strip('"') for e in expected if isinstance(e, upgrade_check.Text) for word in e.words}
    attributes, keys = inherited(sources())
    assert {"_tool_call_loop", "_batch_environments", "environments", "is_fsdp_enabled"} <= attributes
    assert {"tool_mask", "importance_sampling_ratio", "old_per_token_logps"} <= keys
    assert (attributes | set(progress.RUNNING_LOSS)) - PUBLIC - named == set()
    assert keys - OUR_KEYS - words == set()


def test_the_collection_rejects_a_name_that_nobody_listed() -> None:
    counter_example = "class SDPOTrainer:\n def train(self, inputs):\n"
    counter_example += "  self._ours = super()._a(getattr(self, '_b', self._c))\n"
    counter_example += "  return self._ours + self.train.d + inputs['e'] + inputs.get('f')\n"
    counter_example += "def load(trainer):\n return trainer._g\n"
    counter_example += "class ResumableTrainer:\n def resume(self):\n  return self._ours + self._h\n"
    assert inherited({"counter-example": counter_example}) == ({"_a", "_b", "_c", "_g", "_h"}, {"e", "f"})

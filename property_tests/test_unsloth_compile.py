"""Packed rows in layers that Unsloth compiles: each row's values and gradients are those of the row alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import unsloth_driver as driver
from torch import Tensor, nn

from sdpo_rl.compat import unsloth_compile
from sdpo_rl.compat.unsloth_compile import PackedRows, compiled_packed_rows
from sdpo_rl.teacher import shards

needs_unsloth = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
HEADS, HEAD_DIM = 2, 4
WIDTH = HEADS * HEAD_DIM

# What the layers of Unsloth do with packed rows, in a module of their own as there.
UNSLOTH = """
from torch import nn

class Attention(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.project, self.heads, self.window = nn.Linear(width, 3 * width), heads, window

    def forward(self, hidden, attention_mask=None, **kwargs):
        parts = self.project(hidden).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        rows = get_packed_info_from_kwargs(kwargs, hidden.device)
        context = Context(seq_info=rows, attention_mask=attention_mask, sliding_window=self.window)
        output = run_attention(config=Config(), context=context, Q=query, K=key, V=value)
        return output.flatten(-2)

class DecoderLayer(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.self_attn = Attention(*sizes)

def LlamaDecoderLayer_fast_forward(self, hidden, *args, **kwargs):
    return hidden + self.self_attn(hidden, **kwargs)
"""


@dataclass
class Config:
    sdpa_kwargs: dict[str, Any] | None = None


@dataclass
class Context:
    seq_info: Any
    attention_mask: Tensor | None = None
    prefix_seg_info: Any = None
    is_causal: bool = True
    sliding_window: int | None = None


def find_rows(kwargs: dict[str, Any], device: torch.device) -> Any:
    lengths = kwargs.get("packed_seq_lengths")
    if lengths is None:
        return None
    ends = lengths.cumsum(0, dtype=torch.int32)
    return lengths, torch.cat([ends.new_zeros(1), ends]), int(lengths.max())


def run_attention(*, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """Row by row, as Unsloth's with lengths on the host."""
    lengths = [Q.shape[2]] if context.seq_info is None else context.seq_info[0].tolist()
    rows = zip(*(each.split(lengths, 2) for each in (Q, K, V)), strict=True)
    return torch.cat([one_row(*row, window=context.sliding_window) for row in rows], 2).transpose(1, 2)


def one_row(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """Of [1, H, T, D], from the definition: a token attends to itself and to the `window` - 1 before it."""
    outputs = []
    for t in range(query.shape[2]):
        first = 0 if window is None else max(t - window + 1, 0)
        scores = query[:, :, t : t + 1] @ key[:, :, first : t + 1].transpose(-1, -2) / key.shape[-1] ** 0.5
        outputs.append(scores.softmax(-1) @ value[:, :, first : t + 1])
    return torch.cat(outputs, 2)


class Kernel:
    """In the place of the kernel: attention [N, H, D] of rows by a mask of their cumulative lengths."""

    def __init__(self, *, leaks: bool = False) -> None:
        self.leaks = leaks

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        starts_of_keys: Tensor,
        longest: int,
        longest_of_keys: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> Tensor:
        place = torch.arange(query.shape[0])
        row = (place[:, None] >= starts[None, 1:]).sum(1)
        left, right = window_size
        distance = place[:, None] - place[None]
        mask = (distance >= -right) & ((distance <= left) if left >= 0 else True)
        if not self.leaks:
            mask = mask & (row[:, None] == row[None])
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        scores = query @ key.transpose(-1, -2) * (scale or key.shape[-1] ** -0.5)
        return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(0, 1)


class Unsloth:
    """A stand-in for Unsloth: its modules, and a model of layers that it compiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: Any, *, window: int | None = None) -> None:
        self.llama = ModuleType("unsloth.models.llama")
        self.names = vars(self.llama)
        self.names |= {"Config": Config, "Context": Context}
        exec(UNSLOTH, self.names)
        self.names |= {"get_packed_info_from_kwargs": find_rows, "run_attention": run_attention}
        packing, dispatch = ModuleType("packing"), ModuleType("dispatch")
        packing.get_packed_info_from_kwargs = find_rows  # type: ignore[attr-defined]
        dispatch.run_attention = run_attention  # type: ignore[attr-defined]
        for name, module in (
            ("unsloth.models.llama", self.llama),
            ("unsloth.utils.packing", packing),
            ("unsloth.utils.attention_dispatch", dispatch),
        ):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(unsloth_compile, "grouped_kernel", lambda: kernel)
        monkeypatch.setattr(unsloth_compile, "_kernel_takes", lambda hidden: True)
        monkeypatch.setattr(unsloth_compile, "_HALF", (torch.float64,))
        unsloth_compile._replacements.cache_clear()
        torch._dynamo.reset()
        self.graphs = 0
        self.compiled_calls = 0
        self.layer: type = self.llama.DecoderLayer
        self.compile(self.llama.LlamaDecoderLayer_fast_forward)
        torch.manual_seed(0)
        layers = [self.layer(WIDTH, HEADS, window).double() for _ in range(2)]
        self.model = nn.Sequential(*layers)

    def compile(self, original: Callable[..., Any]) -> None:
        """As `unsloth.models._block_compile` does."""

        def count(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return graph

        compiled = torch.compile(original, backend=count, fullgraph=True)

        def forward(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not layer.training or kwargs.get("packed_seq_lengths") is not None:
                return original(layer, hidden, *args, **kwargs)
            self.compiled_calls += 1
            torch._dynamo.maybe_mark_dynamic(hidden, 1)
            return compiled(layer, hidden, *args, **kwargs)

        forward._unsloth_block_original = original  # type: ignore[attr-defined]
        self.layer.forward = forward  # type: ignore[attr-defined]

    def run(self, hidden: Tensor, lengths: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        if lengths is not None:
            kwargs["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        for layer in self.model:
            hidden = layer(hidden, **kwargs)
        return hidden

    def functions(self) -> list[Any]:
        return [self.names[name] for name in ("get_packed_info_from_kwargs", "run_attention")]


@pytest.fixture
def unsloth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unsloth]:
    yield Unsloth(monkeypatch, Kernel())
    torch._dynamo.reset()


def values_and_gradients(model: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = run(hidden)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), [hidden, *model.parameters()])]


def check(unsloth: Unsloth, lengths: Sequence[int]) -> None:
    """Compiled, the packed rows have the values and gradients of the rows alone."""
    hidden = torch.randn(1, sum(lengths), WIDTH, dtype=torch.float64)
    unsloth.model.train()

    def alone(hidden: Tensor) -> Tensor:
        return torch.cat([unsloth.run(row, [row.shape[1]]) for row in hidden.split(lengths, 1)], 1)

    expected = values_and_gradients(unsloth.model, alone, hidden)
    assert unsloth.compiled_calls == 0
    with compiled_packed_rows(unsloth.model):
        found = values_and_gradients(unsloth.model, lambda hidden: unsloth.run(hidden, lengths), hidden)
    assert unsloth.compiled_calls == len(unsloth.model)
    unsloth.compiled_calls = 0
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)


def test_packed_rows_are_compiled_and_those_of_rows_alone(unsloth: Unsloth) -> None:
    check(unsloth, [3, 1, 5])


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_sliding_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Unsloth(monkeypatch, Kernel(), window=window), [3, 6, 2])


def test_the_check_detects_rows_that_attend_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check(Unsloth(monkeypatch, Kernel(leaks=True)), [3, 1, 5])


def test_other_lengths_and_numbers_of_rows_are_not_compiled_again(unsloth: Unsloth) -> None:
    for lengths in (
        [3, 1, 5],
        [2, 6, 4],
        [7, 2],
    ):  # the largest length is a number, dynamic from its second value
        check(unsloth, lengths)
    graphs = unsloth.graphs
    for lengths in ([5, 8, 3, 2], [9, 1, 4], [4, 4], [11, 3, 2, 2, 6]):
        check(unsloth, lengths)
    assert unsloth.graphs == graphs


def test_afterwards_the_functions_and_forwards_are_back(unsloth: Unsloth) -> None:
    def fail() -> None:
        with compiled_packed_rows(unsloth.model):
            assert unsloth.functions() != [find_rows, run_attention]
            assert all("forward" in vars(layer) for layer in unsloth.model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert unsloth.functions() == [find_rows, run_attention]
    assert not any("forward" in vars(layer) for layer in unsloth.model)


def test_a_second_step_has_the_same_functions(unsloth: Unsloth) -> None:
    """Else every layer would be compiled again in every step."""
    seen = []
    for _ in range(2):
        with compiled_packed_rows(unsloth.model):
            seen.append(unsloth.functions())
    assert seen[0] == seen[1]


def test_padded_rows_run_as_unsloth_runs_them(unsloth: Unsloth) -> None:
    hidden = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    unsloth.model.eval()
    expected = unsloth.run(hidden)
    with compiled_packed_rows(unsloth.model):
        assert torch.equal(unsloth.run(hidden), expected)
    assert unsloth.compiled_calls == 0


def test_packed_rows_in_evaluation_mode_are_compiled(unsloth: Unsloth) -> None:
    """As those of the teacher; the modules within a layer stay in evaluation mode, and afterwards the layer is."""
    hidden = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    unsloth.model.eval()
    expected = unsloth.run(hidden, [2, 4])
    modes = []
    for layer in unsloth.model:
        layer.self_attn.register_forward_hook(lambda module, *_: modes.append(module.training))
    with compiled_packed_rows(unsloth.model), torch.no_grad():
        found = unsloth.run(hidden, [2, 4])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert unsloth.compiled_calls == len(unsloth.model)
    assert not any(modes)
    assert not any(module.training for module in unsloth.model.modules())


def test_the_mode_is_back_after_an_error(unsloth: Unsloth) -> None:
    layer = unsloth.model.eval()[0]
    with compiled_packed_rows(unsloth.model), pytest.raises(TypeError):
        layer(
            torch.zeros(1, 3, WIDTH),
            packed_seq_lengths=torch.tensor([1, 2]),
            attention_mask=1,
            unknown=2,
            hidden=3,
        )
    assert not layer.training


def other_attention(unsloth: Unsloth) -> None:
    unsloth.names["run_attention"] = lambda **_: None


def no_unsloth(unsloth: Unsloth) -> None:
    del sys.modules["unsloth.utils.packing"].get_packed_info_from_kwargs


def other_layer(unsloth: Unsloth) -> None:
    unsloth.compile(lambda layer, hidden, **kwargs: hidden)


def uncompiled(unsloth: Unsloth) -> None:
    unsloth.layer.forward = unsloth.llama.LlamaDecoderLayer_fast_forward  # type: ignore[attr-defined]


def forward_of_its_own(unsloth: Unsloth) -> None:
    for layer in unsloth.model:
        vars(layer)["forward"] = layer.forward


@pytest.mark.parametrize("change", [other_attention, no_unsloth, other_layer, uncompiled, forward_of_its_own])
def test_other_layers_stay_as_they_are(unsloth: Unsloth, change: Callable[[Unsloth], None]) -> None:
    change(unsloth)
    before = unsloth.functions(), [dict(vars(layer)) for layer in unsloth.model]
    with compiled_packed_rows(unsloth.model):
        assert (unsloth.functions(), [dict(vars(layer)) for layer in unsloth.model]) == before
    assert (unsloth.functions(), [dict(vars(layer)) for layer in unsloth.model]) == before


@pytest.mark.parametrize("cause", ["no kernel", "a sharded model"])
def test_without_a_kernel_or_whole_parameters_nothing_changes(
    unsloth: Unsloth, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    if cause == "no kernel":
        monkeypatch.setattr(unsloth_compile, "grouped_kernel", lambda: None)
    else:
        monkeypatch.setattr(shards, "is_sharded", lambda model: True)
    with compiled_packed_rows(unsloth.model):
        assert unsloth.functions() == [find_rows, run_attention]
        assert not any("forward" in vars(layer) for layer in unsloth.model)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": torch.ones(1)},
        {"prefix_seg_info": object()},
        {"is_causal": False},
        {"dtype": torch.float32},
        {"seq_info": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_attention_is_unsloths(unsloth: Unsloth, changes: dict[str, Any]) -> None:
    rows = PackedRows(*find_rows({"packed_seq_lengths": torch.tensor([1, 2])}, torch.device("cpu")))
    dtype = changes.get("dtype", torch.float64)
    query, key, value = torch.randn(3, 1, HEADS, 3, HEAD_DIM, dtype=torch.float64).to(dtype).unbind(0)
    context = Context(rows)
    calls = []

    def attend(**arguments: Any) -> Tensor:
        calls.append(arguments)
        return run_attention(**arguments)

    _, replaced = unsloth_compile._replacements(find_rows, attend, Kernel())
    context = replace(context, **{name: value for name, value in changes.items() if name != "dtype"})
    replaced(config=Config(), context=context, Q=query, K=key, V=value)
    assert len(calls) == 1


def test_the_scale_of_the_configuration_is_the_kernels(unsloth: Unsloth) -> None:
    scales = []

    def kernel(query: Tensor, *_: Any, scale: float | None, **__: Any) -> Tensor:
        scales.append(scale)
        return query

    rows = PackedRows(*find_rows({"packed_seq_lengths": torch.tensor([1, 2])}, torch.device("cpu")))
    _, attend = unsloth_compile._replacements(find_rows, run_attention, kernel)
    query = torch.randn(1, HEADS, 3, HEAD_DIM, dtype=torch.float64)
    for options in (None, {}, {"scale": 0.3}):
        attend(config=Config(options), context=Context(rows), Q=query, K=query, V=query)
    assert scales == [None, None, 0.3]


# --- in a fresh process, with Unsloth ----------------------------------------------------------------------------


def observe() -> dict[str, Any]:
    """Unsloth's layers on packed rows, against its own attention; the compiler is the identity."""
    from unsloth import FastLanguageModel
    from unsloth.models import _block_compile, llama, mistral, qwen3

    model = driver.fast_model(FastLanguageModel, driver.tokenizer())
    driver.randomize_lora(model)
    compile_function, torch.compile = torch.compile, lambda function, **_: function
    layers = [module for module in model.modules() if type(module).__name__ == "Qwen2DecoderLayer"]
    os.environ["UNSLOTH_COMPILE_DISABLE"] = "0"
    _block_compile._wrap(type(layers[0]), {})
    torch.compile = compile_function
    unsloth_compile.grouped_kernel = lambda: Kernel()
    unsloth_compile._kernel_takes = lambda hidden: True
    unsloth_compile._HALF = (torch.float32,)
    ids = torch.randint(3, 30, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (4, 3, 5)])[None]
    compiled: list[bool] = []
    attend = Kernel.__call__

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        compiled.append(_block_compile._IN_BLOCK[0] != 0)
        return attend(*args, **kwargs)

    Kernel.__call__ = counted  # type: ignore[method-assign]

    def results() -> list[Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, position_ids=positions).logits
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.for_training()
    expected = results()
    assert not compiled
    with compiled_packed_rows(model):
        found = results()
    gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    spaces = [vars(module) for module in (llama, mistral, qwen3)]
    attentions = [llama.LlamaAttention_fast_forward, mistral.MistralAttention_fast_forward]
    attentions.append(qwen3.Qwen3Attention_fast_forward)
    places = (unsloth_compile._FIND_ROWS, unsloth_compile._ATTEND)
    return {
        "gap": gap,
        "gradients": len(found) - 1,
        "layers": len(layers),
        "in compiled layers": compiled,
        "names": [
            function.__globals__ is names and names[name] is unsloth_compile._found((module, name))
            for function, names in zip(attentions, spaces, strict=True)
            for module, name in places
        ],
    }


@needs_unsloth
def test_layers_of_unsloth(tmp_path: Path) -> None:
    """Packed rows reach the kernel from compiled layers, with the values and gradients of Unsloth's attention."""
    seen = driver.run("test_unsloth_compile:observe", tmp_path, interpreter=True)
    print(seen)
    assert seen["gap"] < 1e-5
    assert seen["gradients"] == 2 * seen["layers"] * len(driver.PROJECTIONS)
    # The forward and its recomputation under checkpointing.
    assert len(seen["in compiled layers"]) >= 2 * seen["layers"]
    assert all(seen["in compiled layers"])
    assert all(seen["names"])
    assert len(seen["names"]) == 6

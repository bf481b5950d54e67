"""Packed and grouped rows have the losses and gradients of padded ones, and no row depends on another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from strategies import Claim
from torch import Tensor, nn

from sdpo_rl.step import forward as step_forward
from sdpo_rl.step import model_check, packing
from sdpo_rl.step.batch import TokenBatch, left_pad, position_ids
from sdpo_rl.step.head import head_transform
from sdpo_rl.step.packing import CallLimits, ModelCall

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "initializer_range": 0.3, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
# The implementation of experts that has double precision.
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
         "mamba_d_state": 4, "mamba_dt_rank": 4}  # fmt: skip

Build = Callable[[], nn.Module]


def build(
    name: str, settings: dict[str, Any] = SHAPE, *, head: str = "ForCausalLM", **changes: Any
) -> nn.Module:
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{head}")(config_class(**{**settings, **changes})).eval()


def adapted() -> nn.Module:
    model = get_peft_model(build("Qwen2"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


PACKABLE: dict[str, Build] = {
    "llama": partial(build, "Llama"),
    "llama, eager": partial(build, "Llama", attn_implementation="eager"),
    "qwen2": partial(build, "Qwen2"),
    "qwen3": partial(build, "Qwen3", head_dim=8),
    "gemma2, soft-capped": partial(
        build, "Gemma2", head_dim=8, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3, windows": partial(build, "Gemma3", head_dim=8, sliding_window=4),
    "mistral, a window shorter than a row": partial(build, "Mistral", sliding_window=4),
    "phi3": partial(build, "Phi3"),
    "gpt2, absolute positions": partial(build, "GPT2", GPT2, head="LMHeadModel"),
    "mixtral": partial(build, "Mixtral", **EXPERTS),
    "lora": adapted,
}
OTHERS: dict[str, Build] = {
    "jamba, recurrent layers": partial(build, "Jamba", **JAMBA),
    "mamba": partial(build, "Mamba", state_size=4),
    "recurrent gemma": partial(build, "RecurrentGemma", lru_width=16, attention_window_size=8),
    "bloom, alibi": partial(build, "Bloom", n_layer=2, n_head=2),
    "falcon, alibi": partial(build, "Falcon", alibi=True),
    "opt, positions from the mask": partial(build, "OPT", ffn_dim=24, word_embed_proj_dim=16),
    "llama4, chunks": partial(
        build, "Llama4", head_dim=8, attention_chunk_size=32, num_local_experts=2, intermediate_size_mlp=24
    ),
}
ROWS = [([5, 6, 7], [8, 9, 10, 11]), ([12, 13, 14, 15, 16], [17]), ([18, 19], [20, 21, 22, 23, 24, 25, 26]),
        ([27, 28, 29, 30], [31, 32, 33])]  # fmt: skip

Rows = Sequence[tuple[list[int], list[int]]]


def batch_of(rows: Rows) -> TokenBatch:
    prompts, prompt_mask = left_pad([row[0] for row in rows], pad_id=0, device=torch.device("cpu"))
    reverse, reverse_mask = left_pad([row[1][::-1] for row in rows], pad_id=0, device=torch.device("cpu"))
    ids = torch.cat([prompts, reverse.flip(1)], dim=1)
    mask = torch.cat([prompt_mask, reverse_mask.flip(1)], dim=1)
    return TokenBatch(ids, mask, [(len(p), len(c)) for p, c in rows])


def losses(
    model: Any, rows: Rows, layout: str, *, token_limit: float = math.inf, calls: int = 0
) -> list[Tensor]:
    """Minus the log-probabilities of each row's completion, by the forwards of a layout."""
    batch = batch_of(rows)
    length = batch.completion_length
    forward = partial(step_forward.completion_head, model, model)
    if layout == "padded":
        positions = position_ids(batch.mask)
        arguments = step_forward.forward_arguments(model, batch.ids, batch.mask, positions, length + 1)
        head = forward(arguments, length=length)
    else:
        if layout == "packed":
            chosen = packing.packed_rows(batch.sizes, token_limit=token_limit)
        else:
            chosen = packing.alike_rows(batch.sizes, CallLimits(math.inf, token_limit, 1.0))
        made = packing.model_calls(batch, layout, chosen, count=calls)
        arguments = [step_forward.call_arguments(model, call) for call in made]
        head = packing.run_calls(forward, made, arguments=arguments, rows=len(rows), length=length)
    transform = head_transform(model.config)
    logits = nn.functional.linear(head.hidden, head.weight, head.bias) * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    log_probs = logits.log_softmax(-1)
    return [-log_probs[i, range(len(completion)), completion].sum() for i, (_, completion) in enumerate(rows)]


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    named = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, named, allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


# --- losses and gradients ---------------------------------------------------------------------------------


CASES = [*((name, layout) for name in PACKABLE for layout in ("packed", "groups")),
         ("jamba, recurrent layers", "groups"), ("mamba", "groups")]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_layout_has_the_losses_and_gradients_of_padded_rows(name: str, layout: str) -> None:
    model = {**PACKABLE, **OTHERS}[name]()
    expected = torch.stack(losses(model, ROWS, "padded"))
    wanted = gradient(model, expected.sum())
    for token_limit in (math.inf, 14):
        got = torch.stack(losses(model, ROWS, layout, token_limit=token_limit))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (gradient(model, got.sum()) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_it_does_in_double_precision(layout: str) -> None:
    model = build("Llama").double()
    expected = torch.stack(losses(model, ROWS, "padded"))
    got = torch.stack(losses(model, ROWS, layout, token_limit=14))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = gradient(model, expected.sum())
    assert (gradient(model, got.sum()) - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize("name", PACKABLE)
def test_other_tokens_in_one_row_change_no_other_row(name: str) -> None:
    model = PACKABLE[name]().double()
    other = [*ROWS[:1], ([36, 37, 38, 3, 4], [39]), *ROWS[2:]]
    before, after = losses(model, ROWS, "packed"), losses(model, other, "packed")
    for row in (0, 2, 3):
        torch.testing.assert_close(before[row], after[row], rtol=1e-12, atol=1e-12)
        wanted = gradient(model, before[row])
        assert (gradient(model, after[row]) - wanted).norm() <= 1e-12 * wanted.norm()
    assert (before[1] - after[1]).abs() > 1e-3


def test_rows_that_continue_each_other_s_positions_are_detected() -> None:
    """The counter-example: positions that do not restart make one row of all."""
    model = build("Llama")

    def one_row(model: Any, call: ModelCall) -> dict[str, Any]:
        arguments = step_forward.call_arguments(model, call)
        return {**arguments, "position_ids": torch.arange(call.ids.numel())[None]}

    batch = batch_of(ROWS)
    calls = packing.model_calls(batch, "packed", [[0, 1, 2, 3]])
    forward = partial(step_forward.completion_head, model, model)
    right, wrong = (
        packing.run_calls(forward, calls, arguments=[arguments(model, *calls)], rows=4, length=7).hidden
        for arguments in (step_forward.call_arguments, one_row)
    )
    torch.testing.assert_close(right[0, :4], wrong[0, :4], rtol=1e-5, atol=1e-5)
    assert (right[1, 0] - wrong[1, 0]).norm() > 1e-2 * right[1, 0].norm()


def test_repeated_calls_change_nothing() -> None:
    """More calls than rows: what another process needs."""
    model = build("Llama").double()
    expected, got = (torch.stack(losses(model, ROWS, "packed", calls=n)) for n in (0, 7))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    wanted = gradient(model, expected.sum())
    assert (gradient(model, got.sum()) - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_whole_logits_of_a_layout(layout: Any) -> None:
    model = PACKABLE["gemma2, soft-capped"]()
    batch = batch_of(ROWS)
    length = batch.completion_length
    forward = partial(step_forward.completion_logits, model, model)
    padded = step_forward.forward_arguments(
        model, batch.ids, batch.mask, position_ids(batch.mask), length + 1
    )
    expected = forward(padded, length=length)
    calls = packing.model_calls(batch, layout, [[0, 2], [1, 3]])
    arguments = [step_forward.call_arguments(model, call) for call in calls]
    got = packing.run_calls(forward, calls, arguments=arguments, rows=len(ROWS), length=length)
    assert got.shape == expected.shape
    real = batch.mask[:, -length:].bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not got[~real].any()
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_router_loss_of_packed_rows_is_that_of_padded_ones() -> None:
    model = PACKABLE["mixtral"]()
    batch = batch_of(ROWS)
    length = batch.completion_length
    call = packing.pack(batch, range(len(ROWS)))
    padded = step_forward.forward_arguments(
        model, batch.ids, batch.mask, position_ids(batch.mask), length + 1
    )
    found: list[list[Tensor]] = [[], []]
    step_forward.completion_head(model, model, padded, length=length, router_losses=found[0])
    packed = step_forward.call_arguments(model, call)
    step_forward.completion_head(model, model, packed, index=call.predictors, router_losses=found[1])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    wanted = gradient(model, found[0][0])
    assert (gradient(model, found[1][0]) - wanted).norm() < 1e-5 * wanted.norm()
    # The counter-example: padding that counts.
    unmasked = {**padded, "attention_mask": torch.ones_like(batch.mask)}
    step_forward.completion_head(model, model, unmasked, length=length, router_losses=found[1])
    assert (found[1][1] - found[0][0]).abs() > 1e-3


# --- the test of the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_a_model_that_keeps_rows_apart_may_pack(name: str) -> None:
    assert model_check.supported_layout(PACKABLE[name](), batch_of(ROWS)) == ("packed", "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "mixtral", "lora"])
def test_it_may_in_any_precision(name: str, dtype: torch.dtype) -> None:
    assert model_check.supported_layout(PACKABLE[name]().to(dtype), batch_of(ROWS)).layout == "packed"


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_does_not_takes_groups(name: str) -> None:
    layout, reason = model_check.supported_layout(OTHERS[name](), batch_of(ROWS))
    assert layout == "groups"
    assert reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_alone_is_detected(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A model that ignores where positions restart, and declares nothing."""
    model = build("Llama").to(dtype)
    true = type(model).forward

    def forward(self: Any, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return true(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    layout, reason = model_check.supported_layout(model, batch_of(ROWS))
    assert layout == "groups"
    assert "tokens of another row" in reason


def test_wrong_positions_alone_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows apart, but absolute positions that run on."""
    model = PACKABLE["gpt2, absolute positions"]()
    embed = model.transformer.wpe

    def run_on(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.arange(args[0].shape[-1])[None],)

    embed.register_forward_pre_hook(run_on)
    layout, reason = model_check.supported_layout(model, batch_of(ROWS))
    assert layout == "groups"
    assert "separate rows" in reason


def test_a_model_whose_head_sees_other_positions_is_padded() -> None:
    """Prefix tuning has a cache; a head that is called twice cannot be watched."""
    model = build("Llama")

    def again(*_: Any) -> None:
        model.lm_head(torch.zeros(1, 1, 16))

    model.register_forward_hook(again)
    assert model_check.supported_layout(model, batch_of(ROWS)).layout == "padded"
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = get_peft_model(build("Llama"), prefix).eval()
    assert model_check.supported_layout(tuned, batch_of(ROWS)).layout != "packed"


def test_rows_of_one_repeated_token_can_be_tested() -> None:
    assert model_check.supported_layout(build("Llama"), batch_of([([7], [7, 7])])).layout == "packed"


# --- which rows share a call ------------------------------------------------------------------------------

sizes_of_rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7)


def real(sizes: Any, rows: Sequence[int]) -> int:
    return sum(max(sizes[row][0], 1) + max(sizes[row][1], 1) for row in rows)


def property_packed_rows_are_complete_and_within_the_limit(choose: Any, sizes: Any, limit: int) -> None:
    calls = choose(sizes, token_limit=limit)
    assert sorted(row for rows in calls for row in rows) == list(range(len(sizes)))
    assert all(len(rows) == 1 or real(sizes, rows) <= limit for rows in calls)
    # No two calls fit into one.
    loads = sorted(real(sizes, rows) for rows in calls)
    assert all(a + b > limit for a, b in pairwise(loads))


def one_row_each(sizes: Any, *, token_limit: float) -> list[list[int]]:
    return [[row] for row in range(len(sizes))]


def all_rows(sizes: Any, *, token_limit: float) -> list[list[int]]:
    return [list(range(len(sizes)))]


PACKED = [
    Claim(
        property_packed_rows_are_complete_and_within_the_limit,
        packing.packed_rows,
        wrong,
        {"sizes": sizes_of_rows, "limit": st.integers(2, 60)},
    )
    for wrong in (one_row_each, all_rows)
]


def test_packed_rows_are_complete_and_within_the_limit() -> None:
    PACKED[0].holds()
    for claim in PACKED:
        claim.rejects_counter_example()


@given(sizes=sizes_of_rows, limit=st.integers(2, 40))
def test_equal_rows_are_complete_and_without_padding(sizes: Any, limit: int) -> None:
    calls = packing.equal_rows(sizes, token_limit=limit)
    assert sorted(row for rows in calls for row in rows) == list(range(len(sizes)))
    for rows in calls:
        assert len({(max(sizes[row][0], 1), max(sizes[row][1], 1)) for row in rows}) == 1
        assert len(rows) == 1 or real(sizes, rows) <= limit


def cost(sizes: Any, calls: Sequence[Sequence[int]], overhead_tokens: float, min_tokens: float = 0) -> float:
    def positions(rows: Sequence[int]) -> int:
        return len(rows) * (max(max(sizes[r][0], 1) for r in rows) + max(max(sizes[r][1], 1) for r in rows))

    return sum(max(positions(rows) + overhead_tokens, min_tokens) for rows in calls)


def divisions(order: list[int]) -> list[list[list[int]]]:
    if not order:
        return [[]]
    return [[order[:n], *rest] for n in range(1, len(order) + 1) for rest in divisions(order[n:])]


def property_groups_cost_the_least(
    choose: Any, sizes: Any, limit: int, overhead_tokens: int, min_tokens: int
) -> None:
    calls = choose(sizes, CallLimits(limit, 3 * limit, overhead_tokens, min_tokens))
    assert sorted(row for rows in calls for row in rows) == list(range(len(sizes)))

    def allowed(rows: Sequence[int]) -> bool:
        size = cost(sizes, [rows], 0)
        return len(rows) == 1 or (size <= 3 * limit and size / len(rows) <= limit)

    assert all(map(allowed, calls))
    order = sorted(range(len(sizes)), key=lambda row: (-real(sizes, [row]), row))
    possible = [each for each in divisions(order) if all(map(allowed, each))]
    least = min(cost(sizes, each, overhead_tokens, min_tokens) for each in possible)
    assert cost(sizes, calls, overhead_tokens, min_tokens) == least


def in_the_given_order(sizes: Any, limits: CallLimits) -> list[list[int]]:
    return [[row] for row in range(len(sizes))]


GROUPS = Claim(
    property_groups_cost_the_least,
    packing.alike_rows,
    in_the_given_order,
    {
        "sizes": sizes_of_rows,
        "limit": st.integers(2, 30),
        "overhead_tokens": st.integers(0, 30),
        "min_tokens": st.integers(0, 60),
    },
)


def test_groups_cost_the_least() -> None:
    GROUPS.holds()
    GROUPS.rejects_counter_example()


@given(sizes=sizes_of_rows, count=st.integers(0, 9), limit=st.integers(2, 40))
def test_calls_are_divided_until_there_are_enough(sizes: Any, count: int, limit: int) -> None:
    calls = packing.packed_rows(sizes, token_limit=limit)
    divided = packing.divided(calls, sizes, count)
    assert sorted(row for rows in divided for row in rows) == list(range(len(sizes)))
    assert all(divided)
    assert len(divided) == max(len(calls), min(count, len(sizes)))
    assert all(any(set(rows) <= set(whole) for whole in calls) for rows in divided)


@given(sizes=sizes_of_rows)
def test_every_completion_token_is_predicted_by_the_position_before_it(sizes: Any) -> None:
    """Also in rows without a prompt or a completion, which run with one column of padding."""
    rows = [([7] * p, [8] * c) for p, c in sizes]
    batch = batch_of([(p or [0], c or [0]) for p, c in rows])._replace(sizes=sizes)
    everything = list(range(len(rows)))
    for call in (packing.pack(batch, everything), packing.group(batch, everything)):
        predicted = call.ids.flatten()[call.predictors + 1]
        length = batch.completion_length
        completions = batch.ids[:, -length:].flatten()[call.targets]
        assert torch.equal(predicted, completions)
        assert call.tokens == sum(max(p, 1) + max(c, 1) for p, c in sizes)
        assert len(call.targets.unique()) == len(call.targets) == sum(max(c, 1) for _, c in sizes)


def test_a_dense_mask_bounds_the_tokens_of_a_call() -> None:
    assert packing.default_token_limit(build("Llama").config) < math.inf
    config = build("Llama").config
    config._attn_implementation = "flash_attention_2"
    assert packing.default_token_limit(config) == math.inf

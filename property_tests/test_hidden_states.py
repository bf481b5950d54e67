"""Hidden states times LM head are the model's own logits, with its own weights or with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from sdpo_rl.step.batch import left_pad, position_ids
from sdpo_rl.step.forward import completion_head, completion_logits, forward_arguments
from sdpo_rl.step.head import head_transform, linear_head, plain_head, transform_matches

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


def build(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def phi_with_bias() -> nn.Module:
    model = build("Phi", num_key_value_heads=2)
    nn.init.normal_(model.lm_head.bias)
    return model


def adapted() -> nn.Module:
    model = get_peft_model(build("Qwen2"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def head_trained_in_full() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build("Qwen2", tie_word_embeddings=False), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def layer_twice() -> nn.Module:
    model = build("Llama")
    model.model.layers[1] = model.model.layers[0]
    model.config.use_cache = False  # it has one entry for each layer
    return model


def parameter_twice() -> nn.Module:
    """Two modules share one parameter."""
    model = build("Llama", num_key_value_heads=2)
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[1].self_attn.v_proj.weight
    return model


def tied_tokens() -> nn.Module:
    """A few trainable rows of a tied embedding; the head wraps the same rows."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    return get_peft_model(build("Qwen2", tie_word_embeddings=True), config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2, tied": lambda: build("Qwen2", tie_word_embeddings=True),
    "qwen3": lambda: build("Qwen3", head_dim=8),
    "llama": lambda: build("Llama"),
    "gemma2, soft-capped": lambda: build("Gemma2", head_dim=8, final_logit_softcapping=3.0),
    "cohere, scaled": lambda: build("Cohere", logit_scale=0.25),
    "granite, divided": lambda: build("Granite", logits_scaling=4.0),
    "phi, with a bias": phi_with_bias,
    "gpt2, absolute positions": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=2,
            eos_token_id=1,
        )
    ).eval(),
    "one layer twice": layer_twice,
    "one parameter twice": parameter_twice,
    "lora": adapted,
    "lora with a trained head": head_trained_in_full,
}
# Heads that are more than one linear map.
WRAPPED: dict[str, Callable[[], nn.Module]] = {"lora with trained tokens, tied": tied_tokens}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]
LENGTH = 3


def arguments(model: nn.Module, rows: list[list[int]] = ROWS, extra: int = 0) -> dict[str, Any]:
    """Padded on the left, by `extra` columns more than needed; all rows end with LENGTH completion tokens."""
    ids, mask = left_pad(rows, pad_id=0, device=torch.device("cpu"))
    ids, mask = (nn.functional.pad(x, (extra, 0)) for x in (ids, mask))
    return forward_arguments(model, ids, mask, position_ids(mask), LENGTH + 1)


def projected(model: nn.Module, states: Any) -> Tensor:
    transform = head_transform(model.config)
    logits = nn.functional.linear(states.hidden, states.weight, states.bias) * transform.logit_scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits


def alone(model: nn.Module, row: list[int]) -> Tensor:
    """The plain forward of one row: logits [T, V] that predict its last tokens."""
    return model(input_ids=torch.tensor([row])).logits[0, -LENGTH - 1 : -1]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_through_the_head_are_the_model_s_logits(name: str) -> None:
    model = MODELS[name]()
    for extra in (0, 3):
        given = arguments(model, extra=extra)
        through = projected(model, completion_head(model, model, given, length=LENGTH))
        whole = completion_logits(model, model, given, length=LENGTH)
        for row, got, also in zip(ROWS, through, whole, strict=True):
            torch.testing.assert_close(got, alone(model, row), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(also, alone(model, row), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_its_adapter_a_model_has_the_head_that_it_had_before() -> None:
    model = head_trained_in_full()
    adapted = projected(model, completion_head(model, model, arguments(model), length=LENGTH))
    with model.disable_adapter():
        assert transform_matches(model, arguments(model), head_transform(model.config))
        through = projected(model, completion_head(model, model, arguments(model), length=LENGTH))
        for row, got, other in zip(ROWS, through, adapted, strict=True):
            torch.testing.assert_close(got, alone(model, row), rtol=1e-4, atol=1e-5)
            assert (got - other).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_replaced_weights_are_those_of_the_other_model_and_do_not_change_this_one(name: str) -> None:
    model, other = MODELS[name](), MODELS[name]()
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    params = {n: p.detach() for n, p in other.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in model.named_parameters()}
    swapped = projected(model, completion_head(model, model, arguments(model), length=LENGTH, params=params))
    whole = completion_logits(model, model, arguments(model), length=LENGTH, params=params)
    for row, got, also in zip(ROWS, swapped, whole, strict=True):
        torch.testing.assert_close(got, alone(other, row), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(also, alone(other, row), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (swapped[0] - alone(model, ROWS[0])).abs().max() > 1e-2


def every_name(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    return {n: (p, p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)}


def unchanged(model: nn.Module, before: dict[str, tuple[nn.Parameter, Tensor]]) -> bool:
    """Every name has the same parameter object, with the same bits."""
    now = dict(model.named_parameters(remove_duplicate=False))
    return now.keys() == before.keys() and all(
        now[n] is p and torch.equal(p.detach().view(torch.uint8), bits.view(torch.uint8))
        for n, (p, bits) in before.items()
    )


class BrokenError(Exception):
    """Raised in the middle of a forward."""


def break_down(*_: Any) -> None:
    raise BrokenError


@pytest.mark.parametrize("breaks", [False, True], ids=["", "breaks down"])
@pytest.mark.parametrize("name", [*MODELS, *WRAPPED])
@torch.no_grad()
def test_a_forward_with_replaced_weights_restores_the_parameters(name: str, breaks: bool) -> None:
    model = {**MODELS, **WRAPPED}[name]()
    before = every_name(model)
    params = {n: p.detach() + 1.0 for n, p in model.named_parameters() if p.requires_grad}
    if breaks:
        model.get_output_embeddings().register_forward_pre_hook(break_down)
    for forward in (completion_logits, completion_head) if name in MODELS else (completion_logits,):
        if breaks:
            with pytest.raises(BrokenError):
                forward(model, model, arguments(model), length=LENGTH, params=params)
        else:
            forward(model, model, arguments(model), length=LENGTH, params=params)
        assert unchanged(model, before)


def test_the_comparison_rejects_a_parameter_restored_as_a_tensor() -> None:
    model = layer_twice()
    before = every_name(model)
    params = {n: p.detach() + 1.0 for n, p in model.named_parameters()}
    torch.func.functional_call(model, params, kwargs=arguments(model), tie_weights=True)
    assert not unchanged(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_dense_ones(name: str) -> None:
    model = MODELS[name]()
    weights = torch.randn(len(ROWS), LENGTH, VOCABULARY)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    through = projected(model, completion_head(model, model, arguments(model), length=LENGTH))
    got = torch.autograd.grad((through * weights).sum(), list(named.values()))
    dense = sum((alone(model, row) * w).sum() for row, w in zip(ROWS, weights, strict=True))
    for name_, g, d in zip(named, got, torch.autograd.grad(dense, list(named.values())), strict=True):
        torch.testing.assert_close(g, d, rtol=1e-3, atol=1e-4 * max(1.0, float(d.abs().max())), msg=name_)


@pytest.mark.parametrize("name", MODELS)
def test_the_declared_transform_is_recognised_and_a_wrong_one_is_not(name: str) -> None:
    model = MODELS[name]()
    transform = head_transform(model.config)
    assert transform_matches(model, arguments(model), transform)
    assert not transform_matches(
        model, arguments(model), transform._replace(logit_scale=transform.logit_scale * 2)
    )
    wrong_cap = None if transform.softcap is not None else 0.5
    assert not transform_matches(model, arguments(model), transform._replace(softcap=wrong_cap))


def recurrent_gemma() -> nn.Module:
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_hidden_layers", "initializer_range")}
    config = transformers.RecurrentGemmaConfig(
        **shape, num_hidden_layers=3, lru_width=16, logits_soft_cap=3.0
    )
    torch.manual_seed(0)
    return transformers.RecurrentGemmaForCausalLM(config).eval()


def with_larger_logits(model: nn.Module, factor: float) -> nn.Module:
    """The model with larger logits, which round more."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def matches(model: nn.Module, *, autocast: bool = False) -> bool:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return transform_matches(model, arguments(model, extra=3), head_transform(model.config))


def changing(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A model that changes its logits in a way that its configuration does not declare."""

    class Changing(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    model.__class__ = Changing
    return model


ROUNDING: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "recurrent gemma, soft-capped": lambda: with_larger_logits(recurrent_gemma(), 20.0),
    "granite, divided by three": lambda: build("Granite", logits_scaling=3.0),
    "cohere, odd scale": lambda: build("Cohere", logit_scale=0.3),
    "large logits": lambda: with_larger_logits(build("Qwen2", tie_word_embeddings=False), 300.0),
    "large logits, soft-capped": lambda: with_larger_logits(
        build("Gemma2", head_dim=8, final_logit_softcapping=30.0), 50.0
    ),
    "large logits, divided": lambda: with_larger_logits(build("Granite", logits_scaling=7.0), 300.0),
}


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "autocast", "autocast, as float32"])
def test_rounding_is_no_undeclared_change(name: str, kind: str) -> None:
    model = ROUNDING[name]()
    if kind in ("bfloat16", "float16"):
        model = model.to(getattr(torch, kind))
    if kind == "autocast, as float32":
        # Accelerate converts the outputs of a prepared model to float32.
        model = changing(model, Tensor.float)
    assert matches(model, autocast=kind.startswith("autocast"))


UNDECLARED: dict[str, Callable[[Tensor], Tensor]] = {
    "a scale": lambda logits: logits * 1.029,
    "a small scale": lambda logits: logits * 1.001,
    "a cap": lambda logits: 8.0 * torch.tanh(logits / 8.0),
    "a bias": lambda logits: logits + torch.linspace(0.0, 0.1, logits.shape[-1]),
    "a bias on one token": lambda logits: logits + (torch.arange(logits.shape[-1]) == 7) * 0.01,
    "other earlier positions": lambda logits: (
        logits * torch.tensor([1.01] * (logits.shape[1] - 1) + [1.0])[:, None]
    ),
    "an impossible token": lambda logits: logits.index_fill(-1, torch.tensor([4]), float("-inf")),
    "not a number": lambda logits: logits.index_fill(-1, torch.tensor([4]), float("nan")),
    "cut-off padding": lambda logits: logits[..., :-3],
    "one position alone": lambda logits: logits[:, -1:],
}


@pytest.mark.parametrize("change", UNDECLARED)
def test_an_undeclared_change_is_detected(change: str) -> None:
    model = build("Qwen2", tie_word_embeddings=False)
    assert matches(model)
    assert not matches(changing(model, UNDECLARED[change]))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast", "autocast, as float32"])
def test_an_undeclared_scale_is_detected_in_low_precision(kind: str) -> None:
    model = build("Qwen2", tie_word_embeddings=False)
    if kind in ("bfloat16", "float16"):
        model = model.to(getattr(torch, kind))
    last = Tensor.float if kind == "autocast, as float32" else torch.clone
    autocast = kind.startswith("autocast")
    assert not matches(changing(model, lambda logits: last(logits * 1.029)), autocast=autocast)


def test_impossible_tokens_of_the_head_are_recognised() -> None:
    model = phi_with_bias()
    with torch.no_grad():
        model.lm_head.bias[[3, 30]] = float("-inf")
    assert matches(model)
    finite = changing(model, lambda logits: logits.clamp(min=-1e4))
    assert not matches(finite)


def test_a_head_that_is_not_used_does_not_match() -> None:
    model = build("Qwen2", tie_word_embeddings=False)
    head, model.lm_head.forward = model.lm_head.weight, lambda hidden: hidden @ head.T
    assert matches(model)
    bare = changing(model, torch.clone)
    bare.get_output_embeddings = lambda: nn.Linear(16, VOCABULARY, bias=False)
    assert not matches(bare)


def test_the_head_never_sees_more_than_one_position() -> None:
    model = build("Qwen2")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    completion_head(model, model, arguments(model), length=LENGTH)
    assert seen == [1]


def test_hooks_are_removed_also_after_an_error() -> None:
    model = build("Qwen2")
    completion_head(model, model, arguments(model), length=LENGTH)
    beyond = {**arguments(model), "input_ids": torch.full((2, 7), VOCABULARY)}
    with pytest.raises(IndexError):
        completion_head(model, model, beyond, length=LENGTH)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
        (nn.Identity(), "Identity"),
        (type("Packed", (nn.Module,), {"weight": torch.zeros(2, 2, dtype=torch.uint8)})(), "Packed"),
    ],
    ids=["sequence", "no weight", "quantized"],
)
def test_a_head_that_is_not_one_linear_map_is_refused_by_name(head: nn.Module, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"LM head: expected a plain linear layer, got \S+\.{kind}, .*loss_backend='logits'"
    ):
        linear_head(head)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["lm_head"]),
        IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        LoHaConfig(r=2, target_modules=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}),
    ],
    ids=["lora", "ia3", "loha", "trained tokens"],
)
def test_an_adapted_head_is_refused(config: PeftConfig) -> None:
    model = get_peft_model(build("Qwen2", tie_word_embeddings=False), config)
    assert plain_head(model.get_output_embeddings()) is None
    with pytest.raises(
        ValueError, match=r"LM head: expected .*, got peft\.\S+,.*target_modules.*trainable_token_indices"
    ):
        linear_head(model.get_output_embeddings())


class LowRankLinear(nn.Linear):
    """An adapter that is a subclass of nn.Linear."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def test_an_adapter_that_is_a_linear_layer_is_not_a_plain_head() -> None:
    assert plain_head(LowRankLinear()) is None
    assert plain_head(nn.Linear(2, 2)) is not None


def test_the_tiny_model_itself() -> None:
    model = tiny.model()
    assert transform_matches(model, arguments(model), head_transform(model.config))

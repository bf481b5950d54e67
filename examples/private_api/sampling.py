"""Sampling and greedy decoding with one CUDA graph launch per token, in place of `model.generate`.

A decoding step of a small model is hundreds of short kernels, and a GPU waits for the CPU to launch each of them.
Here the step is captured once as a graph, on a key/value cache of fixed length, and each token costs one launch.
The weights are used where they are, or cast once per batch, so a graph follows an optimizer that updates them in
place. A prompt that successive rows share is prefilled once. A module of `train.py`; nothing to run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, StaticLayer

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple, so that a run captures few graphs
CACHE_MULTIPLE = 16  # attention copies a mask whose row length is not a multiple of this
CHECK_EVERY = 8  # tokens between checks whether all rows have ended; a check waits for the GPU

# Options, with the values at which they change neither the model's own distribution nor its argmax.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "repetition_penalty": (1.0,),
    "disable_compile": (True, False),
}
# Options that are handled here.
HANDLED = {
    "do_sample",
    "max_new_tokens",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "transformers_version",
}


def sample_with_graphs(model: Any, autocast: torch.dtype | None = None) -> None:
    """Replace `model.generate` where it samples from the model's own distribution, or takes its argmax.

    A call with any other option goes to the model's own method, and so does one within an autocast region if
    `autocast` is `None`.

    Args:
        model: a causal language model whose attention is "sdpa", as it was loaded, without a wrapped forward.
            Prompts have to be padded on the left.
        autocast: the dtype of the autocast region that `model.forward` runs in; `None` if it runs in none. Weights
            are then cast once for a batch instead of once for each of its tokens.
    """
    original = model.generate
    weights = _linear_weights(model) if autocast is not None else {}
    casts = {name: torch.empty_like(weight, dtype=autocast) for name, weight in weights.items()}
    sampling_model = _with_weights(model, casts) if autocast is not None else model
    samplers: dict[tuple[int, ...], Sampler] = {}
    # Graphs share a memory pool: they never run at the same time, and their results are copied out of it.
    pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    # A function, and not a method: `copy.deepcopy` of the model would copy the graphs of a method's object.
    def generate(*args: Any, **kwargs: Any) -> Tensor:
        # Autocast casts a weight once for its whole region: a graph would keep the cast of an old weight.
        if autocast is None and torch.is_autocast_enabled(model.device.type):
            return original(*args, **kwargs)
        if args or not _is_supported(model, kwargs):
            return original(*args, **kwargs)
        ids, config = kwargs["input_ids"], kwargs["generation_config"]
        width = -(-ids.shape[1] // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        known = (config.do_sample, config.max_new_tokens, config.pad_token_id)
        key = (len(ids), width, *known, *_eos_ids(config))
        # Buffers that were made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if casts:
                torch._foreach_copy_(list(casts.values()), list(weights.values()))
            if key not in samplers:
                samplers[key] = Sampler(sampling_model, len(ids), width, config, pool)
            # A graph would keep what autocast's cache had at capture.
            region = torch.autocast(model.device.type, autocast, cache_enabled=False)
            with region if autocast is not None else nullcontext():
                return samplers[key](ids, kwargs["attention_mask"])

    model.generate = generate


def draw(logits: Tensor) -> Tensor:
    """One token of each row from its softmax: `torch.multinomial` without its check, which waits for the GPU."""
    probabilities = logits.float().softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


class Sampler:
    """Samples batches of one shape.

    Args:
        model: a causal language model.
        rows: batch size.
        width: length to which prompts are padded on the left.
        config: with `do_sample`, `max_new_tokens`, `eos_token_id` and `pad_token_id`.
        pool: memory pool of the graph; by default its own.
    """

    def __init__(self, model: Any, rows: int, width: int, config: GenerationConfig, pool: Any = None) -> None:
        device, tokens = model.device, config.max_new_tokens
        length = -(-(width + tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self._model, self._width, self._tokens = model, width, tokens
        self._sample = bool(config.do_sample)
        self._pad, self._eos = config.pad_token_id, torch.tensor(_eos_ids(config), device=device)
        self._cache = Cache(layers=[_Layer(length) for _ in range(model.config.num_hidden_layers)])
        # A graph replays fixed addresses, so these are updated in place.
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._attended = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)  # cache slot of the current token
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._output = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)  # tokens written to `_output`
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = pool

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Prompts and completions, as `generate` returns them: as long as the longest completion."""
        if ids.is_cuda and self._graph is None and self._tokens > 1:
            self._graph = self._capture(ids, mask)
        step = self.step if self._graph is None else self._graph.replay
        self.start(ids, mask)
        for count in range(1, self._tokens):
            if count % CHECK_EVERY == 0 and bool(self._ended.all()):
                break
            step()
        ends = self._is_eos(self._output).long()
        unended = (ends.cumsum(1) == ends).any(0)  # columns that at least one unended row reaches
        return torch.cat([ids, self._output[:, : int(unended.sum())]], dim=1)

    def start(self, ids: Tensor, mask: Tensor) -> None:
        """Prefill the prompts, and draw the first token of each row."""
        padding = self._width - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (padding, 0), value=self._pad)
        real = torch.nn.functional.pad(mask.bool(), (padding, 0))
        positions = real.long().cumsum(1) - 1
        self._attended.fill_(False)
        self._attended[:, 0, 0, : self._width] = real
        self._position.copy_(positions[:, -1:])
        self._slot.fill_(self._width - 1)
        self._ended.fill_(False)
        self._output.fill_(self._pad)
        self._count.fill_(0)

        # Rows of a group follow one another, and have the same prompt.
        differs = ((ids[1:] != ids[:-1]) | (real[1:] != real[:-1])).any(1)
        prompt_of_row = torch.nn.functional.pad(differs.long().cumsum(0), (1, 0))
        first = torch.nn.functional.pad(differs, (1, 0), value=True)
        column = torch.arange(self._width, device=ids.device)
        # Padding attends to itself: a fully masked row gives NaN in some kernels.
        attended = (real[first, None, None] & (column <= column[:, None])) | (column == column[:, None])
        prefilled = Cache(layers=[_Layer(self._width) for _ in self._cache.layers])
        logits = self._logits(ids[first], attended, positions[first].clamp(min=0), prefilled)
        self._cache.reset()
        for layer, prompts in zip(self._cache.layers, prefilled.layers, strict=True):
            layer.update(prompts.keys[prompt_of_row], prompts.values[prompt_of_row])
        self._append(logits[prompt_of_row])

    def step(self) -> None:
        """Read the last token of each row, and draw the next one."""
        self._append(self._logits(self._token, self._attended, self._position, self._cache))

    def _logits(self, ids: Tensor, attended: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _append(self, logits: Tensor) -> None:
        token = (draw(logits) if self._sample else logits.argmax(-1)).masked_fill(self._ended, self._pad)
        self._output.index_copy_(1, self._count, token[:, None])
        self._count.add_(1)
        self._ended.logical_or_(self._is_eos(token))
        self._token.copy_(token[:, None])
        self._position.add_(1)
        self._slot.add_(1)
        self._attended.index_fill_(3, self._slot, True)

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self._eos).any(-1)

    def _capture(self, ids: Tensor, mask: Tensor) -> torch.cuda.CUDAGraph:
        """The graph of a step. The RNG state is restored: capture does not change what a seed samples."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.random.fork_rng([ids.device]):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries allocate on their first calls, which capture forbids
                    self.start(ids, mask)
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            # Only what this thread does can break the capture: a data loader's thread pins memory at any time.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self.step()
        return graph


class _Layer(StaticLayer):
    """Casts keys to the dtype of the values: under autocast the rotary embedding leaves keys in float32."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def _linear_weights(model: Any) -> dict[str, Tensor]:
    """What autocast casts, by name. A head that is tied to the embedding has its weight here as well."""
    return {
        f"{name}.{part}": value
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        for part, value in module.named_parameters(recurse=False)
    }


def _with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A copy of the model that shares its parameters, except those that `weights` has by name."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    other = copy.deepcopy(model, memo)  # what is in the memo is shared, not copied
    for name, weight in weights.items():
        module, _, part = name.rpartition(".")
        setattr(other.get_submodule(module), part, torch.nn.Parameter(weight, requires_grad=False))
    return other.eval()


def _is_supported(model: Any, given: dict[str, Any]) -> bool:
    config = given.get("generation_config")
    if given.keys() != {"input_ids", "attention_mask", "generation_config"} or config is None:
        return False
    # Options that are unset in the call come from the model.
    options = {**model.generation_config.to_diff_dict(), **config.to_diff_dict()}
    text = model.config
    return (
        all(name in HANDLED or value in NEUTRAL.get(name, ()) for name, value in options.items())
        and None not in (config.do_sample, config.max_new_tokens, config.pad_token_id, config.eos_token_id)
        and (not config.do_sample or options.get("top_k") == 0)  # unset, `generate` takes 50
        and text._attn_implementation == "sdpa"
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(text, "sliding_window", None) is None
        and not getattr(text, "attention_dropout", 0.0)
        and not model.is_gradient_checkpointing
    )


def _eos_ids(config: GenerationConfig) -> list[int]:
    return [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id)

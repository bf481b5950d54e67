"""A stand-in for TRL's client of a vLLM server, and the weights that the server should receive.

It does with the tensors what vLLM does: it keeps them until they fill a bucket or there are no more, and copies
them then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from torch import Tensor
from trl.generation import vllm_generation

GIB = 2**30


class Client:
    """Takes the place of TRL's client. To sample, it needs an `engine`: one of test_rollouts.py."""

    bucket = GIB

    def __init__(self, base_url: str, group_port: int, connection_timeout: float) -> None:
        self.received: dict[str, Tensor] = {}
        self.places: set[int] = set()  # in memory, of the tensors that came last
        self.calls: list[str] = []
        self.engine: Any = None

    def init_communicator(self, device: Any) -> None:
        self.calls.append("start")

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, Tensor]]) -> None:
        self.calls.append("sync")
        self.received, self.places = {}, set()
        kept: dict[str, Tensor] = {}
        for name, tensor in named_params:
            kept[name] = tensor
            self.places.add(tensor.data_ptr())
            if sum(each.nbytes for each in kept.values()) > self.bucket:
                self._copy(kept)
                kept = {}
        self._copy(kept)
        assert [(name, str(t.dtype), list(t.shape)) for name, t in self.received.items()] == [
            (name, f"torch.{dtype}", shape) for name, dtype, shape in metadata
        ]

    def _copy(self, kept: dict[str, Tensor]) -> None:
        self.received |= {name: tensor.detach().clone() for name, tensor in kept.items()}

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: list[list[int]], n: int, **_: Any) -> dict[str, Any]:
        self.calls.append("generate")
        tied = self.engine.own.config.tie_word_embeddings
        self.engine.own.load_state_dict(self.received, strict=not tied)
        _, completions, log_probs, _ = self.engine.generate([ids for ids in prompts for _ in range(n)])
        return {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "logprobs": [[[score] for (score,) in row] for row in log_probs],
        }


def replaced(client: type = Client) -> Any:
    """While this context lasts, TRL finds a vLLM and builds this client."""
    return mock.patch.multiple(vllm_generation, is_vllm_available=lambda: True, VLLMClient=client)


def expected_weights(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """By the names of a model without adapters, in float64: W, or W + scale·B·A, or the trained copy of a layer."""
    found = {name.removeprefix("base_model.model."): p.detach().double() for name, p in parameters.items()}
    weights = {}
    for name, weight in found.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            a, b = (found[f"{layer}.lora_{half}.default.weight"] for half in "AB")
            weight = weight + scale * b @ a
        weights[name.replace(".base_layer", "").replace(".modules_to_save.default", "")] = weight
    return weights


def largest_difference(received: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of one weight."""
    assert received.keys() == expected.keys()
    return max(float((received[name] - weight).abs().max()) for name, weight in expected.items())

"""TRL's weight transfer to a vLLM server, made safe for adapters and CUDA streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor


def keep_sent_weights(trainer: Any) -> None:
    """Makes the tensors that are sent to a vLLM server keep their values until vLLM has read them.

    TRL merges the adapter into the base, sends the parameters themselves, and unmerges it after the last one.
    vLLM holds references until they fill a bucket of 1 GiB, and only then copies them: the last bucket after the
    unmerge. A small model would arrive without its adapter, a large one without it in its last layers. So the
    parameters of a model with an adapter are sent as copies: up to two buckets at once. With or without an
    adapter, vLLM's streams wait for the trainer's.

    This patches the client, which only the main process has. The others only take part in gathering.

    Args:
        trainer: a `GRPOTrainer` whose constructor has run.

    Raises:
        RuntimeError: TRL's client is missing, or lacks the method that sends weights.
    """
    if not trainer.use_vllm or trainer.vllm_mode != "server" or not trainer.accelerator.is_main_process:
        return
    engine = getattr(trainer, "vllm_generation", None)
    client = getattr(engine, "vllm_client", None)
    send = getattr(client, "update_named_params", None)
    if engine is None or client is None or send is None:
        raise RuntimeError(
            "vllm_mode='server': expected TRL's client of a vLLM server to have `update_named_params`, got none in "
            f"TRL {trl.__version__}, whose server might get weights without the adapter; "
            "install 'trl>=1.15,<1.17', or set vllm_mode='colocate'"
        )
    device = trainer.accelerator.device

    def update_named_params(metadata: Any, named_params: Iterator[tuple[str, Tensor]]) -> Any:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return send(metadata, safe_to_keep(named_params, copied=is_peft_model(engine.model), stream=stream))

    client.update_named_params = update_named_params


def safe_to_keep(
    named_params: Iterator[tuple[str, Tensor]], *, copied: bool, stream: torch.cuda.Stream | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The same names and values, which a reader may keep.

    Args:
        named_params: an iterator that may change a tensor when it moves on.
        copied: yield copies.
        stream: the GPU stream that computes the tensors. vLLM reads in streams of its own, which wait neither for
            it nor for each other; here each reader waits for its tensors. `None`: without CUDA.
    """
    while True:
        # In one stream, merging, copying and unmerging keep their order.
        with torch.cuda.stream(stream):
            named = next(named_params, None)
            if named is None:
                return
            name, tensor = named
            if copied:
                tensor = tensor.clone()
        if stream is not None:
            reader = torch.cuda.current_stream(stream.device)
            reader.wait_stream(stream)
            if tensor.is_cuda:
                tensor.record_stream(reader)
        yield name, tensor

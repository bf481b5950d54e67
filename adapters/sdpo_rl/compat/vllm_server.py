"""The weights that TRL sends to a vLLM server, so that what arrives is what TRL meant to send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor


def keep_sent_weights(trainer: Any) -> None:
    """The tensors that the trainer sends to a vLLM server keep their values until vLLM has read them.

    TRL adds an adapter to the base, sends the parameters themselves, and subtracts the adapter after the last one.
    vLLM keeps the tensors that it is given until they fill a bucket of 1 GiB, and copies them then: the last bucket
    after the subtraction. A small model would arrive without its adapter, and of a large one the last layers. So
    the parameters of a model with an adapter are sent as copies. vLLM keeps two buckets: about 2 GiB of copies.

    This changes the client, which the main process alone has. The others send nothing, and gather as before.

    Args:
        trainer: a `GRPOTrainer` whose constructor has run.

    Raises:
        RuntimeError: TRL's client has another method for sending weights.
    """
    engine = getattr(trainer, "vllm_generation", None)
    if engine is None or trainer.vllm_mode != "server" or not trainer.accelerator.is_main_process:
        return
    client = getattr(engine, "vllm_client", None)
    send = getattr(client, "update_named_params", None)
    if client is None or send is None:
        raise RuntimeError(
            "vllm_mode='server': expected TRL's client of a vLLM server to have `update_named_params`, got one "
            f"without it from TRL {trl.__version__}, which may send weights that no longer have the adapter; "
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
        copied: whether it does.
        stream: of a GPU, where the tensors are computed. vLLM reads them in streams of its own, which wait neither
            for this one nor for each other; here each waits for the tensors that it gets. `None`: without CUDA.
    """
    while True:
        # In one stream merging, copying and subtracting keep their order.
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

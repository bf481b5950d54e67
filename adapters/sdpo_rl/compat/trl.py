"""What differs between TRL, its releases and this library: references, log-probabilities on a CPU, responses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import trl
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import linear
from trl.chat_template_utils import add_response_schema, parse_response
from trl.trainer import utils

from ..teacher.store import TeacherStore
from .adapters import trainable_preserved

# Numbers of a chunk of logits: 16 MiB of float32.
_CHUNK = 2**22

# What `PreTrainedTokenizerBase.parse_response` reads.
_RESPONSE_FORMAT = (
    "response_template" if Version(transformers.__version__) >= Version("5.13.0.dev0") else "response_schema"
)


def default_arguments(model: Any) -> Any:
    """TRL's defaults, and a folder that has the name of the model, which is a model or a name."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return trl.GRPOConfig(f"{name.split('/')[-1]}-SDPO")


def parsed_response(tokenizer: Any, ids: Sequence[int]) -> dict[str, Any] | None:
    """A completion as a message, by the tokenizer's response template or that of a chat template that TRL knows.

    `None`: there is neither. What does not parse is a message with the whole text.
    """
    if getattr(tokenizer, _RESPONSE_FORMAT, None) is None:
        tokenizer = copy.copy(tokenizer)  # a template of its own would make TRL parse every completion
        try:
            add_response_schema(tokenizer)
        except ValueError:  # a chat template that TRL does not know
            return None
    message: dict[str, Any] = parse_response(tokenizer, list(ids), prefix=[])
    return message


@contextmanager
def reference(
    model: Any,
    unwrapped: Any,
    ref_model: Any,
    start: TeacherStore | None,
    *,
    accelerator: Any,
    training: bool,
) -> Iterator[tuple[Any, Any, Any]]:
    """GRPO's reference model, wrapped and not, and the weights that replace its own; `None`: its own.

    For `beta` a PEFT model is its own reference, with a copy of the adapter it was loaded with, or without any.

    Args:
        model: of the run, wrapped for several processes or not.
        unwrapped: the model inside `model`.
        ref_model: that TRL loaded; `None`: none.
        start: the weights that training began with, where `beta` has no reference.
        accelerator: of the run.
        training: as for `TeacherStore.forwards`.
    """
    if ref_model is not None:
        yield ref_model, accelerator.unwrap_model(ref_model), None
    elif start is not None:
        (params,) = start.forwards(unwrapped, training=training)
        yield model, unwrapped, params
    else:
        name = "ref" if "ref" in unwrapped.peft_config else None
        with trainable_preserved(unwrapped), utils.use_adapter(unwrapped, name):
            yield model, unwrapped, None


@contextmanager
def torch_kernel(device: torch.device) -> Iterator[None]:
    """TRL's log-probabilities in plain torch on a CPU, where its Triton kernel cannot run; elsewhere unchanged."""
    if device.type != "cpu" or not hasattr(utils, "_ChunkedLogProbFunction"):
        yield
        return
    kernel = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = ChunkedLogProbs
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = kernel


class ChunkedLogProbs(torch.autograd.Function):
    """What TRL's kernel computes for GRPO from hidden states [N, D]: log-probabilities and entropies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities and entropies [N] float32, and `None` for the three outputs that GRPO does not use.

        Raises:
            NotImplementedError: another of TRL's outputs is asked for.
        """
        if unknown := set(outputs) - {"log_probs", "entropy"}:
            raise NotImplementedError(
                f"outputs: expected log_probs and entropy, got {sorted(unknown)}; train on a GPU"
            )
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.set_materialize_grads(False)  # most calls use the log-probabilities alone
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = {
            "dtype": dtype,
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
        }
        chunks = [
            _log_probs(hidden[rows], weight, bias, targets[rows], **ctx.options)
            for rows in _chunks(len(hidden), len(weight))
        ]
        log_probs, entropies = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return log_probs, entropies if "entropy" in outputs else None, None, None, None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of hidden states, weight and bias; each chunk's logits are computed again."""
        hidden, weight, bias, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        # The head is gathered for its own forward only, where it is partitioned.
        with utils.maybe_gather_lm_head_ctx(weight, bias):
            grads = [
                torch.zeros(tensor.shape, dtype=torch.float32, device=hidden.device) if needed else None
                for tensor, needed in zip((hidden, weight, bias), wanted, strict=True)
            ]
            for rows in _chunks(len(hidden), len(weight)):
                parts = [tensor.detach().requires_grad_() for tensor in (hidden[rows], weight)]
                parts += [] if bias is None else [bias.detach().requires_grad_()]
                with torch.enable_grad():
                    values = _log_probs(
                        parts[0], parts[1], None if bias is None else parts[2], targets[rows], **ctx.options
                    )
                given = [(v, g[rows]) for v, g in zip(values, gradients[:2], strict=True) if g is not None]
                trained = [
                    (part, total) for part, total in zip(parts, grads, strict=False) if total is not None
                ]
                computed = torch.autograd.grad(
                    [value for value, _ in given],
                    [part for part, _ in trained],
                    [gradient for _, gradient in given],
                )
                for (part, total), gradient in zip(trained, computed, strict=True):
                    (total[rows] if part is parts[0] else total).add_(gradient)
        dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        cast = [None if total is None else total.to(kind) for total, kind in zip(grads, dtypes, strict=True)]
        return (*cast, *[None] * 6)


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, max(1, count), size)]


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Of one chunk of tokens [C]: the products are rounded to `dtype` as in the head, the rest is float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        products = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = products.float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_p = (logits / temperature).log_softmax(-1)
        entropies = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
        return log_p.gather(-1, targets[:, None]).squeeze(-1), entropies

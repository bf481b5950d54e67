"""Both models over the rows of a batch: logits of chosen tokens, and log-probabilities of completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

import sdpo

from ...step import forward as step_forward
from ...step.batch import TokenBatch, compact, left_pad
from ...step.micro_batch import StepContext
from ...step.runner import make_runner

Side = Literal["student", "teacher"]
# Rows of the LM head that are multiplied at a time, in float32.
_HEAD_ROWS = 16384


@dataclass(frozen=True)
class BothModels:
    """Forwards of student and teacher as a training step makes them, without gradient and in evaluation mode.

    Attributes:
        context: of a step.
        fused: whether hidden states and head give the model's logits (see `can_fuse`).
        seconds: time of the forwards of each model so far, by its name.
    """

    context: StepContext
    fused: bool
    seconds: dict[str, float] = field(default_factory=lambda: {"student": 0.0, "teacher": 0.0})

    def outputs(self, side: Side, rows: TokenBatch) -> list[Any]:
        """Heads or logits of the completions; two for the teacher of a trust region."""
        context = self.context
        forward: Any = step_forward.completion_head if self.fused else step_forward.completion_logits
        forward = partial(forward, context.model, context.unwrapped)
        runner = make_runner(context, rows)
        with (
            torch.no_grad(),
            context.accelerator.autocast(),
            step_forward.evaluating(context.unwrapped),
            self._timed(side),
        ):
            if side == "student":
                outputs = [runner(forward)]
            else:
                weights = context.teacher.forwards(context.unwrapped, training=False)
                outputs = [runner(partial(forward, params=params)) for params in weights]
        return outputs

    def logits(self, outputs: Sequence[Any], index: Tensor) -> Tensor:
        """Of the tokens at `index` [N] of B·T: logits [N, V] float32."""
        one = [self._logits(output, index) for output in outputs]
        if len(one) == 1:
            return one[0]
        return sdpo.trust_region_logits(*one, coef=self.context.config.trust_region_coef)

    def log_probs(self, side: Side, rows: TokenBatch) -> Tensor:
        """Of the completions' tokens [B, T] float32; 0 at padding."""
        outputs, length = self.outputs(side, rows), rows.completion_length
        tokens, mask = rows.ids[:, -length:], rows.mask[:, -length:].bool()
        result = torch.zeros(tokens.shape, device=tokens.device)
        for index in mask.flatten().nonzero().squeeze(-1).split(chunk_tokens(self.context.unwrapped)):
            logits = self.logits(outputs, index) / self.context.temperature
            sampled = tokens.flatten()[index][:, None]
            result.view(-1)[index] = logits.log_softmax(dim=-1).gather(-1, sampled).squeeze(-1)
        return result

    def _logits(self, output: Any, index: Tensor) -> Tensor:
        if not self.fused:
            logits: Tensor = output.flatten(0, 1)[index].float()
            return logits
        hidden, transform = output.hidden.flatten(0, 1)[index].float(), self.context.transform
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logits = torch.cat(
                [linear(hidden, part.float()) for part in output.weight.split(_HEAD_ROWS)], dim=-1
            )
            if output.bias is not None:
                logits += output.bias.float()
        logits = logits * transform.logit_scale
        if transform.softcap is not None:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
        return logits

    @contextmanager
    def _timed(self, side: Side) -> Iterator[None]:
        device = self.context.accelerator.device
        wait(device)
        start = time.perf_counter()
        yield
        wait(device)
        self.seconds[side] += time.perf_counter() - start


def chunk_tokens(model: Any) -> int:
    """Tokens whose logits are computed together: about 16 million entries."""
    return int(max(1, 2**24 // model.config.get_text_config().vocab_size))


def rows_of(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
) -> TokenBatch:
    """A batch of token lists: prompts padded on the left, completions on the right."""
    ids, mask = left_pad(prompts, pad_id=pad_id, device=device)
    flipped, flipped_mask = left_pad(
        [list(reversed(row)) for row in completions], pad_id=pad_id, device=device
    )
    sizes = [(len(prompt), len(row)) for prompt, row in zip(prompts, completions, strict=True)]
    return compact(ids, mask, flipped.flip(-1), flipped_mask.flip(-1), sizes)


def wait(device: torch.device) -> None:
    """Until the device has done what was queued; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

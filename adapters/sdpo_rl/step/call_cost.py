"""What a call of the model costs besides its tokens, in tokens.

A forward of N tokens through P weights takes 2·P·N operations, but two costs do not depend on N:

* Every weight is moved once, b bytes of each. A GPU does about R = 200 operations in the time in which it moves a
  byte, so that this costs b·R / 2 tokens: 200 for weights of 16 bits (b = 2), and 450 for weights of 4 bits, which
  are read, written as 16 bits and read again (b = 0.5 + 2 + 2).
* The host launches the kernels of every layer. Below a number of tokens a GPU waits for it, and fewer tokens save
  no time. A layer of width D has work for D² per token, so the number falls as D² grows.

So a call costs max(N + `call_tokens`, `busy_tokens`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

_OPERATIONS_PER_BYTE = 200
_BYTES_16_BITS, _BYTES_4_BITS = 2.0, 4.5
# Launching a forward or backward of one layer with LoRA takes 4 to 6 ms; an H200 computes one of a 7B model in
# 0.9 microseconds for each token.
_BUSY_TOKENS, _WIDTH = 4096, 3584


class CallCost(NamedTuple):
    """A call of N tokens costs max(N + `call_tokens`, `busy_tokens`)."""

    call_tokens: float
    busy_tokens: float


def call_cost(model: Any) -> CallCost:
    """Of a model, from the bits of its weights and its hidden size.

    Example:
        >>> from types import SimpleNamespace
        >>> text = SimpleNamespace(hidden_size=3584)
        >>> config = SimpleNamespace(get_text_config=lambda: text)
        >>> call_cost(SimpleNamespace(config=config))
        CallCost(call_tokens=200.0, busy_tokens=4096.0)
        >>> call_cost(SimpleNamespace(config=config, is_loaded_in_4bit=True))
        CallCost(call_tokens=450.0, busy_tokens=4096.0)
    """
    moved = _BYTES_4_BITS if getattr(model, "is_loaded_in_4bit", False) else _BYTES_16_BITS
    width = getattr(model.config.get_text_config(), "hidden_size", _WIDTH)
    return CallCost(moved * _OPERATIONS_PER_BYTE / 2, _BUSY_TOKENS * (_WIDTH / width) ** 2)

"""The fixed cost of a forward pass, as an equivalent number of tokens.

A forward of N tokens through P weights takes 2·P·N operations, but two costs do not depend on N:

* Every weight is moved once, b bytes of each. A GPU performs about R = 200 operations in the time in which it
  moves a byte, so this costs as much as b·R / 2 tokens: 200 for weights of 16 bits (b = 2), and 450 for
  weights of 4 bits, which are read, written as 16 bits and read again (b = 0.5 + 2 + 2).
* The host launches the kernels of every layer. Below a number of tokens a GPU waits for it, and fewer tokens save
  no time. A layer of width D has work for D² per token, so the number falls as D² grows.

So a call costs max(N + `overhead_tokens`, `min_tokens`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

_OPERATIONS_PER_BYTE = 200
_BYTES_16_BITS, _BYTES_4_BITS = 2.0, 4.5
# Launching the kernels of one layer with LoRA takes 4 to 6 ms; an H200 computes one layer of a 7B model in about
# 0.9 microseconds for each token. The smaller number of tokens, rounded down.
_MIN_TOKENS, _HIDDEN_SIZE = 4096, 3584


class CallCost(NamedTuple):
    """A call of N tokens costs max(N + `overhead_tokens`, `min_tokens`)."""

    overhead_tokens: float
    min_tokens: float


def call_cost(model: Any) -> CallCost:
    """Estimate the cost from the precision of the weights and the hidden size; all but 4 bits count as 16.

    Examples:
        >>> from types import SimpleNamespace
        >>> text = SimpleNamespace(hidden_size=3584)
        >>> config = SimpleNamespace(get_text_config=lambda: text)
        >>> call_cost(SimpleNamespace(config=config))
        CallCost(overhead_tokens=200.0, min_tokens=4096.0)
        >>> call_cost(SimpleNamespace(config=config, is_loaded_in_4bit=True))
        CallCost(overhead_tokens=450.0, min_tokens=4096.0)
    """
    moved = _BYTES_4_BITS if getattr(model, "is_loaded_in_4bit", False) else _BYTES_16_BITS
    width = getattr(model.config.get_text_config(), "hidden_size", _HIDDEN_SIZE)
    return CallCost(moved * _OPERATIONS_PER_BYTE / 2, _MIN_TOKENS * (_HIDDEN_SIZE / width) ** 2)

"""Validation of the arguments of public functions: shapes, dtypes and Python scalars.

Tensors' values are read where that is free alone (`is_readable`): a check costs no device synchronisation and works
under ``torch.func`` transforms and ``torch.compile``. Every message names the argument, what was expected,
what came, and the fix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["floating", "integer", "bool"]

# The upper end of an interval of finite numbers.
LARGEST = sys.float_info.max

_FIX: dict[Kind, str] = {
    "floating": "convert it with `.float()`",
    "integer": "convert it with `.long()`",
    "bool": "convert it with `.bool()`",
}
# Python's types of the entries of a sequence, and the dtype of the tensor made of it.
_SCALARS: dict[Kind, tuple[type, torch.dtype]] = {
    "floating": (Real, torch.float32),
    "integer": (Integral, torch.int64),
    "bool": (bool, torch.bool),
}
_SCALAR_NAMES: dict[Kind, str] = {"floating": "a number", "integer": "an int", "bool": "a bool"}


def type_name(value: object) -> str:
    """The type's name, with its package unless it is Python's own: numpy.bool is no bool."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"


def check_tensor(name: str, value: object, kind: Kind, *, min_ndim: int = 0) -> None:
    """Demand a tensor of the dtype family ``kind`` with at least ``min_ndim`` dimensions."""
    if not isinstance(value, Tensor):
        if value is None:
            fix = "pass one"
        elif name.endswith(".weight") and isinstance(getattr(value, "weight", None), Tensor):
            fix = "pass its `.weight`"
        else:
            fix = "wrap it in torch.as_tensor"
        raise TypeError(f"{name}: expected a tensor of {kind} dtype, got {type_name(value)}; {fix}")
    matches = {
        "floating": value.dtype.is_floating_point,
        "integer": value.dtype in (torch.int32, torch.int64),
        "bool": value.dtype == torch.bool,
    }
    if not matches[kind]:
        raise TypeError(f"{name}: expected a tensor of {kind} dtype, got {value.dtype}; {_FIX[kind]}")
    if value.ndim < min_ndim:
        raise ValueError(
            f"{name}: expected at least {min_ndim} dimension(s), got shape {tuple(value.shape)}; "
            "add the missing one with `.unsqueeze`"
        )


def tensor_from_sequence(name: str, value: object, kind: Kind, *, device: torch.device | None) -> Any:
    """A sequence of Python scalars as a tensor [N] of the dtype family ``kind``; anything else as it is.

    The dtype does not depend on torch's default. ``check_tensor`` is to check the result.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    scalar, dtype = _SCALARS[kind]
    for index, entry in enumerate(value):
        if not isinstance(entry, scalar) or (kind == "integer" and isinstance(entry, bool)):
            raise TypeError(
                f"{name}[{index}]: expected {_SCALAR_NAMES[kind]}, got {entry!r} ({type_name(entry)}); "
                "convert the entry, or pass a tensor"
            )
    return torch.tensor(value, dtype=dtype, device=device)


def check_distribution(name: str, value: object) -> None:
    """Demand a floating tensor [..., V] with at least one category in its last dimension."""
    check_tensor(name, value, "floating", min_ndim=1)
    assert isinstance(value, Tensor)
    if value.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected at least one category in the last dimension, got shape {tuple(value.shape)}; "
            "the vocabulary is the last dimension"
        )


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], *, like: str) -> None:
    """Demand the exact shape ``expected``, which the message explains by ``like``."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({like}), got {tuple(value.shape)}; "
            "align the tensors before the call, nothing is broadcast"
        )


def is_readable(tensor: Tensor) -> bool:
    """Whether the values can be read without waiting for a device or breaking a transform or a compilation.

    A subclass may have no values, as a fake tensor, or not all of them, as a sharded one.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_weights(name: str, weights: Tensor, active: Tensor | None) -> None:
    """Demand finite weights ≥ 0 at the active tokens, of the same shape, where the values are readable."""
    if not is_readable(weights) or not (active is None or is_readable(active)):
        return
    wrong = ~((weights >= 0.0) & weights.isfinite())
    wrong = wrong if active is None else wrong & active
    if wrong.any():
        raise ValueError(
            f"{name}: expected finite numbers >= 0 where the mask is true, got {float(weights[wrong][0])}; mask "
            "such positions, or clamp the weights"
        )


def check_ids(name: str, ids: Tensor, vocabulary: int, *, fix: str) -> None:
    """Demand ids in [0, vocabulary), where the values are readable."""
    if not is_readable(ids):
        return
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.numel() > 0:
        raise ValueError(f"{name}: expected ids in [0, {vocabulary}), got {int(outside[0])}; {fix}")


def check_tokens(tokens: object, logits: Tensor, *, vocabulary: int) -> Tensor:
    """Return sampled tokens, an id per position of logits, which may be those of a slice of the vocabulary."""
    check_tensor("tokens", tokens, "integer")
    assert isinstance(tokens, Tensor)
    check_shape("tokens", tokens, logits.shape[:-1], like="the leading shape of the logits")
    check_device("tokens", tokens, logits, like="the device of the logits")
    check_ids("tokens", tokens, vocabulary, fix="give positions without a loss any id, and mask them")
    return tokens


def check_distinct(name: str, ids: Tensor, *, fix: str) -> None:
    """Demand ids [..., K] that are distinct along K, where the values are readable."""
    if not is_readable(ids):
        return
    ascending = ids.sort(dim=-1).values
    repeated = ascending[..., 1:] == ascending[..., :-1]
    if repeated.any():
        *position, _ = repeated.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected distinct ids at each position, got {int(ascending[..., 1:][repeated][0])} twice at "
            f"position {tuple(position)}; {fix}"
        )


def check_device(name: str, value: Tensor, other: Tensor, *, like: str) -> None:
    """Demand the device of ``other``, which the message explains by ``like``.

    torch refuses most pairs of devices by itself. With a meta tensor some operations compute nothing instead,
    and their result is whatever the memory held.
    """
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected a tensor on {other.device} ({like}), got one on {value.device}; "
            f"move it with `.to({str(other.device)!r})`"
        )


def check_int(name: str, value: object, *, low: int, high: int, meaning: str) -> int:
    """Return ``value`` as an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {value!r} ({type_name(value)}); pass {meaning}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an int in [{low}, {high}], got {number}; pass {meaning}")
    return number


def check_real(
    name: str,
    value: object,
    *,
    low: float,
    high: float,
    meaning: str,
    open_low: bool = False,
) -> float:
    """Return ``value`` as a float in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type_name(value)}); pass {meaning}")
    number = float(value)
    inside = low < number <= high if open_low else low <= number <= high
    if math.isnan(number) or not inside:
        end = "inf)" if high == LARGEST else f"{high:g}]"
        interval = f"{'(' if open_low else '['}{low:g}, {end}"
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}; pass {meaning}")
    return number


def check_temperature(temperature: object) -> float:
    """Return the rollout temperature as a finite float above 0."""
    return check_real(
        "temperature", temperature, low=0.0, high=LARGEST, open_low=True, meaning="the rollout temperature"
    )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Demand one of the strings ``choices``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {choices}, got {value!r} ({type_name(value)}); pass a str")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}; pass one of these names")


def check_flag(name: str, value: object, *, meaning: str) -> None:
    """Demand a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r} ({type_name(value)}); pass {meaning}")


def check_alpha(alpha: object) -> float:
    """Return the divergence's interpolation weight as a float in [0, 1]."""
    return check_real(
        "alpha",
        alpha,
        low=0.0,
        high=1.0,
        meaning="0 for KL(teacher‖student), 1 for KL(student‖teacher), or a weight between them for the JSD",
    )


def check_top_k(k: Any, *, vocabulary: int) -> int:
    """The number of tokens of a top K: an integer of 1 or more, at most the vocabulary size."""
    fix = f": min(k, {vocabulary})" if isinstance(k, int) and k > vocabulary else ""
    return check_int(
        "k", k, low=1, high=vocabulary, meaning=f"a number of tokens, at most the vocabulary size{fix}"
    )


def check_support_size(support: str, k: int | None, *, vocabulary: int) -> None:
    """Demand a known support, with a k if it is a top K and without one else."""
    check_choice("support", support, ("student", "teacher", "full", "sampled"))
    if support in ("student", "teacher"):
        check_top_k(k, vocabulary=vocabulary)
    else:
        _check_unused("k", k, support)


def check_support(support: str, k: int | None, tail: str | None, alpha: float, *, vocabulary: int) -> None:
    """Demand a known support with the k and tail that it has, and alpha 1 for the sampled token."""
    check_support_size(support, k, vocabulary=vocabulary)
    if support in ("student", "teacher"):
        check_choice("tail", tail, ("bucket", "renormalize"))
    else:
        _check_unused("tail", tail, support)
    if support == "sampled" and alpha != 1.0:
        raise ValueError(
            f"alpha: expected 1 with support='sampled', got {alpha:g}; only the reverse divergence has an "
            "estimate from the sampled token alone"
        )


def _check_unused(name: str, value: object, support: str) -> None:
    if value is not None:
        raise ValueError(
            f"{name}: expected None with support={support!r}, got {value!r}; only the top-K supports "
            "'student' and 'teacher' have one"
        )

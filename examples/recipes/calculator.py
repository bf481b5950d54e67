"""The tool of tools.yaml: a function with type hints and a docstring, from which TRL makes its description."""

from __future__ import annotations


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: the first factor.
        b: the second factor.
    """
    return a * b

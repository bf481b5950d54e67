"""A case of bad input: what is done, and what the error must be and say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Any]
    error: type[Exception]
    says: tuple[str, ...]  # the argument, what was expected, what came, the way out

    def check(self, *arguments: Any) -> None:
        with pytest.raises(self.error) as caught:
            self.make(*arguments)
        message = str(caught.value)
        assert not [part for part in self.says if part not in message], message


def run(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])

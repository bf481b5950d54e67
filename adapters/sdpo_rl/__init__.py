"""SDPO for TRL: `from sdpo_rl import SDPOTrainer, SDPOConfig`.

Importing this package binds nothing heavy. `SDPOTrainer` is built over whatever `trl.GRPOTrainer` is when the
name is first used, so Unsloth's `PatchFastRL` can run before it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SDPOConfig, training_arguments
    from .diagnose.report import unsloth_report
    from .trainer import SDPOTrainer

__all__ = ["SDPOConfig", "SDPOTrainer", "training_arguments", "unsloth_report"]

_HOMES = {
    "SDPOConfig": "config",
    "SDPOTrainer": "trainer",
    "training_arguments": "config",
    "unsloth_report": "diagnose.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

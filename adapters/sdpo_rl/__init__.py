"""SDPO for TRL: `from sdpo_rl import SDPOTrainer, SDPOConfig`.

Importing this package imports no library. `SDPOTrainer` derives from whatever `trl.GRPOTrainer` is when the name is
first used, so Unsloth's `PatchFastRL` can run before it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SDPOConfig
    from .credit.report import credit_report
    from .diagnose.probe.run import probe
    from .diagnose.report import training_report
    from .presets import training_arguments
    from .rollout.written import Attempt
    from .trainer import SDPOTrainer

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "SDPOConfig",
    "SDPOTrainer",
    "credit_report",
    "probe",
    "training_arguments",
    "training_report",
]

_MODULES = {
    "Attempt": "rollout.written",
    "SDPOConfig": "config",
    "SDPOTrainer": "trainer",
    "credit_report": "credit.report",
    "probe": "diagnose.probe.run",
    "training_arguments": "presets",
    "training_report": "diagnose.report",
}
# What the extra `trl` installs.
_EXTRA = ("trl", "transformers", "accelerate", "datasets", "safetensors", "jinja2")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise ImportError(
            f'sdpo_rl.{name} needs {error.name}, which is not installed; pip install "sdpo-rl[trl]"'
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

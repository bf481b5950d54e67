"""The tasks that `train.py` and `run.py` know by name: add yours.

A module of `train.py`, `run.py` and `report.py`; nothing to run.
"""

from __future__ import annotations

from environment import Environment
from house_style import HOUSE_STYLE
from kit_task import KIT, KIT_STRICT

TASKS: dict[str, Environment] = {task.name: task for task in (KIT, KIT_STRICT, HOUSE_STYLE)}

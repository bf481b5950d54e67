"""What examples/benchmarks/ranks.py derives from the results of its launches."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from programs import EXAMPLES

sys.path.append(str(EXAMPLES / "benchmarks"))
from ranks import join

Result = dict[str, Any]


def measured(losses: list[float], seconds: float = 1.0, first: int = 1) -> Result:
    return {
        "rows": 8,
        "losses": {str(first + index): value for index, value in enumerate(losses)},
        "steps": [seconds] * 5,
        "peak_bytes": 2**30,
        "teacher_bytes": 2**20,
    }


def result(kind: str, processes: int, **changes: Any) -> Result:
    runs = {"same rows": measured([2.0, 4.0])}
    return {
        "options": {"shape": "tiny"},
        "environment": {"gpu": None},
        "runs": {kind: {str(processes): runs}},
        **changes,
    }


def test_launches_are_compared_with_one_process() -> None:
    four, one, plain = result("fsdp2", 4), result("fsdp2", 1), result("ddp", 1)
    four["runs"]["fsdp2"]["4"] = {
        "same rows": measured([2.0, 4.4]),
        "rows each": measured([9.0], seconds=1.25),
        "float32": measured([1.0, 2.0, 4.0, 8.0]),
        "resumed": measured([4.0, 6.0], first=3),
    }
    one["runs"]["fsdp2"]["1"]["float32"] = measured([1.0, 2.0, 4.0, 10.0])
    one["runs"]["fsdp2"]["1"]["micro-batches"] = measured([2.0, 5.0])
    one["runs"]["fsdp2"]["1"]["resumed"] = {"failed": "out of memory"}
    plain["runs"]["ddp"]["1"] = {"float32": measured([1.0, 2.0, 5.0, 10.0])}
    compared = join([four, one, plain])["compared"]
    assert compared["fsdp2 on 4, same rows"] == pytest.approx({"steps": 2, "relative": 0.1, "absolute": 0.4})
    assert compared["fsdp2 on 4, rows each"] == pytest.approx({"weak scaling": 0.8})
    assert compared["fsdp2 on 4, float32"] == pytest.approx({"steps": 4, "relative": 0.2, "absolute": 2.0})
    assert compared["fsdp2 on 4, resumed"] == pytest.approx({"steps": 2, "relative": 0.25, "absolute": 2.0})
    assert compared["fsdp2 on 1, float32"] == pytest.approx({"steps": 4, "relative": 0.2, "absolute": 1.0})
    assert compared["fsdp2 on 1, micro-batches"] == pytest.approx(
        {"steps": 2, "relative": 0.25, "absolute": 1.0}
    )
    assert len(compared) == 6


def test_launches_with_other_options_are_not_joined() -> None:
    other = result("ddp", 1, options={"shape": "7b"})
    with pytest.raises(ValueError, match="expected those of all launches alike"):
        join([result("ddp", 2), other])

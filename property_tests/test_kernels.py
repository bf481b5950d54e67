"""The Triton kernels: interpreted on a CPU, against the plain torch backend in float64, and compiled for a GPU.

Triton decides when it is imported whether it interprets or compiles, so both run in processes of their own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_cases import make_case, make_objective

from sdpo.fused import triton as kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install 'sdpo-rl[triton]'",
)


def run_driver(name: str, **environment: str) -> dict[str, Any]:
    """The JSON object that a driver prints last."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / name)],
        env=inherited | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Relative errors by name, from one run of the driver."""
    return run_driver("kernel_driver.py", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_equal_the_torch_backend(errors: dict[str, float]) -> None:
    checks = {name: error for name, error in errors.items() if not name.startswith("wrong: ")}
    assert len(checks) > 30
    # float32 against float64. Where models nearly agree the rounding of the logits shows; a gradient is rounded to
    # the dtype of its leaf. The interpreter truncates to bf16 instead of rounding: the tail, which does not enter
    # the row scale, is always a little too small. A given teacher's tail is 1 − Σp of float32 numbers.
    leaf_rounding = {f"{dtype} gradient": torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
    larger = {
        "nearly agreeing models": 2e-4,
        "certain student": 1e-4,
        "row scale": 2e-4,
        "bf16 gradient": 2**-7,
        "given": 1e-4,
    } | leaf_rounding
    allowed = {name: larger.get(name.split(", ")[0], 2e-5) for name in checks}
    assert not {name: error for name, error in checks.items() if not error < allowed[name]}


@needs_triton
def test_counter_examples_are_rejected(errors: dict[str, float]) -> None:
    counter_examples = {name: error for name, error in errors.items() if name.startswith("wrong: ")}
    assert len(counter_examples) == 13
    assert all(error > 1e-2 for error in counter_examples.values())


def names_of_kernels() -> set[str]:
    """Public functions of sdpo.fused.triton that write to memory: those that are launched."""
    return {
        node.name
        for path in Path(kernels.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and re.search(r"\b(tl\.store|_store_\w+)\(", ast.unparse(node))
        and not node.name.startswith("_")
    }


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its compiler for Linux")
def test_every_kernel_compiles_for_a_gpu() -> None:
    assert set(run_driver("compile_driver.py")) == names_of_kernels()


def test_reasons_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    if importlib.util.find_spec("triton") is not None:
        assert kernels.missing(gpu, torch.float32, make_objective(k=1024)) is None
        assert "cpu" in str(kernels.missing(cpu, torch.float32, make_objective(k=20)))
        assert "float64" in str(kernels.missing(gpu, torch.float64, make_objective(k=20)))
        assert "1025" in str(kernels.missing(gpu, torch.float32, make_objective(k=1025)))
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    assert "not installed" in str(kernels.missing(gpu, torch.float32, make_objective(k=20)))


@pytest.mark.parametrize(
    ("objective", "grad_dtype", "expected"),
    [
        ({"k": 20}, torch.bfloat16, True),
        ({"k": 20}, torch.float16, False),
        ({"k": 20, "tail": "renormalize"}, torch.bfloat16, False),
        ({"k": 20, "support": "teacher"}, torch.float32, True),
        ({"support": "sampled"}, torch.float16, True),
        ({"support": "full"}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_when_the_models_share_a_buffer(
    objective: dict[str, Any], grad_dtype: torch.dtype, expected: bool
) -> None:
    assert kernels.can_share_buffer(make_objective(**objective), grad_dtype) == expected


def test_auto_means_torch_on_a_cpu() -> None:
    case = make_case(0, n=4, v=64)
    assert torch.equal(case.fused(backend="auto").total, case.fused(backend="torch").total)

"""The Triton kernels, run in Triton's interpreter on a CPU, against the plain torch backend in float64.

They are also compiled for a GPU, which needs none.

Triton decides when it is imported whether it interprets: the kernels run in a process of their own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_cases import make_case, make_objective

from sdpo.fused import triton as kernels

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install 'sdpo-rl[triton]'",
)


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    """Relative errors by name, from one run of the driver."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "kernel_driver.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


@needs_triton
def test_kernels_equal_the_torch_backend(results: dict[str, float]) -> None:
    errors = {name: error for name, error in results.items() if not name.startswith("wrong: ")}
    assert len(errors) > 30
    # float32 against float64; between models that nearly agree the logits' own rounding shows, and a gradient is
    # rounded to the dtype of what it belongs to. The interpreter cuts bf16 off, so that the tail, which the gain
    # is not made of, is always a little short.
    rounded = {f"{dtype} gradient": torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
    known = {"nearly agreeing models": 2e-4, "saturated": 1e-4, "gain": 2e-4, "bf16 slopes": 2**-7} | rounded
    allowed = {name: known.get(name.split(", ")[0], 2e-5) for name in errors}
    assert not {name: error for name, error in errors.items() if not error < allowed[name]}


@needs_triton
def test_wrong_twins_are_rejected(results: dict[str, float]) -> None:
    twins = {name: error for name, error in results.items() if name.startswith("wrong: ")}
    assert len(twins) == 9
    assert all(error > 1e-2 for error in twins.values())


def kernels_of_the_package() -> set[str]:
    """Functions of sdpo.fused.triton that write to memory and are not for kernels alone: what is launched."""
    found = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "tl.store(" in ast.unparse(node):
                found |= set() if node.name.startswith("_") else {node.name}
    return found


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its compiler for Linux")
def test_every_kernel_compiles_for_a_gpu() -> None:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_driver.py")],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) == kernels_of_the_package()


def test_what_the_kernels_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    if importlib.util.find_spec("triton") is not None:
        assert kernels.missing(gpu, torch.float32, make_objective(k=1024)) is None
        assert "cpu" in str(kernels.missing(cpu, torch.float32, make_objective(k=20)))
        assert "float64" in str(kernels.missing(gpu, torch.float64, make_objective(k=20)))
        assert "1025" in str(kernels.missing(gpu, torch.float32, make_objective(k=1025)))
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    assert "not installed" in str(kernels.missing(gpu, torch.float32, make_objective(k=20)))


def test_auto_means_torch_on_a_cpu() -> None:
    case = make_case(0, n=4, v=64)
    assert torch.equal(case.fused(backend="auto").total, case.fused(backend="torch").total)

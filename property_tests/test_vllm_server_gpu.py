"""A vLLM server on a second GPU samples with the weights of every step.

Skipped without vLLM and two GPUs.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT
from test_records import bound, record

DRIVER = ROOT / "property_tests" / "vllm_server_driver.py"
RECORDS = {mode: f"server-{mode}-h200" for mode in ("lora", "full")}
TOLERANCE = 3e-5  # that of test_vllm.py, which cannot be imported without vLLM


def check(found: Any) -> None:
    """The gap is vLLM's bfloat16 in every step; with any other weights it is at least five times as large."""
    steps = found["steps"]
    assert len(steps) == 3
    for step in steps:
        gap = step["gap"]["mean"]
        assert 0 < gap < 0.05
        assert step["gap to the server's start"]["mean"] > 10 * gap
    for step in steps[1:]:
        assert step["gap before the last update"]["mean"] > 5 * step["gap"]["mean"]
    for step, logged in zip(steps, found["logged"], strict=True):
        assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(
            step["gap"]["mean"], rel=1e-3
        )
    assert max(found["difference"].values()) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two processes on one GPU")
@pytest.mark.parametrize("mode", RECORDS)
def test_a_server_samples_with_the_weights_of_every_step(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    first, second = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")[:2]
    file = tmp_path / "seen.json"
    log = tmp_path / "log"
    # Compiling vLLM's model would take longer than the run.
    variables = {"CUDA_VISIBLE_DEVICES": first, "TORCH_COMPILE_DISABLE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(DRIVER), mode, str(file), second],
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout=400)
        finally:
            process.terminate()  # it stops the server, also after a timeout
            process.wait(timeout=60)
    assert code == 0, log.read_text()[-6000:]
    check(json.loads(file.read_text()))


@pytest.mark.parametrize("mode", RECORDS)
def test_a_recorded_server_sampled_with_the_weights_of_every_step(mode: str) -> None:
    found = record(RECORDS[mode])
    assert found["mode"] == mode
    check(found)
    earlier, start = "gap before the last update", "gap to the server's start"
    for name, other in (("gap", earlier), (earlier, "gap"), (start, "gap")):
        lost = copy.deepcopy(found)  # as if the server had other weights, or the same as these
        lost["steps"][1][name] = found["steps"][1][other]
        with pytest.raises(AssertionError):
            check(lost)


def test_the_page_has_the_gaps_on_record() -> None:
    page = " ".join((ROOT / "docs" / "vllm.md").read_text().split())
    lora, full = (record(name)["steps"][1] for name in RECORDS.values())
    gap, earlier = "gap", "gap before the last update"
    assert (
        f"the mean gap of a token's log-probability was {lora[gap]['mean']:.3f} with LoRA and "
        f"{full[gap]['mean']:.3f} with all weights. Against the weights before that update it would have been "
        f"{lora[earlier]['mean']:.2f} and {full[earlier]['mean']:.2f}."
    ) in page
    differences = [record(name)["difference"] for name in RECORDS.values()]
    loss, gradient = (max(found[what] for found in differences) for what in ("loss", "gradient"))
    assert f"by at most {bound(loss)} and {bound(gradient)}." in page

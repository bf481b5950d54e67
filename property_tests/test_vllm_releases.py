"""The releases of vLLM that TRL supports, by docs/vllm.md, and what happens with others and without one.

The checks are TRL's. Its engine is replaced: nothing here needs vLLM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import trl
from programs import ROOT

from sdpo_rl.cli import doctor

PAGE = " ".join((ROOT / "docs" / "vllm.md").read_text().split())
((OF_TRL, *LIMITS),) = re.findall(r"TRL (\d+\.\d+) supports vLLM ([\d.]+) to ([\d.]+):", PAGE)


@contextmanager
def installed(release: str | None) -> Iterator[list[dict[str, Any]]]:
    """TRL finds this release of vLLM, or none; yields the arguments of each engine that it starts."""
    started: list[dict[str, Any]] = []

    def find(package: str, return_version: bool = False) -> Any:
        found = package == "vllm" and release is not None
        return (found, release or "N/A") if return_version else found

    with (
        mock.patch("trl.import_utils._is_package_available", find),
        mock.patch(
            "trl.generation.vllm_generation.LLM", lambda **options: started.append(options), create=True
        ),
        mock.patch.dict(os.environ),  # TRL sets variables for vLLM
    ):
        yield started


def neighbour(release: str, step: int) -> str:
    """The next minor release, or the one before."""
    major, minor, patch = map(int, release.split("."))
    return f"{major}.{minor + step}.{patch}"


def test_without_vllm_the_option_is_an_error_on_construction(tmp_path: Path) -> None:
    message = r"vLLM is not available and `use_vllm` is set to True.*`pip install trl\[vllm\]`"
    with installed(None), pytest.raises(ImportError, match=message):
        tiny.trainer(tmp_path, use_vllm=True)


@pytest.mark.skipif(not trl.__version__.startswith(f"{OF_TRL}."), reason="the page is about another TRL")
@pytest.mark.parametrize(
    ("release", "supported"),
    [
        (neighbour(LIMITS[0], -1), False),
        (LIMITS[0], True),
        (LIMITS[1], True),
        (neighbour(LIMITS[1], 1), False),
    ],
)
def test_a_release_outside_the_page_s_range_is_warned_about_and_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, supported: bool
) -> None:
    monkeypatch.setattr(doctor, "_has", lambda package: package in ("vllm", "trl"))
    with installed(release) as started:
        if supported:  # without a warning, which would be an error here
            tiny.trainer(tmp_path, use_vllm=True)
        else:
            range_and_release = rf"{LIMITS[0]} to {LIMITS[1]}\. You have version {release} installed"
            with pytest.warns(UserWarning, match=range_and_release) as caught:
                tiny.trainer(tmp_path, use_vllm=True)
            assert len(caught) == 1
        problems = [check for check in doctor.conflicts() if check.status == doctor.PROBLEM]
    assert len(started) == 1
    assert [check.fix for check in problems] == ([] if supported else ['pip install "trl[vllm]"'])


def test_a_release_that_lacks_a_module_is_named_with_the_fix(tmp_path: Path) -> None:
    """In a process of its own, where TRL is imported beside a package of that name and version."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm-0.5.0.dist-info").mkdir()
    for name, text in {
        "METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.5.0\n",
        "RECORD": "vllm/__init__.py,,\n",
    }.items():
        (tmp_path / "vllm-0.5.0.dist-info" / name).write_text(text)
    doctor_then_trainer = (
        "from sdpo_rl.cli import main; print(main(['doctor', '--quiet'])); import sdpo_rl.trainer"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", doctor_then_trainer],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    *lines, status = done.stdout.splitlines()
    release, imports = lines[::2]
    assert release.startswith("problem vllm: TRL currently supports vLLM versions from")
    assert "You have version 0.5.0 installed" in release
    assert re.fullmatch(r"problem trl \S+ has no GRPOTrainer here: No module named 'vllm\.\w+'", imports)
    assert [line.strip() for line in lines[1::2]] == [
        '→ pip install "trl[vllm]"',
        "→ install the release that another problem names, or remove the package",
    ]
    assert status == "1"
    # TRL's warning is shown beside the error of its import, which names the module.
    assert "You have version 0.5.0 installed" in done.stderr
    assert re.search(r"^No module named 'vllm\.\w+'$", done.stderr, re.MULTILINE)

"""Wheel and sdist: build from the source tree, the wheel has the two packages only and works from any directory."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"trl", "peft", "bnb", "unsloth", "triton", "viz", "docs", "dev", "all"}


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel or sdist, built with the installed hatchling or else with one that `build` downloads."""
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    result = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", *isolation, "--outdir", str(target), str(source)],
        capture_output=True,
        text=True,
        cwd=target,
    )
    output = result.stdout + result.stderr
    if result.returncode and re.search("No matching distribution|Connection|Max retries|resolve", output):
        pytest.skip("hatchling is not installed and cannot be fetched")
    assert result.returncode == 0, output
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def metadata(wheel: Path) -> tuple[list[str], dict[str, list[str]]]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(path).decode())
    return names, {
        key: message.get_all(key) or [] for key in ("Requires-Dist", "Provides-Extra", "License-File")
    }


def test_it_contains_the_two_packages_only(wheel: Path) -> None:
    names, _ = metadata(wheel)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sdpo", "sdpo_rl"}
    expected = {
        str(path.relative_to(source))
        for source, package in ((ROOT, "sdpo"), (ROOT / "adapters", "sdpo_rl"))
        for path in (source / package).rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js") or path.name == "py.typed"
    }
    assert {"sdpo/py.typed", "sdpo_rl/py.typed"} <= expected
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert sorted(names) == sorted(expected | {f"{folder}/{name}" for name in about})


def test_the_core_alone_needs_torch_and_einops(wheel: Path) -> None:
    _, fields = metadata(wheel)
    plain = [need for need in fields["Requires-Dist"] if "extra ==" not in need]
    assert sorted(re.split(r"[<>=! ;]", need)[0] for need in plain) == ["einops", "torch"]
    assert set(fields["Provides-Extra"]) == EXTRAS
    assert fields["License-File"] == ["LICENSE"]


def test_it_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
        capture_output=True,
        cwd=elsewhere,
    )
    # Without `site`, so that an editable install is not imported instead of the wheel.
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    script = f"""
import sys
sys.path[1:1] = [{str(target)!r}]
sys.path += {libraries!r}
import sdpo, sdpo_rl
assert sdpo.__file__.startswith({str(target)!r}) and sdpo_rl.__file__.startswith({str(target)!r})
state = sdpo.ema(update_rate=0.5).init({{"w": sdpo.topk.torch.zeros(1)}})
base = next(c.__name__ for c in sdpo_rl.SDPOTrainer.__mro__ if c.__module__.startswith("trl"))
print(sdpo_rl.SDPOConfig.preset("test_time").alpha, state.ticks, base)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-3:] == ["1.0", "0", "GRPOTrainer"]
    # The command line finds its own metadata there, and what is installed beside it.
    doctor = script.split("import sdpo, sdpo_rl")[0] + "from sdpo_rl.cli import main; print(main(['doctor']))"
    result = subprocess.run(
        [sys.executable, "-S", "-c", doctor], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert result.stdout.endswith("\n0\n"), result.stdout + result.stderr
    assert "sdpo-rl 0.1.0" in result.stdout


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "source", filter="data")
    kept = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"}
    assert kept | {"sdpo/__init__.py", "adapters/sdpo_rl/__init__.py", "docs/index.md"} <= names
    assert {"examples/01_pure_loss.py", "examples/recipes/full.yaml", "property_tests/tiny.py"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv", "output/", "shared"))]
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "wheel").mkdir()
    again = build("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert [(i.filename, i.CRC) for i in ours.infolist()] == [
            (i.filename, i.CRC) for i in theirs.infolist()
        ]

"""The oldest and the newest supported release of torch, transformers, TRL and PEFT, in environments of their own.

    python property_tests/versions.py                      # all rows
    python property_tests/versions.py --rows newest trl    # some of them

The ranges are those of pyproject.toml, the other packages those of constraints.txt where they fit. A row is
`oldest` or `newest` (all four packages at that end of their ranges), or one package: its two ends, with the others
as pinned.
Each environment runs a small part of the tests. The program prints a table and exits with 1 if a row failed.
`make versions` runs it; it needs a package index and some gigabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft")
# What the tests need besides; bitsandbytes for the resumed runs of a 4-bit base.
TOOLS = ("pytest", "hypothesis", "bitsandbytes")
TESTS = (
    "property_tests/test_divergence.py",
    "property_tests/test_teacher.py",
    "property_tests/test_fused_callers.py",
    "property_tests/test_trainer_step.py",
    "property_tests/test_lora_step.py",
    "property_tests/test_checkpoint.py",
)


class Row(NamedTuple):
    """One environment: its name, and the exact release of some packages."""

    name: str
    pins: dict[str, str]


class Outcome(NamedTuple):
    """What became of a row: the installed releases, and `ok` or what went wrong."""

    installed: dict[str, str]
    result: str


def ranges() -> dict[str, SpecifierSet]:
    """The range of each package in pyproject.toml.

    Raises:
        ValueError: a package has no range there.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    found = {need.name: need.specifier for need in map(Requirement, lines) if need.name in PACKAGES}
    if missing := sorted(set(PACKAGES) - set(found)):
        raise ValueError(
            f"pyproject.toml: expected ranges of {', '.join(PACKAGES)}, got none of {', '.join(missing)}"
        )
    return found


def pinned() -> dict[str, str]:
    """The releases of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def ends(specifier: SpecifierSet, releases: Sequence[str]) -> tuple[str, str]:
    """The oldest and the newest final release in a range.

    Raises:
        ValueError: there is none.
    """
    inside = sorted(v for v in map(Version, releases) if specifier.contains(v) and not v.is_prerelease)
    if not inside:
        raise ValueError(f"releases: expected one in {specifier}, got {', '.join(releases)}")
    # `2.13.0+cpu` is a build of 2.13.0, which the installer chooses where the index has it.
    return inside[0].public, inside[-1].public


def releases(package: str) -> list[str]:
    """What the package index has, within the constraints of this machine's pip."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.search(r"Available versions: (.*)", listed)
    if line is None:
        raise ValueError(f"pip index versions {package}: expected a list of versions, got {listed!r}")
    return line[1].split(", ")


def limit_ends(
    supported: dict[str, SpecifierSet], within: Sequence[Requirement]
) -> dict[str, tuple[str, str]]:
    """Both ends of each range, as far as the further ranges `within` go."""
    for need in within:
        supported[need.name] &= need.specifier
    return {package: ends(specifier, releases(package)) for package, specifier in supported.items()}


def rows(limits: dict[str, tuple[str, str]]) -> Iterator[Row]:
    """All environments: both ends of everything, then of one package at a time."""
    for index, name in enumerate(("oldest", "newest")):
        yield Row(name, {package: limits[package][index] for package in PACKAGES})
    for package, both in limits.items():
        for release in dict.fromkeys(both):
            yield Row(package, {package: release})


def constraints(row: Row) -> list[str]:
    """Pins of the other packages, without those that a row moves.

    A row that moves a package leaves its dependencies to the installer: an old release may need old ones.
    """
    if row.name in ("oldest", "newest"):
        return []
    free = {*row.pins, "tokenizers", "huggingface_hub", "huggingface-hub", "accelerate", "triton", "sympy"}
    return [f"{name}=={release}" for name, release in pinned().items() if name not in free]


def run(row: Row, folder: Path) -> Outcome:
    """Build the environment of a row in `folder` and run the tests in it."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (folder / "constraints.txt").write_text("\n".join(constraints(row)))
    pins = [f"{package}=={release}" for package, release in row.pins.items()]
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(folder / "constraints.txt")]
    done = subprocess.run([*install, *pins, *TOOLS, f"{ROOT}[peft]"], capture_output=True, text=True)
    if done.returncode:
        return Outcome(row.pins, f"not installed: {reason(done.stderr)}")
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True
    )
    installed = {
        item["name"]: item["version"] for item in json.loads(listed.stdout) if item["name"] in PACKAGES
    }
    # An old or new release may warn of what the tests do not concern.
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-x",
        "-o",
        "filterwarnings=default",
        "-m",
        "not slow and not gpu",
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([*command, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    (folder.parent / f"{folder.name}.log").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = (lines or [reason(done.stderr)])[-1].strip("= ")
    return Outcome(installed, "ok" if done.returncode == 0 else f"failed: {summary}")


def reason(text: str) -> str:
    """The line of an installer's output that says why it stopped."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("ERROR", "error", "The conflict"))]
    return (named or lines or ["no output"])[0][:160]


def table(outcomes: Sequence[tuple[Row, Outcome]]) -> str:
    """One line for each row, in Markdown."""
    lines = [f"| row | {' | '.join(PACKAGES)} | result |", "|---" * (len(PACKAGES) + 2) + "|"]
    for row, outcome in outcomes:
        cells = [outcome.installed.get(package, "") for package in PACKAGES]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {outcome.result} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=["oldest", "newest", *PACKAGES], metavar="ROW")
    parser.add_argument(
        "--folder", type=Path, help="where environments and logs go; default: a temporary folder"
    )
    parser.add_argument(
        "--within", nargs="+", default=[], metavar="RANGE", help='what the index can install, as "torch<2.15"'
    )
    parser.add_argument("--list", action="store_true", help="print the rows, build nothing")
    options = parser.parse_args()
    limits = limit_ends(ranges(), [Requirement(text) for text in options.within])
    wanted = [row for row in rows(limits) if options.rows is None or row.name in options.rows]
    if options.list:
        for row in wanted:
            print(row.name, *(f"{package}=={release}" for package, release in row.pins.items()))
        return 0
    outcomes = []
    folder = options.folder or Path(tempfile.mkdtemp(prefix="versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(wanted):
        place = folder / f"{number}-{row.name}"
        outcomes.append((row, run(row, place)))
        print(f"{row.name}: {outcomes[-1][1].result}", file=sys.stderr, flush=True)
        shutil.rmtree(place)
    print(table(outcomes))
    return int(any(outcome.result != "ok" for _, outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

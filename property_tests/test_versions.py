"""The ranges of versions.py are those of pyproject.toml, and their ends are the right ones."""

from __future__ import annotations

import tomllib

import pytest
import versions
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def test_the_ranges_are_those_of_the_project() -> None:
    project = tomllib.loads((versions.ROOT / "pyproject.toml").read_text())["project"]
    found = versions.ranges()
    assert set(found) == set(versions.PACKAGES)
    assert f"torch{found['torch']}" in project["dependencies"]
    assert any(
        Requirement(line).specifier == found["trl"] for line in project["optional-dependencies"]["trl"]
    )


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [
        (">=2.6", ("2.6.0", "2.13.0")),
        (">=2.6,<2.13", ("2.6.0", "2.10.0")),
        (">=2.9,<2.11", ("2.9.1", "2.10.0")),
    ],
)
def test_the_ends_of_a_range(specifier: str, expected: tuple[str, str]) -> None:
    releases = ["2.10.0", "2.13.0+cpu", "2.13.0", "2.9.1", "2.6.0", "2.5.1", "2.14.0rc1"]
    assert versions.ends(SpecifierSet(specifier), releases) == expected


def test_a_range_without_a_release_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one in >=9, got 2\.6\.0"):
        versions.ends(SpecifierSet(">=9"), ["2.6.0"])


def test_rows_move_all_packages_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "releases", lambda package: ["1.0", "2.0", "3.0"])
    supported = {package: SpecifierSet(">=1.0") for package in versions.PACKAGES}
    limits = versions.limit_ends(supported, [Requirement("torch<3")])
    assert limits["torch"] == ("1.0", "2.0")
    rows = list(versions.rows(limits))
    assert [row.name for row in rows[:2]] == ["oldest", "newest"]
    assert set(rows[0].pins) == set(versions.PACKAGES)
    assert [(row.name, row.pins) for row in rows[2:4]] == [
        ("torch", {"torch": "1.0"}),
        ("torch", {"torch": "2.0"}),
    ]
    assert len(rows) == 2 + 2 * len(versions.PACKAGES)
    assert versions.constraints(rows[0]) == []
    pinned = versions.constraints(versions.Row("trl", {"trl": "1.15.0"}))
    assert any(line.startswith("torch==") for line in pinned)
    assert not any(line.startswith("trl==") for line in pinned)


def test_the_table_has_every_row() -> None:
    row = versions.Row("peft", {"peft": "0.17.0"})
    printed = versions.table([(row, versions.Outcome({"peft": "0.17.0"}, "failed: 1 error"))])
    assert printed.splitlines()[-1] == "| peft |  |  |  | 0.17.0 | failed: 1 error |"


def test_the_reason_is_the_installers_own_line() -> None:
    assert (
        versions.reason("WARNING: x\nERROR: Cannot install torch==9\nmore")
        == "ERROR: Cannot install torch==9"
    )
    assert versions.reason("") == "no output"


def test_the_tests_of_a_row_exist() -> None:
    assert all((versions.ROOT / name).is_file() for name in versions.TESTS)

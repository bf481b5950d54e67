"""What the pages under docs/ say of names: metrics that are logged, options that exist, defaults that are true."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from sdpo_rl import SDPOConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.sdpo import SDPOConfig as PeerConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = "\n".join(path.read_text() for path in (ROOT / "adapters").rglob("*.py"))


def unknown_metrics(text: str) -> list[str]:
    """Names after `self_distillation/` that no source of the trainer contains as a word in quotes."""
    names = set(re.findall(r"`(?:eval_)?self_distillation/(\w+)`", text))
    # A name that is put together has its last part in the source: f"{model}_padding_fraction".
    built = {name: re.sub(r"^(student|teacher)_", r"\\{\\w+\\}_", name) for name in names}
    return sorted(name for name in names if not re.search(rf'["/]({name}|{built[name]})"', SOURCES))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_metrics_that_a_page_names_are_logged(page: Path) -> None:
    assert unknown_metrics(page.read_text()) == []


def test_an_unknown_metric_is_found() -> None:
    assert unknown_metrics("`self_distillation/divergence` `self_distillation/no_such`") == ["no_such"]


def migration_rows() -> list[list[str]]:
    text = (DOCS / "migrating.md").read_text().split("## From TRL's experimental SDPO")[1].split("\n## ")[0]
    text = text.split("\n\nReward functions")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    return rows


def names(cell: str) -> list[str]:
    return [re.split(r"[=(]", quoted)[0].strip() for quoted in re.findall(r"`([^`]*)`", cell)]


def test_the_migration_table_names_options_of_both() -> None:
    theirs = {field.name for field in dataclasses.fields(PeerConfig)}
    ours = {field.name for field in dataclasses.fields(SDPOConfig)}
    for left, right, *_ in migration_rows():
        assert {name for name in names(left) if not name.startswith('"')} <= theirs
        assert {name for name in names(right) if not name.startswith('"')} <= ours


def test_the_migration_table_has_the_defaults() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(PeerConfig)}
    ours = SDPOConfig()
    checked = 0
    for left, right, *rest in migration_rows():
        before, arrow, after = (rest[0] if rest else "").partition(" → ")
        # Rows that give the default as a plain value of one option on each side.
        if not arrow or len(names(left)) > 1 or not re.fullmatch(r"`?[\w.]+`?", after):
            continue
        (name,) = names(left)
        own = (names(right) or [name])[0]
        assert str(theirs[name]) == before.strip("`").replace(".05", "0.05")
        assert str(getattr(ours, own)) == after.strip("`").replace(".05", "0.05").replace("00.05", "0.05")
        checked += 1
    assert checked > 5


def test_options_that_pages_name_exist() -> None:
    known = {field.name for field in dataclasses.fields(SDPOConfig)}
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"SDPOConfig\((\w+)=", page.read_text()):
            assert name in known | {"distillation_topk"}, f"{page.name}: {name}"

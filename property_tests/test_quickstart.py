"""The commands of docs/index.md, as they are printed there, in a folder like a fresh clone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from programs import EXAMPLES, ROOT

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> tuple[list[str], list[str]]:
    """The commands for a machine with a GPU, and those for one without; without their comments."""
    blocks = BLOCK.findall((ROOT / "docs" / "index.md").read_text())
    first, second = ([line.split("#")[0].strip() for line in block.splitlines()] for block in blocks[:2])
    return first, second


def run(line: str, folder: Path) -> str:
    """A line of the page: `sdpo` and `python` are those of the tests."""
    words = shlex.split(line)
    program = {"sdpo": [sys.executable, "-m", "sdpo_rl"], "python": [sys.executable]}[words[0]]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "adapters")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_commands_run_without_a_gpu(tmp_path: Path) -> None:
    first, second = commands()
    assert [shlex.split(line)[:2] for line in first[:3]] == [
        ["pip", "install"],
        ["sdpo", "doctor"],
        ["sdpo", "init"],
    ]
    (tmp_path / "examples").symlink_to(EXAMPLES)
    init, _, change = first[2].partition(" && ")
    run(init, tmp_path)
    folder = tmp_path / change.removeprefix("cd ")
    for line in second:
        printed = run(line, folder)
    assert printed.endswith("Saved to output.\n")
    assert (folder / "output" / "adapter_model.safetensors").is_file()
    # What the first block runs is what the second one runs, with options for this machine.
    trains = [line for line in first if line.startswith("sdpo train")]
    assert len(trains) == 2
    assert all(line.removesuffix(" --dry_run") in second[-1] for line in trains)


def test_the_recipe_to_start_from_gives_no_warning_of_its_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sdpo_rl.cli import init, recipe
    from sdpo_rl.diagnose.settings import warn_of_fast_teacher

    (tmp_path / "recipe.yaml").write_text(init.RECIPE)
    parsed = recipe.parse(["--config", f"{tmp_path}/recipe.yaml", "--use_cpu", "true", "--bf16", "false"])
    warn_of_fast_teacher(parsed.sdpo, samples_per_tick=parsed.training.generation_batch_size)
    assert [record for record in caplog.records if record.name.startswith("sdpo_rl")] == []

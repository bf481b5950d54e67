"""The Python blocks that `readme_blocks.py` only compiles run here, on a tiny model in place of the named one.

What a block takes from its reader's script (a dataset, a reward function, a trainer) is given; the names of models
become a folder, and the configurations are changed for a CPU. Only blocks that load with Unsloth are left out.
"""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import trl
from readme_blocks import PAGES, ROOT, blocks

import sdpo_rl

ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "max_completion_length": 4,
    "report_to": "none",
}
Skipped = tuple[Path, int, str]


def skipped() -> list[Skipped]:
    """Page, line and code of every block that is marked."""
    return [(page, line, code) for page in PAGES for line, language, code in blocks(page) if language == "py"]


def verdict(completion: Any) -> tuple[float, str | None]:
    """What `judge` is in the README: of one completion."""
    return (1.0, None) if "e" in tiny.text_of(completion) else (0.0, "write an e")


def judge(completions: list[Any], **_: Any) -> list[tuple[float, str | None]]:
    return [verdict(completion) for completion in completions]


@pytest.fixture
def on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that blocks take from their reader's script."""
    folder, numbers = tmp_path / "model", itertools.count()
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    grpo_config, sdpo_config, sdpo_trainer = trl.GRPOConfig, sdpo_rl.SDPOConfig, sdpo_rl.SDPOTrainer

    def arguments(*_: Any, **options: Any) -> Any:
        return grpo_config(**{**options, **ON_CPU, "output_dir": str(tmp_path / f"{next(numbers)}")})

    def trainer(model: str, *rest: Any, **options: Any) -> Any:
        assert isinstance(model, str)
        return sdpo_trainer(str(folder), *rest, **options)

    monkeypatch.setattr(trl, "GRPOConfig", arguments)
    monkeypatch.setattr(sdpo_rl, "SDPOTrainer", trainer)
    config: Any = lambda **options: sdpo_config(**{**options, "k": 20})  # noqa: E731
    config.preset = sdpo_config.preset
    monkeypatch.setattr(sdpo_rl, "SDPOConfig", config)
    rows = tiny.conversations(16)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    monkeypatch.syspath_prepend(ROOT / "examples" / "private_api")
    monkeypatch.chdir(tmp_path)
    return {"tasks": rows, "judge": judge, "model": "a/model", "reward_funcs": judge, "dataset": rows}


@pytest.mark.parametrize(
    "page", sorted({page for page, *_ in skipped()}), ids=lambda page: str(page.relative_to(ROOT))
)
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_on_a_tiny_model(
    page: Path,
    on_a_tiny_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if page.name == "unsloth.md":
        pytest.skip("it needs a GPU; property_tests/test_unsloth_gpu.py makes such a trainer")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    module.__dict__.update(on_a_tiny_model)
    if page.name == "README.md" and page.parent == ROOT:
        module.__dict__["judge"] = verdict
    if page.name == "probe.md":  # "with the trainer of your own script"
        module.__dict__["trainer"] = tiny.trainer(
            Path("own"),
            reward_funcs=[judge],
            sdpo_config=tiny.config(teacher_update_rate=0.05, teacher_rate_samples=256),
        )
    codes = [(line, code) for path, line, code in skipped() if path == page]
    for line, code in codes:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), module.__dict__)
    assert "where the paper has" not in caplog.text  # no first script gets the warning of a fast teacher
    printed = capsys.readouterr().out
    if "preview" in "".join(code for _, code in codes):
        assert "rows of a generation batch" in printed


def test_a_block_with_a_wrong_option_fails(on_a_tiny_model: dict[str, Any]) -> None:
    right = next(code for page, _, code in skipped() if page.name == "lora.md")
    wrong = right.replace("SDPOConfig()", "SDPOConfig(teacher_rate=0.05)")
    assert wrong != right
    with pytest.raises(TypeError, match="teacher_rate"):
        exec(wrong, dict(on_a_tiny_model))

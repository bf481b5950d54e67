"""Every file under examples/recipes is read by `sdpo train`, and makes a dry run on a tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import trl
import unsloth_driver as driver
import yaml
from programs import EXAMPLES, ROOT

from sdpo_rl.cli import main, recipe
from sdpo_rl.cli import unsloth as cli_unsloth

FOLDER = EXAMPLES / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
NAMES = {"lora_24gb", "full", "unsloth_4bit", "tools", "code_feedback", "llm_judge", "many_gpus", "vllm"}
# The tiny model has no head large enough for 100 tokens, a CPU no bfloat16 kernels, this machine no vLLM.
SMALL = (
    *("--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--use_vllm", "false"),
    *("--k", "20", "--lora_r", "2", "--dry_run"),
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the chat template of Qwen3, whose tool calls TRL can parse."""
    folder = tmp_path_factory.mktemp("model")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer(chat_template=template.read_text()).save_pretrained(folder)
    return folder


def values(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_complete() -> None:
    assert {name.removesuffix(".yaml") for name in RECIPES} == NAMES
    page = (FOLDER / "README.md").read_text()
    assert all(f"({path.name})" in page for path in FOLDER.iterdir() if path.suffix in (".yaml", ".py"))
    for name in RECIPES:
        assert f"--config {name}" in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", [name for name in RECIPES if not values(name).get("unsloth")])
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file that datasets leaves open
def test_a_recipe_makes_a_dry_run(
    name: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(FOLDER)
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")
    output = ("--output_dir", str(tmp_path), "--model_name_or_path", str(model_folder))
    code = main(["train", "--config", name, *SMALL, *output])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "nothing was trained (dry_run)" in printed.out
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_recipe_with_a_wrong_field_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER)
    (tmp_path / "wrong.yaml").write_text((FOLDER / "full.yaml").read_text() + "lora_rank: 3\n")
    assert main(["train", "--config", str(tmp_path / "wrong.yaml"), *SMALL]) == 2
    assert "lora_rank" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_the_values_are_those_of_the_file(name: str) -> None:
    parsed = recipe.parse(["--config", str(FOLDER / name), "--use_cpu", "true", "--bf16", "false"])
    fields: dict = {}
    for part in parsed:
        fields |= {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    for key, value in values(name).items():
        if key not in ("bf16", "chat_template_kwargs", "report_to"):
            found = fields[key]
            assert (getattr(found, "value", found) == value) or found == [value], key
    args = parsed.training
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps % args.num_generations == 0


def test_arithmetic_feedback_names_the_product_and_not_the_result() -> None:
    judge = load("arithmetic").judge
    turns = [[{"role": "assistant", "content": text}] for text in ("so 37", "36", "no idea")]
    verdicts = judge(turns, ["12 * 3 + 1"] * 3)
    assert verdicts[0] == (1.0, None)
    for score, feedback in verdicts[1:]:
        assert score == 0.0
        assert "12 * 3 = 36" in feedback
        assert "37" not in feedback


def test_functions_are_run_against_the_column() -> None:
    judge = load("functions").judge
    rows = [json.loads(line) for line in (FOLDER / "functions.jsonl").read_text().splitlines()]
    by_name = {row["name"]: row["tests"] for row in rows}
    right = "def clamp(x, low, high):\n    return min(max(x, low), high)"
    replies = [f"```python\n{right}\n```", right.replace("min(", "max(", 1)]
    turns = [[{"role": "assistant", "content": reply}] for reply in replies]
    (one, zero) = judge(turns, ["clamp"] * 2, [by_name["clamp"]] * 2)
    assert one == (1.0, None)
    assert zero == (0.0, "AssertionError: clamp(5, 0, 3) returned 5, expected 3")


# --- Unsloth's order --------------------------------------------------------------------------------------

STUB = """
import sys
ORDER = [name for name in ("trl", "transformers", "sdpo_rl.trainer") if name in sys.modules]
class FastLanguageModel: pass
def PatchFastRL(algorithm, model_class):
    print("patched", algorithm, model_class.__name__, "after", ORDER)
"""


@pytest.mark.parametrize(("flag", "patched"), [("true", True), ("false", False), (None, True)])
def test_trl_is_patched_before_anything_imports_it(tmp_path: Path, flag: str | None, patched: bool) -> None:
    (tmp_path / "unsloth.py").write_text(STUB)
    (tmp_path / "r.yaml").write_text("unsloth: true\nuse_cpu: true\nbf16: false\n")
    option = () if flag is None else ("--unsloth", flag)
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "adapters")))
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_rl", "train", "--config", "r.yaml", "--alpha", "7", *option],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "alpha: expected a number in [0, 1], got 7.0" in done.stderr
    assert done.stdout == ("patched GRPO FastLanguageModel after []\n" if patched else "")


def test_unsloth_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_unsloth, "find_spec", lambda name: None)
    assert main(["train", "--unsloth"]) == 2
    assert 'pip install "sdpo-rl[unsloth]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), "max_seq_length: expected a number of tokens with unsloth"),
        (("--max_seq_length", "256", "--use_peft", "false"), "use_peft: expected true with unsloth"),
        (("--max_seq_length", "256", "--use_dora", "true"), "use_dora: expected false with unsloth"),
    ],
)
def test_what_unsloth_does_not_load_is_refused(changes: tuple[str, ...], message: str) -> None:
    base = ("--use_cpu", "true", "--bf16", "false", "--unsloth", "true", "--use_peft", "true")
    with pytest.raises(cli_unsloth.UserError, match=message.replace("(", r"\(")):
        cli_unsloth.load_model(recipe.parse([*base, *changes]))


def observe_recipe(folder: str) -> dict:
    """In a fresh process: `sdpo train` by unsloth_4bit.yaml, over the real Unsloth on a CPU."""
    os.chdir(FOLDER)
    overrides = (
        *(
            "--use_cpu",
            "true",
            "--bf16",
            "false",
            "--dtype",
            "float32",
            "--load_in_4bit",
            "false",
            "--k",
            "20",
        ),
        *(
            "--max_seq_length",
            "500",
            "--model_name_or_path",
            f"{folder}/model",
            "--output_dir",
            f"{folder}/out",
        ),
        *("--max_completion_length", "8", "--optim", "adamw_torch", "--dry_run"),
        # A dry run generates a batch; in Triton's interpreter 64 rows take minutes.
        *("--gradient_accumulation_steps", "2"),
    )
    code = main(["train", "--config", "unsloth_4bit.yaml", *overrides])
    import sdpo_rl

    return {"code": code, "mro": [cls.__name__ for cls in sdpo_rl.SDPOTrainer.__mro__]}


@pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
def test_the_unsloth_recipe_over_the_real_unsloth(tmp_path: Path) -> None:
    tiny.model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    seen = driver.run("test_recipes:observe_recipe", tmp_path, interpreter=True, folder=str(tmp_path))
    assert seen["code"] == 0
    assert seen["mro"][:3] == ["SDPOTrainer", "ResumableTrainer", "UnslothGRPOTrainer"]

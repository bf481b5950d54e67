"""The architecture: what may import what, what users may rely on, and what no file may mention."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, run

CORE, ADAPTER = ROOT / "sdpo", ROOT / "adapters" / "sdpo_rl"
HEAVY = {"trl", "transformers", "peft", "bitsandbytes", "unsloth", "accelerate", "datasets"}
UNWANTED = HEAVY | {"triton", "matplotlib", "pandas", "scipy", "sklearn", "pyarrow", "wandb", "safetensors"}


# --- imports in a fresh process ---------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level modules that `code` loads in a fresh process which knows only this tree and its libraries."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(run(ROOT, "-c", script).split())


def test_the_core_needs_torch_alone() -> None:
    loaded = loaded_by("import sdpo, sdpo.fused, sdpo.fused.triton")
    assert "torch" in loaded
    assert loaded & UNWANTED == set()
    assert "sdpo_rl" not in loaded


def test_the_adapter_binds_nothing_before_it_is_used() -> None:
    loaded = loaded_by("import sdpo_rl; assert 'SDPOTrainer' in dir(sdpo_rl)")
    assert loaded & (UNWANTED | {"torch", "numpy", "sdpo"}) == set()


def test_the_config_needs_no_trainer() -> None:
    assert loaded_by("from sdpo_rl import SDPOConfig; SDPOConfig()") & UNWANTED == set()


def test_the_check_above_can_fail() -> None:
    assert "datasets" in loaded_by("import datasets")


# --- imports in the source --------------------------------------------------------------------------------


def modules(package: Path) -> dict[str, Path]:
    """Dotted names of a package's modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes: list[ast.AST] = list(tree.body) if top_level_only else list(ast.walk(tree))
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in nodes:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def tops(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", modules(CORE))
def test_core_modules_import_torch_einops_and_the_standard_library(name: str) -> None:
    allowed = {"torch", "einops", "sdpo", "__future__", *sys.stdlib_module_names}
    if name.startswith("sdpo.fused.triton."):
        allowed |= {"triton"}
    assert tops(imports(name, modules(CORE)[name])) - allowed == set()


@pytest.mark.parametrize("name", modules(CORE))
def test_core_modules_do_not_log_draw_or_hold_modules(name: str) -> None:
    path = modules(CORE)[name]
    assert tops(imports(name, path)) & {"logging", "warnings", "random", "numpy"} == set()
    source = path.read_text()
    assert not re.search(
        r"torch\.manual_seed|nn\.Module\b|\bprint\(|\.cuda\(", re.sub(r'"""(?s:.*?)"""', "", source)
    )


def home_of(name: str, known: dict[str, Path]) -> str:
    """The module that holds a dotted name."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def reached_from(start: str) -> set[str]:
    """Core modules that `start` needs, directly or not; the package's `__init__` aside."""
    known = modules(CORE)
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        needs = {home_of(need, known) for need in imports(name, known[name])} - seen - {"", "sdpo"}
        seen |= needs
        waiting += needs
    return seen


def test_the_plain_loss_and_the_fused_one_do_not_know_each_other() -> None:
    assert reached_from("sdpo.fused") & {"sdpo.loss"} == set()
    assert not [name for name in reached_from("sdpo.loss") if "fused" in name or "kernels" in name]
    assert reached_from("sdpo.fused")
    assert reached_from("sdpo.loss")


@pytest.mark.parametrize("name", [name for name in modules(CORE) if name != "sdpo"])
def test_the_core_has_no_cycles(name: str) -> None:
    assert name not in reached_from(name)


# What each part may import besides itself, part by part: the arrows point downwards.
ADAPTER_ARROWS: dict[str, set[str]] = {
    "presets": set(),
    "_config_checks": set(),
    "config": {"_config_checks", "presets"},
    "rollout": {"config"},
    "teacher": {"config"},
    "step": {"config", "teacher"},
    "resume": {"compat", "step", "teacher"},
    "compat": {"step", "teacher"},
    "diagnose": {"config", "compat", "rollout", "step"},
    "_validate": {"config", "presets", "rollout"},
    "credit": {"config", "rollout", "step"},
    "records": {"compat", "config", "credit", "rollout", "step"},
    "trainer": {
        "_validate",
        "compat",
        "config",
        "credit",
        "diagnose",
        "records",
        "resume",
        "rollout",
        "step",
        "teacher",
    },
    "cli": {"compat", "config", "credit", "diagnose", "presets", "trainer"},
    "__main__": {"cli"},
    "": {"config", "credit", "diagnose", "presets", "trainer"},  # the package's `__init__`
}
_BASE = {"_validate", "_numerics"}
_PLAIN = {"topk", "divergence", "importance", "aggregate", "metrics"}
CORE_ARROWS: dict[str, set[str]] = {
    "_validate": set(),
    "_numerics": set(),
    "topk": _BASE,
    "divergence": _BASE,
    "importance": _BASE,
    "aggregate": _BASE,
    "advantages": _BASE,
    "teacher": _BASE,
    "reprompt": _BASE,
    "weights": _BASE | {"importance"},
    "metrics": _BASE | {"topk"},
    "token_factors": _BASE | {"metrics", "weights"},
    "packed": _BASE | {"aggregate"},
    "terms": _BASE | {"divergence", "importance", "topk"},
    "parallel": _BASE | {"divergence"},
    "given": _BASE | {"divergence", "topk"},
    "loss": _BASE | _PLAIN,
    "fused": _BASE | {"given", "importance", "metrics", "token_factors"},
}
FUSED_ARROWS: dict[str, set[str]] = {
    "_types": set(),
    "_validate": {"_types"},
    "_policy": {"_types"},
    "_given": {"_types"},
    "_torch": {"_types", "_given", "_policy"},
    "triton": {"_types", "_torch", "_given", "_policy"},
    "_matmul": {"_types", "triton"},
    "_plan": {"_types", "_validate", "_matmul", "_torch", "triton"},
    "_rows": {"_types"},
    "_chunks": {"_types", "_matmul", "_rows"},
    "_derivatives": {"_validate"},
    "_autograd": {"_types", "_derivatives", "_chunks", "_policy", "_rows", "triton"},
    "_log_probs_autograd": {"_types", "_matmul", "_torch", "_derivatives"},
    "_log_probs": {"_types", "_validate", "_matmul", "_plan", "_log_probs_autograd"},
    "": {"_autograd", "_log_probs", "_plan", "_types", "_validate"},
}


def arrows(package: Path, root: str) -> dict[str, set[str]]:
    """Parts of a package (its folders and the modules beside them; "" is its `__init__`) and what each imports."""
    known = modules(package)
    names = {f"{root}{name.removeprefix(package.name)}": path for name, path in known.items()}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        part = name.removeprefix(root).lstrip(".").split(".")[0]
        needs = {need for need in imports(name, path) if need == root or need.startswith(f"{root}.")}
        parts = {home_of(need, names).removeprefix(root).lstrip(".").split(".")[0] for need in needs}
        found.setdefault(part, set()).update(parts - {part, ""})
    return found


@pytest.mark.parametrize(
    ("package", "root", "allowed"),
    [
        (ADAPTER, "sdpo_rl", ADAPTER_ARROWS),
        (CORE, "sdpo", CORE_ARROWS | {"": set(CORE_ARROWS) - _BASE}),
        (CORE / "fused", "sdpo.fused", FUSED_ARROWS),
    ],
    ids=["sdpo_rl", "sdpo", "sdpo.fused"],
)
def test_every_part_imports_what_it_may(package: Path, root: str, allowed: dict[str, set[str]]) -> None:
    found = arrows(package, root)
    assert found.keys() == allowed.keys()
    wrong = [f"{part} -> {need}" for part, needs in found.items() for need in sorted(needs - allowed[part])]
    assert wrong == []


@pytest.mark.parametrize(
    "allowed", [ADAPTER_ARROWS, CORE_ARROWS, FUSED_ARROWS], ids=["sdpo_rl", "sdpo", "fused"]
)
def test_the_allowed_arrows_have_no_cycle(allowed: dict[str, set[str]]) -> None:
    assert tuple(graphlib.TopologicalSorter(allowed).static_order())
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(
            allowed | {"_types": {""}, "config": {"trainer"}, "topk": {"loss"}}
        ).prepare()


def undeclared_of(cls: ast.ClassDef) -> list[str]:
    """Attributes of `self` that a class uses and never sets or defines."""
    declared = {node.name for node in cls.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        declared |= {target.id for target in targets if isinstance(target, ast.Name)}
    used = [
        node
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
    declared |= {node.attr for node in used if isinstance(node.ctx, ast.Store)}
    return [node.attr for node in used if node.attr not in declared]


def undeclared(tree: ast.Module) -> list[str]:
    """`undeclared_of` every class without bases."""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.bases)
    return [f"{cls.name}.{name}" for cls in classes for name in undeclared_of(cls)]


@pytest.mark.parametrize("name", modules(ADAPTER))
def test_classes_declare_the_attributes_they_use(name: str) -> None:
    assert undeclared(ast.parse(modules(ADAPTER)[name].read_text())) == []


def test_an_undeclared_attribute_is_found() -> None:
    mixin = "class Mixin:\n    x = 1\n    def f(self):\n        self.y = self.x\n        return self.args"
    assert undeclared(ast.parse(mixin)) == ["Mixin.args"]


def needs_without_a_name(source: str) -> set[str]:
    """What the one class of a module uses of `SDPOTrainer`, TRL's own attributes aside, and its docstring omits."""
    import trl

    from sdpo_rl.compat import upgrade_check

    (cls,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    named = re.findall(r"`(\w+)`", ast.get_docstring(cls) or "")
    return {*undeclared_of(cls)} - upgrade_check._attributes(trl.GRPOTrainer) - {*named}


def test_the_class_below_the_trainer_names_what_it_needs_of_it() -> None:
    source = (ADAPTER / "resume" / "resumable.py").read_text()
    assert needs_without_a_name(source) == set()
    assert needs_without_a_name(source.replace("`_unwrapped`", "the model")) == {"_unwrapped"}
    assert needs_without_a_name(source.replace("    _ticks: TickSchedule\n", "")) == {"_ticks"}


@pytest.mark.parametrize("name", modules(ADAPTER))
def test_optional_libraries_are_not_imported_at_the_top_of_the_adapter(name: str) -> None:
    top = tops(imports(name, modules(ADAPTER)[name], top_level_only=True))
    assert top & {"peft", "bitsandbytes", "unsloth", "triton", "matplotlib", "tqdm", "vllm"} == set()


def catch_alls(source: str) -> list[int]:
    """Lines of the handlers that would swallow a mistake with whatever they were meant for."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]


@pytest.mark.parametrize("name", {**modules(CORE), **modules(ADAPTER)})
def test_no_handler_catches_everything(name: str) -> None:
    assert not catch_alls({**modules(CORE), **modules(ADAPTER)}[name].read_text())


@pytest.mark.parametrize("clause", ["", " Exception", " BaseException as e", " (OSError, Exception)"])
def test_the_check_of_handlers_can_fail(clause: str) -> None:
    assert catch_alls(f"try:\n    pass\nexcept{clause}:\n    pass") == [3]
    assert not catch_alls("try:\n    pass\nexcept (OSError, MyException):\n    pass")


def test_adapters_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()
    assert not (ROOT / "property_tests" / "__init__.py").exists()
    assert not (ROOT / "examples" / "__init__.py").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("_editable_impl_sdpo_rl") is None, reason="not an editable install"
)
def test_an_editable_install_exposes_the_two_packages_alone(tmp_path: Path) -> None:
    names = ["sdpo", "sdpo_rl", "adapters", "examples", "property_tests"]
    script = f"import importlib.util as u; print(*[n for n in {names} if u.find_spec(n)])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.stdout.split() == ["sdpo", "sdpo_rl"]


# --- what users may rely on -------------------------------------------------------------------------------

SNAPSHOT = Path(__file__).with_name("public_api.txt")
UPDATE = "SDPO_UPDATE_PUBLIC_API"
PACKAGES = ("sdpo", "sdpo_rl")


def members(cls: type) -> Iterator[str]:
    """Public methods and fields of a class and its bases in these packages, one line each."""
    if dataclasses.is_dataclass(cls):
        # Not `f.type`: argument parsers write to it.
        declared = cls.__annotations__
        yield from (f"    {f.name}: {declared[f.name]}{_default(f)}" for f in dataclasses.fields(cls))
    elif issubclass(cls, tuple):
        yield from (f"    {name}: {text.__forward_arg__}" for name, text in cls.__annotations__.items())
    bases = [base for base in reversed(cls.__mro__) if base.__module__.split(".")[0] in PACKAGES]
    for name, member in sorted({name: each for base in bases for name, each in vars(base).items()}.items()):
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(function) and (not name.startswith("_") or name == "__init__"):
            if function.__qualname__.startswith("__create_fn__") or (
                dataclasses.is_dataclass(cls) and name == "__init__"
            ):
                continue
            yield f"    {name}{signature(function)}"
        elif isinstance(member, property) and not name.startswith("_"):
            yield f"    {name} (property)"


class Text(str):
    """A text that is its own representation: annotations are strings already."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(function: Any) -> inspect.Signature:
    plain = inspect.signature(function)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=Text(p.annotation))
        for p in plain.parameters.values()
    ]
    return plain.replace(parameters=parameters, return_annotation=Text(plain.return_annotation))


def _default(f: Any) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return f" = {f.default_factory()!r}"
    return "" if f.default is dataclasses.MISSING else f" = {f.default!r}"


def public_api() -> str:
    lines = []
    for package in PACKAGES:
        home = importlib.import_module(package)
        for name in sorted(home.__all__):
            value = getattr(home, name)
            if inspect.isclass(value):
                lines += [f"class {package}.{name}", *members(value)]
            else:
                lines.append(f"{package}.{name}{signature(value)}")
    return "\n".join(lines) + "\n"


def test_the_public_api_is_the_one_written_down() -> None:
    """After a change that is meant: SDPO_UPDATE_PUBLIC_API=1 pytest property_tests/test_architecture.py"""
    if os.environ.get(UPDATE):
        SNAPSHOT.write_text(public_api())
    assert public_api() == SNAPSHOT.read_text(), f"if this is meant, run again with {UPDATE}=1"


PROMISED = """
topk_log_probs gather_log_probs add_tail_bucket renormalize TopK GatheredLogProbs kl_divergence
generalized_jsd distillation_loss fused_distillation_loss LMHead token_statistics mean_metrics
importance_weights MaskedSum token_sum sequence_sum self_distillation_loss LossOutput Teacher ema
frozen live select_demonstrations Templates build_reprompts distillation_mask strip_thinking
"""


def test_promised_names_are_there_and_documented() -> None:
    import sdpo

    assert set(PROMISED.split()) <= set(sdpo.__all__)
    for name in sdpo.__all__:
        value = getattr(sdpo, name)
        assert value.__doc__, name
        if inspect.isfunction(value):
            options = [p for p in inspect.signature(value).parameters.values() if p.default is not p.empty]
            assert all(p.kind is p.KEYWORD_ONLY for p in options), name


# --- what no file may mention -----------------------------------------------------------------------------

PLACES = "|".join(["tmp", "work", "root", "home", "Users"])
FORBIDDEN = re.compile(rf"(?<![\w.:/~-])/(?:{PLACES})/\w|\b(?:SPEC|DESIGN|INTEGRATION|DEMO)\.md\b")


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if listed.returncode:
        pytest.skip("not a checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_machine_s_paths() -> None:
    found = []
    for path in repository_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip():.80}"
            for n, line in enumerate(lines, 1)
            if FORBIDDEN.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_search_above_can_find() -> None:
    slash = "/"
    assert FORBIDDEN.search(f"open('{slash}tmp{slash}x')")
    assert FORBIDDEN.search(f"cd {slash}home{slash}someone")
    assert not FORBIDDEN.search("https://example.org/home/page")
    assert not FORBIDDEN.search(f"output{slash}tmp{slash}x")

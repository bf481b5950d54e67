"""`sdpo doctor`: versions against the tested ranges, devices, and known conflicts, each with its fix."""

from __future__ import annotations

import importlib.util
import platform
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from . import Parser

OK, NOTE, PROBLEM = "ok", "note", "problem"
_REINSTALL = "install it again as its own page says, for this system and its GPU"
_EXTRAS = ("", "trl", "peft", "bnb", "triton", "unsloth")


class Check(NamedTuple):
    """One finding; `fix` is empty where there is nothing to do."""

    status: str
    text: str
    fix: str = ""


def run(arguments: Sequence[str]) -> int:
    """Print the findings; returns 1 if one is a problem."""
    parser = Parser(
        prog="sdpo doctor", description="Check versions, GPU and known conflicts of the installation."
    )
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    quiet = parser.parse_args(list(arguments)).quiet
    is_sound = True
    for check in chain(packages(), device(), conflicts(), expectations()):
        is_sound = is_sound and check.status != PROBLEM
        if check.status == PROBLEM or not quiet:
            # At once: the next check imports packages, and a broken one may end the process.
            text = f"{check.status:8}{check.text}" + (f"\n{'':8}→ {check.fix}" if check.fix else "")
            print(text, flush=True)
    return int(not is_sound)


def packages() -> Iterator[Check]:
    """Every dependency against the range that this library declares; only the required ones must be there."""
    yield Check(OK, f"python {platform.python_version()}, sdpo-rl {version('sdpo-rl')}")
    seen = {"sdpo-rl"}
    for extra in _EXTRAS:
        for need in map(Requirement, requires("sdpo-rl") or []):
            applies = need.marker is None or need.marker.evaluate({"extra": extra})
            if applies and need.name not in seen:
                seen.add(need.name)
                yield _package(need, extra)


def _package(need: Requirement, extra: str) -> Check:
    try:
        found = version(need.name)
    except PackageNotFoundError:
        if extra not in ("", "trl"):
            return Check(NOTE, f"{need.name} is not installed (extra {extra})")
        return Check(PROBLEM, f"{need.name} is not installed", f'pip install "sdpo-rl[{extra or "trl"}]"')
    if need.specifier.contains(found, prereleases=True):
        return Check(OK, f"{need.name} {found} (range {need.specifier})")
    problem = f"{need.name} {found} is outside the range {need.specifier}"
    return Check(PROBLEM, problem, f'pip install "{need.name}{need.specifier}"')


def device() -> Iterator[Check]:
    """The GPU, and whether the kernels can run on it."""
    try:
        import torch
    except (ImportError, OSError) as error:  # the latter where a shared library is missing
        yield Check(PROBLEM, f"torch cannot be imported: {error}", _REINSTALL)
        return
    if not torch.cuda.is_available():
        yield Check(NOTE, "no GPU that torch can use: training runs on the CPU, without the kernels")
        return
    properties = torch.cuda.get_device_properties(0)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    yield Check(OK, f"{torch.cuda.device_count()} × {properties.name}, {memory}, CUDA {torch.version.cuda}")
    if importlib.util.find_spec("triton") is None:
        yield Check(PROBLEM, "no Triton: the loss runs in plain torch, which is slower", "pip install triton")
    if not torch.cuda.is_bf16_supported():
        yield Check(NOTE, "this GPU has no bfloat16: train with fp16=True")


def conflicts() -> Iterator[Check]:
    """Combinations that do not work."""
    if importlib.util.find_spec("unsloth") is not None:
        yield Check(NOTE, "Unsloth: set unsloth: true in a recipe; for a script see docs/unsloth.md")
    if _has("vllm") and _has("trl"):
        yield from _vllm()


def _vllm() -> Iterator[Check]:
    # TRL takes other releases than its own too, with a warning.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from trl.import_utils import is_vllm_available

            is_vllm_available()
        except (ImportError, OSError):  # of another package, which `expectations` names
            return
        except InvalidVersion as error:  # a folder of that name, without the metadata of a package
            yield Check(PROBLEM, f"vllm: {error}", 'pip install "trl[vllm]", or remove the folder vllm')
            return
    for warning in caught:
        yield Check(PROBLEM, f"vllm: {warning.message}", 'pip install "trl[vllm]"')


def expectations() -> Iterator[Check]:
    """Whether the installed TRL still has what the trainer relies on."""
    if not _has("trl"):
        return
    try:
        from ..compat.upgrade_check import check_installation

        findings, skipped = check_installation()
    except (ImportError, RuntimeError, OSError, InvalidVersion) as error:
        # TRL imports packages that are installed beside it, also where a run does not use them.
        cause = error.__cause__ or error
        text = f"trl {version('trl')} has no GRPOTrainer here: {cause}"
        if not isinstance(cause, ModuleNotFoundError):  # whose message has the name
            text += f" ({type(cause).__name__} in {_module_of(cause)})"
        yield Check(PROBLEM, text, "install the release that another problem names, or remove the package")
        return
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        yield Check(
            PROBLEM, f"{finding.expectation}: {finding.problem}", f"it is needed because {finding.reason}"
        )
    if not problems:
        yield Check(
            OK, f"trl {version('trl')} has everything that SDPOTrainer relies on ({len(findings)} checks)"
        )
    if skipped and _has("unsloth"):
        yield Check(NOTE, f"Unsloth's trainer was not checked: {skipped}")


def _module_of(error: BaseException) -> str:
    """The module whose code raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")) if frames else "an unknown module"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

"""The SDPO options of a run, saved beside its model, and how a resumed run differs from them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("sdpo_rl")

FILE = "sdpo_config.json"


def save(folder: str | Path, options: Mapping[str, Any], *, version: str) -> None:
    """Write the options and the version of this library atomically.

    Args:
        folder: of the model; made if it does not exist.
        options: by name; a value that JSON does not have is written as its representation.
        version: of this library.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"sdpo_rl_version": version, "options": dict(options)}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2, default=repr) + "\n")
    os.replace(unfinished, path)


def warn_of_differences(
    folder: str | Path, options: Mapping[str, Any], defaults: Mapping[str, Any], *, version: str
) -> None:
    """One warning that names every option with another value than when the checkpoint was saved.

    Args:
        folder: of the checkpoint.
        options: of this run, by name.
        defaults: of this version; what an option has that the earlier version did not know.
        version: of this library.
    """
    try:
        content = json.loads((Path(folder) / FILE).read_text())
        known, since = dict(content["options"]), content["sdpo_rl_version"]
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        if options["enabled"]:
            logger.warning(
                "%s has no %s that can be read: whether its run had the SDPO options of this one is unknown.",
                folder,
                FILE,
            )
        return
    now = json.loads(json.dumps(dict(options), default=repr))
    saved = {**json.loads(json.dumps(dict(defaults), default=repr)), **known}
    changes = [
        f"{name} {saved[name]!r} -> {now[name]!r}"
        if name in now
        else f"{name} {saved[name]!r}, which is no option any more"
        for name in saved
        if name not in now or saved[name] != now[name]
    ]
    if changes:
        by = "" if since == version else f" by sdpo_rl {since} (this is {version})"
        logger.warning(
            "Since %s was saved%s, SDPO options changed: %s. The run continues with the new ones; what is left of "
            "a generation batch keeps its reprompts and the weights of its rows.",
            folder,
            by,
            ", ".join(changes),
        )


def learning_rates(scheduler: Any) -> list[float]:
    """The base learning rates of a schedule, one for each parameter group; empty if it has none."""
    return list(getattr(scheduler, "base_lrs", ()))


def warn_of_learning_rates(
    folder: str | Path, given: Sequence[float], restored: Sequence[float], *, is_deepspeed: bool
) -> None:
    """A warning where the learning rate of this run is not used: the Trainer restores that of the checkpoint.

    Args:
        folder: of the checkpoint.
        given: by `learning_rates` before the checkpoint was loaded.
        restored: the same afterwards.
        is_deepspeed: DeepSpeed trains, which resumes from no checkpoint without a schedule.
    """
    if list(given) != list(restored):
        now, then = (", ".join(dict.fromkeys(f"{rate:g}" for rate in rates)) for rates in (given, restored))
        logger.warning(
            "learning_rate: %s is not used, the run continues with %s: the Trainer restores the optimizer and its "
            "schedule from %s. To train with the new one, %s.",
            now,
            then,
            folder,
            "start a run from the model in it, without resuming"
            if is_deepspeed
            else "delete scheduler.pt there; the optimizer then begins anew, and so does the schedule, with its "
            "warm-up and all of max_steps",
        )


def warn_of_length(folder: str | Path, max_steps: int, *, follows: Sequence[str]) -> None:
    """A warning where values that change over the whole run jump: the run has another length than the checkpoint's.

    Args:
        folder: of the checkpoint.
        max_steps: of `GRPOConfig`; below 1 where the epochs are the length.
        follows: names of the values that change over the run.
    """
    try:
        then = int(json.loads((Path(folder) / "trainer_state.json").read_text())["max_steps"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return
    if follows and 0 < max_steps != then:
        logger.warning(
            "max_steps: %d, was %d when %s was saved. Over a run these change, so they jump here and follow the "
            "new length: %s.",
            max_steps,
            then,
            folder,
            ", ".join(follows),
        )

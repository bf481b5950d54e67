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
        options: by name; values that JSON cannot store are written as their `repr`.
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
        defaults: this version's; the saved value of options that the earlier version did not have.
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
    now = _as_saved(options)
    saved = {**_as_saved(defaults), **known}
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


def _as_saved(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a file has them: lists for tuples, and a `repr` where JSON has no such value."""
    return dict(json.loads(json.dumps(dict(options), default=repr)))


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
        is_deepspeed: whether DeepSpeed trains; it cannot resume from a checkpoint whose schedule was deleted.
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


def warn_of_max_steps(folder: str | Path, max_steps: int, *, scheduled: Sequence[str]) -> None:
    """A warning where values that are scheduled over the run jump, because the run has another number of steps.

    Args:
        folder: the checkpoint.
        max_steps: the option of `GRPOConfig`; below 1 where the run is counted in epochs.
        scheduled: names of these values.
    """
    if not scheduled or max_steps < 1:
        return
    try:
        then = int(json.loads((Path(folder) / "trainer_state.json").read_text())["max_steps"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return
    if max_steps != then:
        logger.warning(
            "max_steps: %d, was %d when %s was saved. Scheduled over the whole run, these jump here and follow the "
            "new number of steps: %s.",
            max_steps,
            then,
            folder,
            ", ".join(scheduled),
        )

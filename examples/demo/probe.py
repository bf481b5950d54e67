"""The probe's verdict on several settings of the demo, beside what training with them does.

    python examples/demo/probe.py --seeds 3 --output output/demo/probe.json

The probe takes seconds and moves no weight. What training does is in `record.json` for the arms of the demo; the
other settings are trained here. `probe_record.json` is the output of three seeds; `docs/probe.md` shows its table.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import run as demo
import torch
import transformers
import trl
from language import load_tokenizer
from machine import Verdict, changed_machine
from transformers import Qwen2ForCausalLM

from sdpo_rl import SDPOTrainer, probe
from sdpo_rl.diagnose.probe.result import ProbeResult

STEPS, EVERY = 80, 4  # as in the demo
SHOWN = (0, 1024, 5120)  # samples
RECORD = json.loads((Path(__file__).parent / "record.json").read_text())


def silent_interpreter(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[Verdict]:
    """The scores of the interpreter, with blank feedback."""
    return [Verdict(verdict.score, " ") for verdict in demo.interpreter(completions, answer)]


_NO_FEEDBACK = {"include_environment_feedback": False}
SETTINGS = (
    *(arm for arm in demo.ARMS if arm.name != "GRPO"),  # which has no teacher
    demo.Arm("SDPO, blank feedback", 3e-4, reward=silent_interpreter),
    # No completion reaches this score.
    demo.Arm(
        "SDPO, no success, no feedback", 7e-4, changes={**_NO_FEEDBACK, "success_reward_threshold": 2.0}
    ),
    demo.Arm("SDPO, α=0", 7e-4, changes={"alpha": 0.0}),
)


def probed(arm: demo.Arm, seed: int) -> ProbeResult:
    """The probe of one setting on the machine of `seed`."""
    machine = changed_machine(seed)
    with TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            model=Qwen2ForCausalLM.from_pretrained(demo.CHECKPOINT, dtype=torch.float32),
            args=demo.grpo_config(arm, seed, STEPS, folder),
            sdpo_config=demo.sdpo_config(arm),
            processing_class=load_tokenizer(demo.CHECKPOINT),
            reward_funcs=[arm.reward],
            train_dataset=demo.training_prompts(machine, seed, count=STEPS * demo.PROMPTS),
        )
        return probe(trainer, answer_column="answer")


def trained(arm: demo.Arm, seed: int, steps: int) -> dict[str, Any]:
    """The held-out probability of the right answer while training, from the demo's record where it has the arm."""
    for known in RECORD["runs"]:
        if (known["arm"], known["seed"]) == (arm.name, seed):
            return {"samples": known["samples"], "probability": known["probability"]}
    found = demo.learn(arm, seed, steps, EVERY)
    return {"samples": found["samples"], "probability": found["probability"]}


def percent(values: Sequence[float | None]) -> str:
    """The mean of what is known, in percent."""
    known = [value for value in values if value is not None]
    return f"{100 * fmean(known):.0f} %" if known else "–"


def table(record: dict[str, Any]) -> list[str]:
    """One row for each setting: rates, verdict and what training does, means over the seeds."""
    columns = ["setting", "rows with a signal", "these prompts, bare", "with the feedback", "verdict"]
    lines = [f"| {' | '.join([*columns, *(f'{samples} samples' for samples in SHOWN)])} |"]
    lines.append("|" + "---|" * (len(columns) + len(SHOWN)))
    for name in record["settings"]:
        runs = [run for run in record["runs"] if run["setting"] == name]
        results = [run["probe"] for run in runs]
        curves = [dict(zip(run["samples"], run["probability"], strict=True)) for run in runs]
        outlooks = [result["verdict"]["outlook"] for result in results]
        cells = [
            percent([result["signal"]["share"] for result in results]),
            percent([result["success"]["same_prompts"] for result in results]),
            percent([result["success"]["retry"] for result in results]),
            ", ".join(dict.fromkeys(outlooks)),
            *(
                f"{fmean(curve[samples] for curve in curves):.2f}".lstrip("0")
                for samples in SHOWN
                if all(samples in curve for curve in curves)
            ),
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The probe's verdicts on the demo, beside what training does."
    )
    parser.add_argument("--seeds", type=int, default=1, help="repeat everything over this many seeds")
    parser.add_argument("--output", type=Path, default=Path("output/demo/probe.json"))
    parser.add_argument("--quick", action="store_true", help="train a few steps only, to check that it runs")
    options = parser.parse_args()
    if not 1 <= options.seeds <= len(RECORD["machines"]):
        parser.error(f"--seeds must be from 1 to {len(RECORD['machines'])}, got {options.seeds}")

    demo.prepare()  # it silences the warning of the teacher's rate, which the verdict says too

    runs = []
    for arm in SETTINGS:
        for seed in range(options.seeds):
            result = probed(arm, seed)
            print(f"\n{arm.name}, seed {seed}\n{result}", flush=True)
            curve = trained(arm, seed, 4 if options.quick else STEPS)
            runs.append({"setting": arm.name, "seed": seed, "probe": result.to_dict(), **curve})
    record = {
        "settings": {arm.name: {"learning_rate": arm.learning_rate, **arm.changes} for arm in SETTINGS},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "python": platform.python_version(),
        "runs": runs,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + "\n".join(table(record)))


if __name__ == "__main__":
    main()

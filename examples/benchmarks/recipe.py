"""The 24 GB recipe in several configurations: memory, size of the teacher, step and loading times in one table.

    python examples/benchmarks/recipe.py --output examples/benchmarks/records/recipe-h200.json
    python examples/benchmarks/recipe.py --cases ragged --output examples/benchmarks/records/recipe-ragged-h200.json
    python examples/benchmarks/recipe.py --peer-path FOLDER   # compare with an unpacked sdpo-rl 0.0.3

Every case runs in its own process with a time limit, on the same random weights of the Qwen2.5-7B shape. Cases
whose times are compared run one at a time on an idle GPU; the others, which only measure memory, run together. A
case that fails or exceeds the limit leaves the end of its log in the record, and the others continue. The case
"in turn" compares layouts within one process, which changes the layout from step to step; the records of
`--cases ragged` are from before it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

import unsloth_7b_24gb as recipe  # noqa: E402 - from the folder above

PEER = "sdpo-rl 0.0.3"
LONG = ["--completion", "2048", "--reprompt", "4096"]

# Name of a case: its arguments of unsloth_7b_24gb.py. The timed cases run one at a time.
TIMED: dict[str, list[str]] = {
    "Unsloth 4-bit GRPO": ["--arm", "grpo"],
    "Unsloth 4-bit SDPO": [],
    "TRL 4-bit SDPO": ["--no-unsloth", "--steps", "2"],
}
TOGETHER: dict[str, list[str]] = {
    "Unsloth 4-bit SDPO, 2048 + 4096": [*LONG, "--steps", "1"],
    "Unsloth 4-bit SDPO, 4 rows": ["--batch", "4", "--steps", "2"],
    "Unsloth 4-bit GRPO, 4 rows": ["--arm", "grpo", "--batch", "4", "--steps", "2"],
    "Unsloth bf16 SDPO": ["--base", "bf16", "--steps", "2"],
    "TRL bf16 SDPO": ["--no-unsloth", "--base", "bf16", "--steps", "2"],
    "TRL bf16 GRPO": ["--no-unsloth", "--base", "bf16", "--arm", "grpo", "--steps", "2"],
    "TRL 4-bit GRPO": ["--no-unsloth", "--arm", "grpo", "--steps", "2"],
    "Unsloth 4-bit SDPO, dropout 0.05": ["--dropout", "0.05", "--steps", "2"],
    "Unsloth 4-bit SDPO, chunk from free memory": ["--chunk", "0", "--steps", "2"],
}
PEER_CASE = {PEER + ", Unsloth 4-bit, 4 rows": ["--batch", "4", "--steps", "2"]}


def ragged(rows: int, packing: str) -> str:
    """The name of a case with given completions of different lengths, whose rows are padded or not."""
    return f"Unsloth 4-bit SDPO, {rows} ragged rows, {packing}"


RAGGED_ROWS = (8, 32)  # with few rows a fast GPU waits for kernel launches, with many it does not


def ragged_options(rows: int, steps: int) -> list[str]:
    """The arguments of such a case."""
    return ["--batch", str(rows), "--completion", "1024", "--steps", str(steps), "--limit-gib", "0"]


RAGGED = {
    ragged(rows, packing): ragged_options(rows, 12) for rows in RAGGED_ROWS for packing in ("padded", "auto")
}
# Layout and `fused_lora_forward` of the steps of one process, in turn: the speed of a host changes with time.
TURNS = {"padded": ("padded", True), "auto": ("auto", True), "auto, PEFT's forward": ("auto", False)}
FIRST_ROUNDS = 3  # compile, and are not counted
IN_TURN = ragged(8, "in turn")
ALTERNATING = {IN_TURN: ragged_options(8, len(TURNS) * (FIRST_ROUNDS + 15))}
LOADING = ("Unsloth 4-bit SDPO", "TRL 4-bit SDPO")


# --- one case, in its own process -------------------------------------------------------------------------


def run_case(options: argparse.Namespace) -> None:
    """Run one case and write its record."""
    arguments = recipe.parse(options.arguments)
    build: Callable[..., Any] = recipe.build_trainer
    if options.peer_path:
        sys.path.insert(0, str(options.peer_path))
        build = build_peer
    if options.packing:
        build = functools.partial(build_ragged, options.packing)
    record = recipe.run(arguments, build)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def build_peer(options: argparse.Namespace, model: Any, args: Any, **shared: Any) -> Any:
    """The other library's trainer over the same model and task."""
    from sdpo_rl import SDPOConfig, SDPOTrainer

    judge = shared.pop("reward_funcs")

    class Reward:
        __name__ = "addition"
        last_feedback: list[str] = []  # noqa: RUF012 - the other library reads this attribute

        def __call__(self, **columns: Any) -> list[float]:
            judged = judge(**columns)
            self.last_feedback = [text for _, text in judged]
            return [score for score, _ in judged]

    sdpo_config = SDPOConfig(alpha=0.5, k=100, teacher_update_rate=0.05, teacher_mode="lora_ema")
    return SDPOTrainer(model=model, args=args, sdpo_config=sdpo_config, reward_funcs=[Reward()], **shared)


def build_ragged(packing: str, options: argparse.Namespace, model: Any, args: Any, **shared: Any) -> Any:
    """This library's trainer on the lengths of `step.py --lengths lognormal`, with completions that are given."""
    import step

    from sdpo_rl import SDPOConfig, SDPOTrainer

    lengths = argparse.Namespace(lengths="lognormal", rows=options.batch, completion=options.completion)
    step.fix_completions(model, step.completion_lengths(lengths), options.completion)
    config = SDPOConfig(alpha=0.5, k=100, loss_chunk_size=options.chunk or None)
    trainer = SDPOTrainer(
        model=model,
        args=args,
        sdpo_config=replace(config, packing=packing if packing != "in turn" else "auto"),
        **shared,
    )
    if packing == "in turn":
        trainer.add_callback(alternate(trainer))
    return trainer


def alternate(trainer: Any) -> Any:
    """A callback that begins each step with the settings of its turn."""
    from transformers import TrainerCallback

    from sdpo_rl.step.runner import ChosenLayout

    class Turns(TrainerCallback):
        chosen: Any = None  # the layout that the first step found

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if trainer._forward_mode is None:
                return
            self.chosen = self.chosen or trainer._forward_mode.layout
            packing, fused = list(TURNS.values())[state.global_step % len(TURNS)]
            layout = ChosenLayout("padded") if packing == "padded" else self.chosen
            trainer._forward_mode = trainer._forward_mode._replace(layout=layout)
            trainer._sdpo_config = replace(trainer.sdpo_config, fused_lora_forward=fused)

    return Turns()


# --- all cases --------------------------------------------------------------------------------------------


def launch(name: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in its own process and return its record, or the end of its log if it failed."""
    folder = options.scratch / "".join(c if c.isalnum() else "-" for c in name)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "record.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--output", str(result)]
    if name.startswith(PEER):
        command += ["--peer-path", str(options.peer_path.resolve())]
    if name in RAGGED or name in ALTERNATING:
        command += ["--packing", name.rpartition(", ")[2]]
    command += [
        "--",
        "--random-weights",
        str(options.weights.resolve()),
        "--shape",
        options.shape,
        *arguments,
    ]
    command += options.arguments
    began = time.perf_counter()
    print(f"[{name}] started", flush=True)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            code: int | str = process.wait(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"timed out after {options.timeout:.0f} s"
    seconds = time.perf_counter() - began
    if code == 0 and result.exists():
        record = json.loads(result.read_text()) | {"arguments": arguments, "process_seconds": seconds}
        print(f"[{name}] {seconds:.0f} s, peak {record['peak_gib']:.2f} GiB", flush=True)
        return record
    last = (folder / "log.txt").read_text(errors="replace")[-3000:]
    print(f"[{name}] FAILED ({code})\n{last}", flush=True)
    return {"failed": str(code), "log": last, "process_seconds": seconds}


def table(records: dict[str, dict[str, Any]]) -> str:
    """The cases as a Markdown table in GiB, MiB and seconds.

    Times of cases that ran together are left out, because these slow each other down.
    """
    lines = [
        "| case | loaded | loading s | loading peak | peak | reserved | teacher MiB | s/step | generating |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in records.items():
        if "failed" in record:
            lines.append(f"| {name} | failed: {record['failed']} | | | | | | | |")
            continue
        lines.append(
            f"| {name} | {record['loaded_gib']:.2f} | {record['load_seconds']:.1f} | "
            f"{record['loading_peak_gib']:.2f} | {record['peak_gib']:.2f} | {record['reserved_gib']:.2f} | "
            f"{record['teacher_mib']:.0f} | {typical(record['step_seconds']):.2f} | "
            f"{typical(record['generation_seconds']):.2f} |"
            if name in TIMED or name in RAGGED
            else f"| {name} | {record['loaded_gib']:.2f} | | {record['loading_peak_gib']:.2f} | "
            f"{record['peak_gib']:.2f} | {record['reserved_gib']:.2f} | {record['teacher_mib']:.0f} | | |"
        )
    return "\n".join(lines)


def typical(seconds: list[float]) -> float:
    """The median without the first step, which includes one-time set-up."""
    return statistics.median(seconds[1:] or seconds or [float("nan")])


def turns(seconds: list[float]) -> dict[str, float]:
    """The median time of a step of each turn."""
    counted = range(len(TURNS) * FIRST_ROUNDS, len(seconds))
    return {
        name: statistics.median(seconds[step] for step in counted if step % len(TURNS) == turn)
        for turn, name in enumerate(TURNS)
    }


def ratios(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """SDPO over Unsloth's GRPO and ragged rows over padded ones: step time and peak; loading time."""
    result: dict[str, float] = {}
    done = {name: record for name, record in records.items() if "failed" not in record}
    sdpo, grpo = done.get("Unsloth 4-bit SDPO"), done.get("Unsloth 4-bit GRPO")
    if sdpo and grpo:
        result["step time SDPO / GRPO"] = typical(sdpo["step_seconds"]) / typical(grpo["step_seconds"])
        result["peak SDPO - GRPO, GiB"] = sdpo["peak_gib"] - grpo["peak_gib"]
    for rows in RAGGED_ROWS:
        padded, auto = (done.get(ragged(rows, packing)) for packing in ("padded", "auto"))
        if padded and auto:
            times = [typical(case["step_seconds"]) for case in (auto, padded)]
            result[f"step time auto / padded, {rows} rows"] = times[0] / times[1]
            if padded["peak_gib"]:  # 0 on a CPU
                result[f"peak auto / padded, {rows} rows"] = auto["peak_gib"] / padded["peak_gib"]
    if IN_TURN in done:
        seconds = turns(done[IN_TURN]["step_seconds"])
        for name in list(TURNS)[1:]:
            result[f"step time {name} / padded, 8 rows in turn"] = seconds[name] / seconds["padded"]
    fast, plain = (done.get(name) for name in LOADING)
    if fast and plain:
        result["loading time plain / Unsloth"] = plain["load_seconds"] / fast["load_seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, default=Path("output/qwen7b"), help="folder of the checkpoint"
    )
    parser.add_argument("--shape", choices=recipe.SHAPES, default="7b")
    parser.add_argument("--scratch", type=Path, default=Path("output/unsloth"), help="logs and caches")
    parser.add_argument("--peer-path", type=Path, help="folder that holds sdpo-rl 0.0.3's sdpo_rl package")
    parser.add_argument("--only", choices=["timed", "together"], help="the first or the second half")
    parser.add_argument("--cases", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    parser.add_argument("--at-a-time", type=int, default=4, help="cases that run together")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--packing", help=argparse.SUPPRESS)  # of a worker
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help="after `--`: further arguments of every case")
    options = parser.parse_args()
    if options.worker:
        run_case(options)
        return

    for name, value in {"UNSLOTH_COMPILE_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}.items():
        os.environ.setdefault(name, value)
    began = time.perf_counter()
    recipe.make_weights(options.weights, options.shape)
    print(f"weights ready after {time.perf_counter() - began:.0f} s", flush=True)
    timed, together = {**TIMED, **RAGGED, **ALTERNATING}, copy.copy(TOGETHER)
    if options.peer_path:
        together |= PEER_CASE
    if options.cases:
        timed, together = (
            {name: value for name, value in cases.items() if any(part in name for part in options.cases)}
            for cases in (timed, together)
        )
    timed = {} if options.only == "together" else timed
    together = {} if options.only == "timed" else together
    records: dict[str, dict[str, Any]] = {}
    if options.output and options.output.exists():
        records = json.loads(options.output.read_text())["cases"]

    def save() -> None:
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            record = {"cases": records, "ratios": ratios(records)}
            options.output.write_text(json.dumps(record, indent=1) + "\n")

    for name, arguments in timed.items():
        records[name] = launch(name, arguments, options)
        save()
    with ThreadPoolExecutor(options.at_a_time) as pool:
        running = {
            name: pool.submit(launch, name, arguments, options) for name, arguments in together.items()
        }
        for name, future in running.items():
            records[name] = future.result()
            save()
    print(table(records))
    for name, ratio in ratios(records).items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()

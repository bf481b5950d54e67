"""Training on several processes beside one: the same losses, time with as many rows each, memory, resuming.

    python examples/benchmarks/ranks.py --shape 7b --training lora --kinds ddp --processes 2 1 --rows 8 \\
        --checkpointing --float32 small --output examples/benchmarks/records/ranks-7b-lora-h200.json
    python examples/benchmarks/ranks.py --shape 1.5b --training full --kinds fsdp2 zero2 zero3 zero3-layers ddp \\
        --processes 2 1 --rows 32 --checkpointing --float32 small --grpo --output record.json
    python examples/benchmarks/ranks.py --shape 1.5b --training full --kinds zero3-layers --processes 2 1 \\
        --rows 32 --checkpointing --float32 small --grpo --no-gather \\
        --output examples/benchmarks/records/ranks-1.5b-full-no-gather-h200.json

The second command gives more than its record, `ranks-1.5b-full-h200.json`, which was joined from single launches
(below). It has of `ddp` only the float32 run on one process, of TRL's own loss only the runs under ZeRO-3. The
records of the third, of one session each, also have runs of an option that is gone (`one trace` and `in turn`);
only the first has the float32 runs and the micro-batches. The fourth was joined from launches before that.

Random weights of a published shape and given completions, as in `step.py`. Every kind on every number of processes
is a launch by `accelerate launch` with a file of `examples/accelerate`; `zero3-layers` is `zero3` with the class of
the decoder layers named, so that DeepSpeed gathers whole layers. Its runs, one after the other:

* `same rows`: the processes share `--rows` rows. The losses are compared with those of one process of this kind.
* `micro-batches`: on one process, the same rows in two gradient-accumulation steps. Its difference from `same rows`
  shows how much rounding alone changes the losses where a batch is split.
* `rows each`: each process has `--rows` rows. Weak scaling is the time of one process over this time.
* With `--float32 SHAPE`: `float32` is `same rows` of that shape without mixed precision; on the largest number of
  processes it also saves a checkpoint after half of the steps. `resumed` goes on from that checkpoint, and is
  compared with the run that saved it. DeepSpeed reads its optimizer's state on as many processes only.
* With `--grpo`: `grpo` is TRL's own loss, with `--rows` rows on each process, and its weak scaling.
* With `--deepspeed FILE`: that configuration in the place of Accelerate's file, for `zero2` and `zero3`.
* With `--no-gather`: under ZeRO-3, TRL does not gather the whole model for a generation, which no run has.
* On one process, the float32 losses of a kind are compared with those of `ddp`, where that was measured.

Reported: the losses of all steps, the median time of a step after the first two, the peak of allocated memory and
the bytes of the teacher, each the largest over the processes.

A launch can also be started by hand, on some of the GPUs, and the results of launches with the same options joined.
Of a run that several launches measured the record has the steps of all, and the losses and bytes of the first:

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 examples/benchmarks/ranks.py \\
        --worker fsdp2.json --kinds fsdp2 --processes 4 2 1 --scratch FOLDER ...
    python examples/benchmarks/ranks.py --join *.json --output record.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from step import (
    ALPHABET,
    FEEDBACK,
    SHAPES,
    TEMPLATES,
    Clock,
    completion_lengths,
    environment,
    make_model,
    make_tokenizer,
    prompt_text,
)
from transformers import TrainerCallback
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.diagnose.report import teacher_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate"
KINDS = ("ddp", "fsdp2", "zero2", "zero3", "zero3-layers")
LAYER_CLASS = "Qwen2DecoderLayer"
LAYERS_VARIABLE = "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"  # set by `accelerate launch` from its option
RANKS_SHAPES: dict[str, dict[str, Any]] = {
    **SHAPES,
    "small": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                  intermediate_size=1408, vocab_size=32768, tie_word_embeddings=True),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
               intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True),
}  # fmt: skip
RUNS = ("same rows", "micro-batches", "rows each", "float32", "resumed", "grpo")
WARMUP = 2
FLAGS = ("checkpointing", "grpo", "no_gather")
COMMON = ("shape", "training", "rows", "steps", "completion", "lengths", "group", "prompt_tokens")
Result = dict[str, Any]


# --- in a process of a launch -----------------------------------------------------------------------------


class SaveOnce(TrainerCallback):
    """A checkpoint after one step and no other."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.step


def runs_of(options: argparse.Namespace, kind: str, processes: int) -> dict[str, dict[str, Any]]:
    """What a launch measures by name, as changes to its options."""
    most, half = max(options.processes), options.steps // 2
    folder = Path(options.scratch) / kind
    exact = {"shape": options.float32, "dtype": "float32", "folder": folder}
    runs: dict[str, dict[str, Any]] = {"same rows": {}}
    if processes == 1:
        runs["micro-batches"] = {"micro_batches": 2}
    else:
        runs["rows each"] = {"rows": options.rows * processes}
    if options.float32:
        runs["float32"] = {**exact, "save": half if processes == most else None}
    if options.float32 and (processes == most or not kind.startswith("zero")):
        runs["resumed"] = {**exact, "checkpoint": str(folder / f"checkpoint-{half}")}
    if options.grpo:
        runs["grpo"] = {"enabled": False, "rows": options.rows * processes}
    return {name: changes for name, changes in runs.items() if name in (options.only or runs)}


def fix_completions(model: Any, options: argparse.Namespace, process: int) -> None:
    """Make `generate` return the same random completions for a row of a step, whatever process has it."""
    lengths, limit = completion_lengths(options), options.completion

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(2, 2 + len(ALPHABET), (options.rows, limit), generator=generator)
        for row, length in zip(tokens, lengths, strict=True):
            if length < limit:
                row[length - 1] = 1  # the end of the sequence
                row[length:] = 0
        first = process * len(input_ids)
        return torch.cat([input_ids, tokens[first : first + len(input_ids)].to(input_ids.device)], dim=1)

    model.generate = generate


def make_trainer(options: argparse.Namespace, device: str, clock: Clock) -> SDPOTrainer:
    """The trainer of a run, the same for any number of processes."""
    lora, processes = options.training == "lora", int(os.environ.get("WORLD_SIZE", "1"))
    dtype = torch.bfloat16 if lora and options.dtype == "bfloat16" else torch.float32
    arguments = GRPOConfig(
        str(options.folder),
        per_device_train_batch_size=options.rows // processes // options.micro_batches,
        gradient_accumulation_steps=options.micro_batches,
        num_generations=options.group,
        max_completion_length=options.completion,
        max_steps=options.steps,
        bf16=options.dtype == "bfloat16",
        use_cpu=device == "cpu",
        # With adapters the Trainer would look for parameters without a gradient in every step; there are none.
        ddp_find_unused_parameters=False,
        gradient_checkpointing=options.checkpointing,
        learning_rate=1e-4 if lora else 1e-5,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        ds3_gather_for_generation=not options.no_gather,
        deepspeed=options.deepspeed,
    )
    trainer = SDPOTrainer(
        model=make_model(RANKS_SHAPES[options.shape], device, dtype, lora),
        args=arguments,
        sdpo_config=SDPOConfig(enabled=options.enabled, k=100, **TEMPLATES),
        processing_class=make_tokenizer(),
        # Two rewards, for advantages; neither is a success.
        reward_funcs=[lambda completions, **_: [0.25 * (row % 2) for row in range(len(completions))]],
        train_dataset=Dataset.from_dict(
            {
                "prompt": [prompt_text(options, row) for row in range(options.rows)],
                "feedback": [FEEDBACK] * options.rows,
            }
        ),
        callbacks=[clock, SaveOnce(options.save)],
    )
    fix_completions(trainer._unwrapped, options, trainer.accelerator.process_index)
    return trainer


def free_engine(trainer: SDPOTrainer) -> None:
    """Let go of DeepSpeed's engine, which would keep the weights and the optimizer's state of a run for the next.

    `destroy` removes the hooks. Under ZeRO-3 the model also stays in a list, and in a cache of a method.
    """
    engine = trainer.model_wrapped
    if not hasattr(engine, "destroy"):
        return
    engine.destroy()
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    module = partitioned_param_coordinator.__name__
    # The method is behind a decorator that leaves no name by which its cache can be reached.
    for cache in gc.get_objects():
        if isinstance(cache, functools._lru_cache_wrapper) and cache.__module__ == module:
            cache.cache_clear()


def measure(options: argparse.Namespace, device: str) -> Result:
    """One run."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    trainer = make_trainer(options, device, clock)
    trainer.train(resume_from_checkpoint=options.checkpoint)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    bytes_here = torch.tensor([peak, teacher_bytes(trainer)[0]], device=trainer.accelerator.device)
    most = trainer.accelerator.gather(bytes_here).view(-1, 2).amax(dim=0).tolist()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.accelerator.wait_for_everyone()
    free_engine(trainer)
    return {
        "rows": options.rows,
        "losses": {str(entry["step"]): entry["loss"] for entry in log if entry["step"] > options.first},
        "steps": clock.steps[WARMUP:],
        "peak_bytes": most[0],
        "teacher_bytes": most[1],
    }


def work(options: argparse.Namespace) -> None:
    """All runs of a launch in this process; the first process writes each result when it is there."""
    processes, rank = (int(os.environ.get(name, alone)) for name, alone in (("WORLD_SIZE", 1), ("RANK", 0)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    (kind,) = options.kinds
    found: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in runs_of(options, kind, processes).items():
            first = options.steps // 2 if "checkpoint" in changes else 0
            fixed = {"folder": folder, "save": None, "checkpoint": None, "first": first}
            fixed |= {"micro_batches": 1, "enabled": True}
            found[name] = measure(argparse.Namespace(**{**vars(options), **fixed, **changes}), device)
            if rank == 0:
                result = {
                    "options": recorded(options),
                    "environment": environment(
                        "cpu" if device == "cpu" else "cuda", "accelerate", "deepspeed"
                    ),
                    "runs": {kind: {str(processes): found}},
                }
                options.worker.write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        # A process that ends early would make the collectives of the others fail.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# --- in the process that the user starts ------------------------------------------------------------------


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The options that launches of one record share; a record without the last two joins with older launches."""
    known = {name: str(getattr(options, name)) for name in (*COMMON, "dtype", "float32", "checkpointing")}
    if options.no_gather:
        known["no_gather"] = "True"
    if options.deepspeed:
        known["deepspeed"] = json.loads(Path(options.deepspeed).read_text())
    return known


def launch(options: argparse.Namespace, kind: str, processes: int, result: Path) -> None:
    """Run `work` on several processes; adds what it failed with to the results."""
    variables = {name: value for name, value in os.environ.items() if name != LAYERS_VARIABLE}
    if torch.cuda.is_available() and not options.deepspeed:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        config, _, layers = kind.partition("-")
        command += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes)]
        command += ["--deepspeed_moe_layer_cls_names", LAYER_CLASS] if layers else []
    else:  # Accelerate's files of several GPUs start one process on a CPU
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
        if not torch.cuda.is_available():
            # The default, cpu:0, is no place to restore a tensor to.
            variables["ACCELERATE_TORCH_DEVICE"] = "cpu"
    command += [str(Path(__file__).resolve()), "--worker", str(result), "--kinds", kind]
    command += ["--processes", *map(str, options.processes)]
    for name in (*COMMON, "dtype", "float32", "deepspeed", "scratch"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(options, name)]
    command += ["--only", *options.only] if options.only else []
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    known = json.loads(result.read_text()) if result.exists() else {"runs": {kind: {str(processes): {}}}}
    for name in runs_of(options, kind, processes):
        text = (done.stderr or done.stdout)[-2000:]
        known["runs"][kind][str(processes)].setdefault(name, {"failed": text})
    result.write_text(json.dumps(known))


def repeated(run: Result, again: Result) -> Result:
    """A run of two launches: that of the first with the steps of both, or that of the one that did not fail."""
    if "failed" in run or "failed" in again:
        return again if "failed" in run else run
    return {**run, "steps": run["steps"] + again["steps"]}


def join(results: list[Result]) -> Result:
    """The record of several launches; a run that several of them have counts with all its steps.

    Raises:
        ValueError: launches with other options.
    """
    record: Result = {"runs": {}}
    for result in results:
        for key in ("options", "environment"):
            # A launch that failed before its first result has neither.
            if key in result and record.setdefault(key, result[key]) != result[key]:
                raise ValueError(
                    f"{key}: expected those of all launches alike, {record[key]} as in the first, got "
                    f"{result[key]}; join launches with the same options"
                )
        for kind, launches in result["runs"].items():
            for processes, runs in launches.items():
                known = record["runs"].setdefault(kind, {}).setdefault(processes, {})
                for name, run in runs.items():
                    known[name] = repeated(known[name], run) if name in known else run
    return {**record, "compared": compare(record["runs"])}


def difference(run: Result, other: Result) -> dict[str, float]:
    """The largest difference of two runs' losses over the steps that both have; NaN where it is at any of them."""
    steps = sorted(run["losses"].keys() & other["losses"].keys(), key=int)
    off = [abs(run["losses"][step] - other["losses"][step]) for step in steps]
    relative = [_relative(value, other["losses"][step]) for value, step in zip(off, steps, strict=True)]
    return {"steps": len(steps), "relative": _largest(relative), "absolute": _largest(off)}


def _relative(off: float, loss: float) -> float:
    if off == 0:
        return 0.0
    return off / abs(loss) if loss else off * math.inf


def _largest(values: list[float]) -> float:
    # `max` skips NaN after the first value.
    return max(values) if values and not any(map(math.isnan, values)) else math.nan


def median_seconds(run: Result) -> float:
    """The median time of a step; NaN without a timed one."""
    return statistics.median(run["steps"]) if run["steps"] else math.nan


def compare(runs: dict[str, dict[str, dict[str, Result]]]) -> dict[str, dict[str, float]]:
    """Differences of losses and the weak scaling, of the runs that did not fail."""
    found: dict[str, dict[str, float]] = {}
    for kind, launches in runs.items():
        one = launches.get("1", {})
        most = launches[max(launches, key=int)]
        for processes, measured in launches.items():
            references = dict.fromkeys(("same rows", "float32"), one) if processes != "1" else {}
            if processes == "1" and kind != "ddp":
                references = {"float32": runs.get("ddp", {}).get("1", {})}
            pairs = {name: reference.get(name, {}) for name, reference in references.items()}
            pairs |= dict.fromkeys(("rows each", "micro-batches"), one.get("same rows", {}))
            pairs["resumed"] = most.get("float32", {})
            pairs["grpo"] = one.get("grpo", {}) if processes != "1" else {}
            for name, other in pairs.items():
                run, label = measured.get(name, {}), f"{kind} on {processes}, {name}"
                if "losses" not in run or "losses" not in other:
                    continue
                if name in ("rows each", "grpo"):
                    found[label] = {"weak scaling": median_seconds(other) / median_seconds(run)}
                else:
                    found[label] = difference(run, other)
    return found


def show(record: Result) -> None:
    """Print a record."""
    width = 2 + max(len(f"{kind} on 1, {name}") for kind in KINDS for name in RUNS)
    print(f"{'run':{width}}{'s/step':>10}{'peak GiB':>10}{'teacher GiB':>13}")
    for kind, launches in record["runs"].items():
        for processes, runs in launches.items():
            for name, run in runs.items():
                label = f"{kind} on {processes}, {name}"
                if "failed" in run:
                    print(f"{label:{width}}failed: {(run['failed'].strip().splitlines() or ['?'])[-1][:80]}")
                    continue
                seconds = median_seconds(run)
                peak, teacher = (run[f"{what}_bytes"] / 2**30 for what in ("peak", "teacher"))
                print(f"{label:{width}}{seconds:10.3f}{peak:10.2f}{teacher:13.3f}")
    for label, values in record["compared"].items():
        print(f"{label:{width}}" + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=RANKS_SHAPES, default="tiny")
    parser.add_argument("--training", choices=("lora", "full"), default="lora")
    parser.add_argument("--grpo", action="store_true", help="also run TRL's own loss")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--float32", choices=RANKS_SHAPES, help="also compare losses of this shape in float32, and resume"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["ddp"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--rows", type=int, default=8, help="of a step on one process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--group", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument(
        "--no-gather", action="store_true", help="GRPOConfig(ds3_gather_for_generation=False)"
    )
    parser.add_argument("--deepspeed", help="file of GRPOConfig(deepspeed=...)")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="measure only these runs")
    parser.add_argument(
        "--scratch", help="folder for checkpoints; needed with --worker, otherwise a temporary one"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--join", nargs="+", type=Path, help="results of launches started by hand")
    parser.add_argument("--worker", type=Path, help="be a process of a launch; its result goes to this file")
    options = parser.parse_args()
    whole = max(options.processes) * options.group
    if options.rows % whole:
        parser.error(
            f"--rows: expected a multiple of {whole}, whole groups of {options.group} for each of "
            f"{max(options.processes)} processes, got {options.rows}"
        )
    if options.deepspeed and not {"zero2", "zero3"}.issuperset(options.kinds):
        parser.error(
            "--deepspeed: expected --kinds zero2 or zero3, whose configuration it is, got "
            f"{' '.join(options.kinds)}"
        )
    if options.worker:
        if not options.scratch:
            parser.error(
                "--worker: expected --scratch as well, a folder that all launches share: one on fewer processes "
                "reads the checkpoint of that on most"
            )
        expected = {"zero3": None, "zero3-layers": LAYER_CLASS}
        for kind in set(options.kinds) & expected.keys():
            if os.environ.get(LAYERS_VARIABLE) != expected[kind]:
                parser.error(
                    f"--kinds: {kind}: expected {expected[kind]} as accelerate's option "
                    f"--deepspeed_moe_layer_cls_names, got {os.environ.get(LAYERS_VARIABLE)}"
                )
        work(options)
        return
    if options.join:
        results = [json.loads(path.read_text()) for path in options.join]
    elif set(options.kinds) - {"ddp"} and not torch.cuda.is_available():
        parser.error(
            "--kinds: expected ddp on a machine without a GPU, where Accelerate shards nothing, got "
            f"{' '.join(options.kinds)}"
        )
    else:
        results = measure_all(options)
    record = join(results)
    show(record)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def measure_all(options: argparse.Namespace) -> list[Result]:
    """The results of all launches; the largest number of processes comes first, because it saves."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        options.scratch = options.scratch or name
        for kind in options.kinds:
            for processes in sorted(options.processes, reverse=True):
                file = Path(name) / f"{kind}-{processes}.json"
                launch(options, kind, processes, file)
                results.append(json.loads(file.read_text()))
                print(f"{kind} on {processes}: done", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    main()

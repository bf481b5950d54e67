"""Training on several processes beside one: the same losses, time with as many rows each, memory, resuming.

    python examples/benchmarks/ranks.py --shape 7b --training lora --kinds ddp zero2 --rows 8 \\
        --output examples/benchmarks/records/ranks-7b-lora-h200.json
    python examples/benchmarks/ranks.py --shape 1.5b --training full --kinds fsdp2 zero3 --rows 4 --resume \\
        --output examples/benchmarks/records/ranks-1.5b-full-h200.json

Every run is a launch of its own by `accelerate launch` with the files of `examples/accelerate`; random weights of a
published shape and given completions, as in `step.py`. Runs:

* `one`: one process with `--rows` rows in a step, the reference.
* `KIND, same rows`: `--processes` processes that share these rows. Its losses are compared with those of `one`.
* `KIND, rows each`: as many rows in each process as `one` has. Weak scaling is the time of `one` over its time.
* With `--resume`: `KIND, saved` writes a checkpoint after half of the steps, and `KIND, resumed on N` goes on from
  it, on as many processes and on one. Their losses are compared with those of `KIND, same rows`.

Reported: the losses of all steps, the median time of a step after the first two, the peak of allocated memory and
the bytes of the teacher in each process.
"""

from __future__ import annotations

import argparse
import json
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
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.diagnose.report import teacher_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate"
KINDS = ("ddp", "fsdp2", "zero2", "zero3")
RANKS_SHAPES: dict[str, dict[str, Any]] = {
    **SHAPES,
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True),
}  # fmt: skip
WARMUP = 2


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


def whole_model(shape: dict[str, Any], device: str) -> Any:
    """A model in float32, for training of all weights."""
    torch.manual_seed(0)
    config = Qwen2Config(**shape, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    model.config._name_or_path = "random"
    return model


def work(options: argparse.Namespace) -> None:
    """One process of a run; the first writes the result."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    shape = RANKS_SHAPES[options.shape]
    model = make_model(shape, device) if options.training == "lora" else whole_model(shape, device)
    arguments = GRPOConfig(
        options.folder,
        per_device_train_batch_size=options.rows // processes,
        num_generations=options.group,
        max_completion_length=options.completion,
        max_steps=options.steps,
        bf16=on_gpu and options.dtype == "bfloat16",
        use_cpu=not on_gpu,
        gradient_checkpointing=options.checkpointing,
        learning_rate=1e-4 if options.training == "lora" else 1e-5,
        report_to=[],
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    clock = Clock()
    trainer = SDPOTrainer(
        model=model,
        args=arguments,
        sdpo_config=SDPOConfig(k=100, **TEMPLATES),
        processing_class=make_tokenizer(),
        # Two rewards, for advantages; neither is a success.
        reward_funcs=[lambda completions, **_: [0.25 * (row % 2) for row in range(len(completions))]],
        train_dataset=Dataset.from_dict(
            {
                "prompt": [prompt_text(options, row) for row in range(options.rows)],
                "feedback": [FEEDBACK] * options.rows,
            }
        ),
        callbacks=[clock],
    )
    fix_completions(trainer._unwrapped, options, trainer.accelerator.process_index)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=options.checkpoint)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    bytes_here = torch.tensor([peak, teacher_bytes(trainer)[0]], device=trainer.accelerator.device)
    most = trainer.accelerator.gather(bytes_here).view(-1, 2).amax(dim=0).tolist()
    if trainer.accelerator.is_main_process:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "processes": processes,
            "rows": options.rows,
            "losses": {entry["step"]: entry["loss"] for entry in log},
            "gradient_norms": {entry["step"]: entry["grad_norm"] for entry in log},
            "steps": clock.steps[WARMUP:],
            "peak_bytes": most[0],
            "teacher_bytes": most[1],
            "environment": environment("cuda" if on_gpu else "cpu"),
        }
        Path(options.result).write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def launch(
    options: argparse.Namespace, scratch: Path, kind: str, processes: int, rows: int, **changes: Any
) -> dict[str, Any]:
    """Run `work` on several processes; returns its result, or what it failed with."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    kept = ("shape", "training", "dtype", "steps", "completion", "lengths", "group")
    values = {name: getattr(options, name) for name in kept}
    values |= {"rows": rows, "result": result, "folder": scratch / "run", **changes}
    if options.prompt_tokens:
        values["prompt-tokens"] = options.prompt_tokens
    if torch.cuda.is_available():
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--num_processes", str(processes)]
    else:  # Accelerate's files of several GPUs start one process on a CPU
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [str(Path(__file__).resolve()), "--worker"]
    command += [text for name, value in values.items() for text in (f"--{name}", str(value))]
    command += ["--checkpointing"] * options.checkpointing
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not result.exists():
        return {"failed": (done.stderr or done.stdout)[-2000:]}
    return dict(json.loads(result.read_text()))


def difference(run: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two runs' losses, relative, over the steps that both have."""
    steps = run["losses"].keys() & other["losses"].keys()
    return max(
        abs(run["losses"][step] - other["losses"][step]) / abs(other["losses"][step]) for step in steps
    )


def measure_all(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All runs of the command by name."""
    runs: dict[str, dict[str, Any]] = {}
    count, rows = options.processes, options.rows
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)

        def add(name: str, *launched: Any, **changes: Any) -> None:
            runs[name] = launch(options, folder, *launched, **changes)
            print(f"{name}: {'failed' if 'failed' in runs[name] else 'done'}", file=sys.stderr, flush=True)

        add("one", "ddp", 1, rows)
        for kind in options.kinds:
            add(f"{kind}, same rows", kind, count, rows)
            add(f"{kind}, rows each", kind, count, rows * count)
            if options.resume:
                half = options.steps // 2
                saved = {"save-steps": half, "folder": folder / kind}
                add(f"{kind}, saved", kind, count, rows, **saved)
                checkpoint = folder / kind / f"checkpoint-{half}"
                add(f"{kind}, resumed on {count}", kind, count, rows, checkpoint=checkpoint)
                # A sharded state of DeepSpeed's optimizer is read by as many processes as wrote it.
                if not kind.startswith("zero"):
                    add(f"{kind}, resumed on 1", "ddp", 1, rows, checkpoint=checkpoint)
    return runs


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Differences of losses and the weak scaling, of the runs that did not fail."""
    found: dict[str, float] = {}
    for name, run in runs.items():
        kind, _, what = name.partition(", ")
        other = runs["one"] if what in ("same rows", "rows each") else runs.get(f"{kind}, same rows", {})
        if not what or "failed" in run or "losses" not in other:
            continue
        if what == "rows each":
            found[f"weak scaling of {kind}"] = statistics.median(other["steps"]) / statistics.median(
                run["steps"]
            )
        else:
            found[f"loss of {name}"] = difference(run, other)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=RANKS_SHAPES, default="tiny")
    parser.add_argument("--training", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["ddp"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of a step on one process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--group", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--resume", action="store_true", help="also save, and resume")
    parser.add_argument("--scratch", help="folder for checkpoints; default: a temporary one")
    parser.add_argument("--output", type=Path)
    for name in ("result", "folder", "checkpoint"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--save-steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if set(options.kinds) - {"ddp"} and not torch.cuda.is_available():
        parser.error("--kinds: expected ddp on a machine without a GPU, where Accelerate shards nothing")
    if options.rows % (options.processes * options.group):
        parser.error(
            f"--rows: expected a multiple of {options.processes * options.group}, "
            f"whole groups of {options.group} for each of {options.processes} processes, got {options.rows}"
        )
    runs = measure_all(options)
    print(f"{'run':28}{'s/step':>10}{'peak GiB':>10}{'teacher GiB':>13}")
    for name, run in runs.items():
        if "failed" in run:
            print(f"{name:28}failed: {run['failed'].strip().splitlines()[-1][:80]}")
            continue
        seconds = statistics.median(run["steps"]) if run["steps"] else float("nan")
        print(
            f"{name:28}{seconds:10.3f}{run['peak_bytes'] / 2**30:10.2f}{run['teacher_bytes'] / 2**30:13.3f}"
        )
    ratios = compare(runs)
    for name, value in ratios.items():
        print(f"{name:44}{value:12.3g}")
    if options.output:
        shown = {k: v for k, v in vars(options).items() if v and k not in ("output", "scratch")}
        record = {"options": {k: str(v) for k, v in shown.items()}, "runs": runs, "compared": ratios}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

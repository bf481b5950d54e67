"""A 7B model on a 24 GB card: Unsloth, a 4-bit base, LoRA on all linear layers, self-distillation.

    python examples/unsloth_7b_24gb.py                                    # Qwen2.5-7B-Instruct from the hub
    python examples/unsloth_7b_24gb.py --random-weights output/qwen7b     # random weights of that shape
    python examples/unsloth_7b_24gb.py --random-weights output/qwen7b --completion 2048 --reprompt 4096 --steps 1
    python examples/unsloth_7b_24gb.py --no-unsloth --base bf16           # plain TRL

The process may allocate `--limit-gib` at most, whatever the GPU has. It prints the memory after loading, the peak
of training, the memory of the teacher and the time of every step; `--output` writes them as JSON.

The task is addition, and the feedback on a wrong answer states the expected number. With random weights no answer
is right, so the signal of every row is its feedback.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from random_weights import SHAPES, character_tokenizer, make_weights

MODEL = "Qwen/Qwen2.5-7B-Instruct"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB, MIB = 2**30, 2**20


# --- the task ---------------------------------------------------------------------------------------------


def questions(rows: int) -> Any:
    from datasets import Dataset

    draw = random.Random(0)
    sums = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [
                [{"role": "user", "content": f"What is {a} + {b}? End with the number."}] for a, b in sums
            ],
            "answer": [a + b for a, b in sums],
        }
    )


def make_reward(filler: str = "") -> Callable[..., list[tuple[float, str]]]:
    """A reward function with feedback; `filler` makes the feedback, and so the reprompt, longer."""

    def addition(
        completions: list[Any], completion_ids: list[list[int]], answer: list[int], **_: Any
    ) -> list[tuple[float, str]]:
        pairs = []
        for completion, ids, expected in zip(completions, completion_ids, answer, strict=True):
            numbers = re.findall(r"\d+", completion[0]["content"])
            if numbers and int(numbers[-1]) == expected:
                pairs.append((1.0, ""))
            else:
                # Rewards differ within a group, or GRPO would have no gradient.
                partial = 0.01 * (sum(ids) % 10)
                pairs.append((partial, f"The number at the end should be {expected}. {filler}"))
        return pairs

    return addition


# --- the model --------------------------------------------------------------------------------------------


def load_with_unsloth(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model with adapters, tokenizer, and no `peft_config`: Unsloth adds the adapters."""
    from unsloth import FastLanguageModel, PatchFastRL

    PatchFastRL("GRPO", FastLanguageModel)
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.name,
        max_seq_length=max(2048, options.reprompt + options.completion + 64),
        dtype=None,
        load_in_4bit=options.base == "4bit",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        target_modules=LINEAR,
        lora_dropout=options.dropout,
        use_gradient_checkpointing="unsloth",
    )
    return model, tokenizer, None


def load_plain(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The same model with transformers and bitsandbytes, tokenizer, and the `peft_config` of its adapters."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.name,
        dtype=torch.bfloat16,
        quantization_config=quantization if options.base == "4bit" else None,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    tokenizer = None if options.random_weights else AutoTokenizer.from_pretrained(options.name)
    adapters = LoraConfig(
        r=16, lora_alpha=16, target_modules=LINEAR, lora_dropout=options.dropout, task_type="CAUSAL_LM"
    )
    return model, tokenizer, adapters


# --- the trainer ------------------------------------------------------------------------------------------


def arguments(options: argparse.Namespace, folder: str) -> Any:
    """An optimizer step has eight rows, two prompts with four completions, or one micro-batch if that has more."""
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        num_generations=4,
        max_completion_length=options.completion,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=max(8 // options.batch, 1),
        learning_rate=5e-6,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        max_steps=options.steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3407,
    )


def build_trainer(options: argparse.Namespace, model: Any, args: Any, **shared: Any) -> Any:
    """`--arm grpo` is the trainer of TRL (or Unsloth), `--arm sdpo` that of this library."""
    if options.arm == "grpo":
        from trl import GRPOTrainer

        judge = shared.pop("reward_funcs")
        return GRPOTrainer(model=model, args=args, reward_funcs=scores_only(judge), **shared)
    from sdpo_rl import SDPOConfig, SDPOTrainer

    sdpo_config = SDPOConfig(
        alpha=0.5,
        k=100,
        teacher_update_rate=0.05,
        loss_chunk_size=options.chunk or None,
    )
    return SDPOTrainer(model=model, args=args, sdpo_config=sdpo_config, **shared)


def scores_only(judge: Callable[..., list[tuple[float, str]]]) -> Callable[..., list[float]]:
    def addition(**columns: Any) -> list[float]:
        return [score for score, _ in judge(**columns)]

    return addition


# --- the run ----------------------------------------------------------------------------------------------


class Memory:
    """Allocated GPU memory of this process, zero without a GPU; `peak` since the last `reset`."""

    def __init__(self, limit_gib: float) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        if self._cuda and limit_gib:
            total = self._cuda.get_device_properties(0).total_memory
            self._cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total))

    def now(self) -> int:
        """Bytes allocated at this moment."""
        self.wait()
        return self._cuda.memory_allocated() if self._cuda else 0

    def peak(self) -> tuple[int, int]:
        """Peak of the allocated and of the reserved bytes."""
        if not self._cuda:
            return 0, 0
        return self._cuda.max_memory_allocated(), self._cuda.max_memory_reserved()

    def reset(self) -> None:
        """Reset the peak."""
        if self._cuda:
            self._cuda.empty_cache()
            self._cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self._cuda:
            self._cuda.synchronize()


def watch(memory: Memory) -> Any:
    """A callback that records the wall time of every optimizer step and the peak memory at its end."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.peaks: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            memory.wait()
            self._start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            memory.wait()
            self.seconds.append(time.perf_counter() - self._start)
            self.peaks.append(memory.peak()[0])

    return Watch()


def time_generation(trainer: Any, memory: Memory) -> list[float]:
    """Wrap generation: a list that receives the seconds of every generation batch."""
    seconds: list[float] = []
    generate = trainer._generate_and_score_completions

    def timed(inputs: Any) -> Any:
        memory.wait()
        start = time.perf_counter()
        output = generate(inputs)
        memory.wait()
        seconds.append(time.perf_counter() - start)
        return output

    trainer._generate_and_score_completions = timed
    return seconds


def run(options: argparse.Namespace, build: Callable[..., Any] = build_trainer) -> dict[str, Any]:
    """Load, train, and return the measurements."""
    memory = Memory(options.limit_gib)
    memory.reset()
    options.name = str(options.random_weights or options.model)
    start = time.perf_counter()
    if not options.no_unsloth:
        import unsloth  # noqa: F401 - its import patches the libraries below
    else:
        import trl  # noqa: F401
    imported = time.perf_counter()
    model, tokenizer, adapters = (load_plain if options.no_unsloth else load_with_unsloth)(options)
    if options.random_weights:
        tokenizer = character_tokenizer(options.name)
    model_bytes = memory.now()
    load_seconds = time.perf_counter() - imported
    loading_peak = memory.peak()[0]

    filler = ""
    if options.reprompt:
        tokens = tokenizer(text="Look at the digits once more. " * options.reprompt)["input_ids"]
        filler = tokenizer.decode(tokens[: max(options.reprompt - 300, 0)])
    shared: dict[str, Any] = {
        "processing_class": tokenizer,
        "reward_funcs": make_reward(filler),
        "train_dataset": questions(64),
    }
    if adapters is not None:
        shared["peft_config"] = adapters
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, model, arguments(options, folder), **shared)
        watched = watch(memory)
        trainer.add_callback(watched)
        generation = time_generation(trainer, memory)
        memory.reset()
        before = memory.now()
        trainer.train()
    allocated, reserved = memory.peak()
    history = trainer.state.log_history
    return {
        "arm": options.arm,
        "unsloth": not options.no_unsloth,
        "base": options.base,
        "batch": options.batch,
        "completion": options.completion,
        "reprompt": options.reprompt,
        "chunk": options.chunk,
        "limit_gib": options.limit_gib,
        "import_seconds": imported - start,
        "load_seconds": load_seconds,
        "loading_peak_gib": loading_peak / GIB,
        "loaded_gib": model_bytes / GIB,
        "before_training_gib": before / GIB,
        "teacher_mib": teacher_bytes(trainer) / MIB,
        "peak_gib": allocated / GIB,
        "reserved_gib": reserved / GIB,
        "step_peaks_gib": [peak / GIB for peak in watched.peaks],
        "step_seconds": watched.seconds,
        "generation_seconds": generation,
        "logs": [{k: v for k, v in entry.items() if k in LOGGED} for entry in history],
        "versions": versions(),
    }


LOGGED = {
    "step",
    "loss",
    "grad_norm",
    "reward",
    "completions/mean_length",
    "self_distillation/divergence",
    "self_distillation/reprompt_sample_fraction",
}


def teacher_bytes(trainer: Any) -> int:
    """Bytes of the teacher's weights, 0 for a trainer without a teacher."""
    teacher = getattr(trainer, "_teacher", None)
    return sum(p.numel() * p.element_size() for p in teacher.state.params.values()) if teacher else 0


def versions() -> dict[str, str | None]:
    import torch

    installed: dict[str, str | None] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None
    }
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "triton"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def parse(values: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--random-weights", type=Path, metavar="FOLDER", help="write random weights of --shape there"
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="shape of the random weights")
    parser.add_argument("--arm", choices=["sdpo", "grpo"], default="sdpo")
    parser.add_argument("--no-unsloth", action="store_true", help="plain TRL, transformers and PEFT")
    parser.add_argument("--base", choices=["4bit", "bf16"], default="4bit")
    parser.add_argument("--batch", type=int, choices=[1, 2, 4, 8, 32], default=2, help="rows per micro-batch")
    parser.add_argument("--completion", type=int, default=256, help="max_completion_length")
    parser.add_argument(
        "--reprompt", type=int, default=0, help="feedback that fills reprompts to this length"
    )
    # Unsloth's fused LoRA kernels need 0.
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument("--chunk", type=int, default=256, help="loss_chunk_size; 0 for the default")
    parser.add_argument(
        "--limit-gib", type=float, default=24.0, help="GPU memory of this process; 0 for no limit"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(values)


def main() -> None:
    options = parse()
    if options.random_weights:
        make_weights(options.random_weights, options.shape)
    record = run(options)
    print(
        f"loaded {record['loaded_gib']:.2f} GiB in {record['load_seconds']:.1f} s (peak "
        f"{record['loading_peak_gib']:.2f}), training peak {record['peak_gib']:.2f} GiB allocated, "
        f"{record['reserved_gib']:.2f} reserved, teacher {record['teacher_mib']:.0f} MiB"
    )
    print("seconds per step:", " ".join(f"{seconds:.1f}" for seconds in record["step_seconds"]))
    print("of which generation:", " ".join(f"{seconds:.1f}" for seconds in record["generation_seconds"]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

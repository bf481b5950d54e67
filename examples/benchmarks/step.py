"""A whole optimizer step in one run: this library's SDPO, TRL's experimental SDPO, and GRPO.

    python examples/benchmarks/step.py --shape 0.5b --rows 32 --steps 5 --repeat 3 \\
        --output examples/benchmarks/records/step-0.5b-h100.json

Random weights of a published shape, LoRA on bf16, and given completions, because generation would hide the
difference. Every row has a short feedback text, so a teacher prompt is about as long as the student's. Arms:

* `sdpo`: the defaults. Its ratios to `grpo` and `trl-sdpo` contain a faster LoRA forward, reentrant checkpointing
  where it is faster, and a faster way to disable gradient checkpointing for the rollout, which these two lack.
* `sdpo-plain`: without these, so its ratios compare the trainers on the same layers.
* `sdpo-half`: as `sdpo`, where every second row has no teacher signal.
* `sdpo-hybrid`: as `sdpo`, with a tenth of GRPO's loss in the same pass (`grpo_weight=0.1`).
* `grpo`: TRL's GRPO, through `SDPOConfig(enabled=False)`.
* `trl-sdpo`: TRL's experimental SDPO with the same top-K loss.

`--lengths lognormal` gives completions of different lengths (median 250 tokens, σ .8, cut at `--completion`), and
`--packing padded packed` measures every arm of this library with each of these layouts (`sdpo[packed]`):

    python examples/benchmarks/step.py --shape 7b --rows 16 --completion 1024 --lengths lognormal \\
        --packing padded packed --arms grpo sdpo trl-sdpo

`--group 8 --prompt-tokens 1024` gives 8 completions to each prompt, and every prompt words of its own.
`--prompts each` makes packed rows read their prompt with every completion, as where attention is not SDPA; both
ways in one run: `--prompts once each` (`sdpo[packed,each]`).

Reported: the median time of an optimizer step, the peak of allocated memory above the weights, ratios of both, and
the student's tokens in a step with the share of the padded batch that they fill, with every prompt and with prompts
once.
Times of one arm differ by about 2 % between two builds of the same model; `--repeat` measures all arms in turn
several times and takes the median over all steps.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from sdpo_rl import SDPOConfig, SDPOTrainer
from sdpo_rl.step import runner

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=128, vocab_size=2048, tie_word_embeddings=True),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?!\n"
FEEDBACK = "line 3: expected 42 got 17. "
TEMPLATES = {
    "reprompt_template": "{prompt}{solution}{feedback}",
    "solution_template": "{successful_previous_attempt}",
    "feedback_template": "{feedback_raw}",
}
ARMS = ("grpo", "sdpo", "sdpo-plain", "sdpo-half", "sdpo-hybrid", "trl-sdpo")
PLAIN = {"fused_lora_forward": False, "fast_checkpointing_toggle": False}
OURS = ("sdpo", "sdpo-plain", "sdpo-half", "sdpo-hybrid")
SWITCHES: dict[str, dict[str, Any]] = {"sdpo-plain": PLAIN, "sdpo-hybrid": {"grpo_weight": 0.1}}
SENTENCE = "the quick brown fox jumps over the lazy dog. "
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_model(
    shape: dict[str, Any], device: str, dtype: torch.dtype = torch.bfloat16, lora: bool = True
) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(**shape, max_position_embeddings=8192, pad_token_id=0, eos_token_id=1)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.config._name_or_path = "random"
    if not lora:
        return model
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


def completion_lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of each completion of a step, the same in every step."""
    if options.lengths == "fixed":
        return [options.completion] * options.rows
    generator = torch.Generator().manual_seed(2)
    drawn = (math.log(250.0) + 0.8 * torch.randn(options.rows, generator=generator)).exp()
    return drawn.round().clamp(1, options.completion).int().tolist()


def describe_batch(options: argparse.Namespace) -> dict[str, float]:
    """Tokens of the student's rows, and the share of their padded batch that they fill; also with prompts once."""
    lengths, prompt = completion_lengths(options), len(prompt_text(options, 0))
    tokens = sum(lengths) + len(lengths) * prompt
    once = sum(lengths) + len(lengths) // options.group * prompt
    padded = len(lengths) * (prompt + max(lengths))
    return {
        "tokens": tokens,
        "fill": tokens / padded,
        "tokens_prompts_once": once,
        "fill_prompts_once": once / padded,
    }


def prompt_text(options: argparse.Namespace, number: int) -> str:
    """A prompt that begins with its number; one token for each character."""
    length = options.prompt_tokens or 3 * len(SENTENCE)
    return (f"{number}. " + SENTENCE * length)[:length]


def fix_completions(model: Any, lengths: list[int], limit: int) -> None:
    """Make `generate` return the same random completions for every trainer."""

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        size = (len(input_ids), limit)
        tokens = torch.randint(2, 2 + len(ALPHABET), size, generator=generator)
        for row, length in zip(tokens, itertools.cycle(lengths)):
            if length < limit:
                row[length - 1] = 1  # the end of the sequence
                row[length:] = 0
        return torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)

    model.generate = generate


class Clock(TrainerCallback):
    """Wall time of every optimizer step, with the device idle at its start and end."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.steps.append(time.perf_counter() - self._start)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arms_of(options: argparse.Namespace) -> list[str]:
    """Every arm, those of this library once for each layout."""
    if options.packing == ["auto"] and options.prompts == ["once"]:
        return list(options.arms)
    layouts = [
        packing + ("" if prompts == "once" else ",each")
        for packing in options.packing
        for prompts in (options.prompts if packing in ("auto", "packed") else ["once"])
    ]
    return [
        f"{arm}[{layout}]" if arm in OURS else arm
        for arm in options.arms
        for layout in (layouts if arm in OURS else ["auto"])
    ]


def measure(name: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Train a few steps with one trainer: time of each step after the warm-up, peak memory above the weights."""
    arm, _, layout = name.rstrip("]").partition("[")
    packing, _, prompts_read = layout.partition(",")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    model = make_model(SHAPES[options.shape], device)
    fix_completions(model, completion_lengths(options), options.completion)
    weights = torch.cuda.memory_allocated() if device == "cuda" else 0
    half = arm.endswith("half")
    rows = 4 * options.rows
    prompts = [prompt_text(options, row) for row in range(rows)]
    feedback = ["" if half and row % 2 else FEEDBACK for row in range(rows)]
    column = "privileged_context" if arm == "trl-sdpo" else "feedback"
    dataset = Dataset.from_dict({"prompt": prompts, column: feedback})
    common: dict[str, Any] = dict(
        per_device_train_batch_size=options.rows,
        num_generations=options.group,
        max_completion_length=options.completion,
        gradient_accumulation_steps=1,
        max_steps=options.warmup + options.steps,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=options.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if arm == "sdpo-plain" else None,
        torch_compile=options.torch_compile,
        learning_rate=1e-5,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    clock = Clock()
    shared: dict[str, Any] = dict(
        model=model,
        processing_class=make_tokenizer(),
        # Two rewards, for advantages; neither is a success.
        reward_funcs=[lambda completions, **_: [0.25 * (row % 2) for row in range(len(completions))]],
        train_dataset=dataset,
        callbacks=[clock],
    )
    with tempfile.TemporaryDirectory() as output:
        if arm == "trl-sdpo":
            from trl.experimental.sdpo import SDPOConfig as PeerConfig
            from trl.experimental.sdpo import SDPOTrainer as PeerTrainer

            peer = PeerConfig(
                output, **common, distillation_mode="topk_logits", distillation_topk=100,
                distillation_add_tail=True, distillation_alpha=0.5, include_environment_feedback=True, **TEMPLATES,
            )  # fmt: skip
            trainer = PeerTrainer(args=peer, **shared)
        else:
            switches = SWITCHES.get(arm, {})
            if packing:
                switches = {
                    **switches,
                    "packing": packing,
                    "max_tokens_per_forward": tokens_limit(packing, options),
                }
            config = SDPOConfig(enabled=arm != "grpo", alpha=0.5, k=100, **switches, **TEMPLATES)
            trainer = SDPOTrainer(args=trl.GRPOConfig(output, **common), sdpo_config=config, **shared)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with every_prompt() if prompts_read else nullcontext():
            trainer.train()
    peak = torch.cuda.max_memory_allocated() - weights if device == "cuda" else 0
    steps = clock.steps[options.warmup :]
    return {"peak_bytes": peak, "weight_bytes": weights, "steps": steps}


@contextmanager
def every_prompt() -> Iterator[None]:
    """Packed rows get the model's own attention, and each its prompt, as those of a model without SDPA."""
    true = runner.row_attention_problem
    runner.row_attention_problem = lambda *_: "of --prompts each"
    try:
        yield
    finally:
        runner.row_attention_problem = true


def tokens_limit(packing: str, options: argparse.Namespace) -> int | None:
    """`max_tokens_per_forward`, which has no effect on padded rows."""
    return None if packing == "padded" else options.max_tokens_per_forward


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs of one arm: the median over all their steps, the highest peak."""
    steps = [seconds for run in runs for seconds in run["steps"]]
    return {
        "seconds": statistics.median(steps),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "weight_bytes": runs[0]["weight_bytes"],
        "steps": steps,
    }


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Time and memory of `sdpo` over every other arm, and of `sdpo-plain` over the other libraries' arms.

    A layout of an arm is also compared with those before it.
    """
    names, pairs = list(results), []
    for ours, others in itertools.permutations(names, 2):
        (arm, _, _), (other, _, layout) = (name.partition("[") for name in (ours, others))
        compared = {"sdpo": ARMS, "sdpo-plain": ("grpo", "trl-sdpo")}.get(arm, ())
        if arm == other:
            if names.index(ours) > names.index(others):
                pairs.append((ours, others))
        elif other in compared and (not layout or layout in ours):
            pairs.append((ours, others))
    ratios = {}
    for ours, others in pairs:
        for name, key in {"time": "seconds", "memory": "peak_bytes"}.items():
            if results[others][key]:  # no memory is measured on a CPU
                ratios[f"{name} {ours}/{others}"] = results[ours][key] / results[others][key]
    return ratios


def environment(device: str, *others: str) -> dict[str, Any]:
    """The device and the versions of what runs on it, also of others; None if not installed."""
    found = {}
    for name in ("torch", "transformers", "trl", "peft", "triton", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"gpu": gpu, "python": platform.python_version(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument(
        "--completion", type=int, default=512, help="largest number of tokens of a completion"
    )
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed")
    parser.add_argument("--prompt-tokens", type=int, help="default: 135")
    parser.add_argument("--group", type=int, default=2, help="completions of each prompt")
    parser.add_argument("--prompts", nargs="+", choices=("once", "each"), default=["once"])
    parser.add_argument(
        "--packing", nargs="+", choices=("auto", "packed", "groups", "padded"), default=["auto"]
    )
    parser.add_argument("--max-tokens-per-forward", type=int, help="of every layout but padded and auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--torch-compile", action="store_true", help="of the model, in every arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeat", type=int, default=1, help="how often to measure all arms in turn")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arms, batch = arms_of(options), describe_batch(options)
    print(
        f"{batch['tokens']} tokens of prompts and completions, which fill {batch['fill']:.0%} of the padded batch; "
        f"with every prompt once {batch['tokens_prompts_once']}, {batch['fill_prompts_once']:.0%}"
    )
    runs = [{arm: measure(arm, options, device) for arm in arms} for _ in range(options.repeat)]
    results = {arm: combine([run[arm] for run in runs]) for arm in arms}
    print(f"{'trainer':20}{'s/step':>10}{'peak GiB':>10}")
    for arm, row in results.items():
        print(f"{arm:20}{row['seconds']:10.3f}{row['peak_bytes'] / 2**30:10.2f}")
    ratios = compare(results)
    for name, ratio in ratios.items():
        print(f"{name:44}{ratio:8.3f}")
    if options.output:
        record = {
            "environment": environment(device),
            "options": {k: str(v) for k, v in vars(options).items() if k != "output"},
            "batch": batch,
            "results": results,
            "ratios": ratios,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

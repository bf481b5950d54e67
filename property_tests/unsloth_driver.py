"""Unsloth's real rewritten `GRPOTrainer` without a GPU, one fresh process per run.

    python unsloth_driver.py [--interpreter | --gpu] MODULE:FUNCTION [JSON]

patches TRL, imports MODULE, calls FUNCTION(**JSON) and prints its JSON result as the last line. Tests call
`run(...)`, which starts that process in a scratch directory: Unsloth writes its generated trainers into the
working directory. `SDPO_UNSLOTH_PYTHON` names another interpreter that has unsloth installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
MARK = "RESULT "
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENVIRONMENT = {
    "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_GRPO_PREFIX_GROUPER": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


# --- in the testing process --------------------------------------------------------------------------------------


def python() -> str:
    return os.environ.get("SDPO_UNSLOTH_PYTHON", sys.executable)


def missing() -> str | None:
    """Why these tests cannot run here, or `None`."""
    if "SDPO_UNSLOTH_PYTHON" in os.environ:
        return None
    needed = ("unsloth", "unsloth_zoo", "bitsandbytes")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return (
        f"{', '.join(absent)} not installed: `pip install --no-deps {' '.join(needed)}`, or set "
        "SDPO_UNSLOTH_PYTHON to an interpreter that has them"
    )


def run(
    function: str,
    cwd: Path,
    *,
    interpreter: bool = False,
    gpu: bool = False,
    timeout: float = 240.0,
    **arguments: Any,
) -> Any:
    """The result of `MODULE:FUNCTION` in a fresh process whose working directory is `cwd`."""
    machine = ["--interpreter"] if interpreter else ["--gpu"] if gpu else []
    command = [python(), str(HERE / "unsloth_driver.py"), *machine, function, json.dumps(arguments)]
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if gpu:
        del environment["UNSLOTH_ALLOW_CPU"]
    environment |= {"TRITON_INTERPRET": "1"} if interpreter else {}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not results:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        raise AssertionError(f"{function} failed with {done.returncode}\n{output}")
    return json.loads(results[-1][len(MARK) :])


# --- in the new process -----------------------------------------------------------------------------


def patch(*, interpreter: bool = False, gpu: bool = False) -> Any:
    """Import Unsloth, rewrite TRL's trainer as `PatchFastRL` does on a GPU; return FastLanguageModel."""
    if gpu:
        from unsloth import FastLanguageModel, PatchFastRL

        PatchFastRL("GRPO", FastLanguageModel)
        return FastLanguageModel
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)
    from unsloth import FastLanguageModel, PatchFastRL

    # The import needs the variable; PatchFastRL does nothing while it is set.
    del os.environ["UNSLOTH_ALLOW_CPU"]
    PatchFastRL("GRPO", FastLanguageModel)
    if interpreter:
        answer_device_queries()
    return FastLanguageModel


class OneDevice(list[Any]):
    """A per-device table that can also be indexed by a CPU tensor's device index, `None`."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index if isinstance(index, int | slice) else 0)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index if isinstance(index, int | slice) else 0, value)


def answer_device_queries() -> None:
    """Let FastLanguageModel load and run on CPU tensors: its Triton kernels run in the interpreter."""
    import torch
    from unsloth.models import llama

    device = SimpleNamespace(
        name="interpreter", total_memory=64 << 30, major=8, minor=0, multi_processor_count=1,
        shared_memory_per_block_optin=64 << 10, gcnArchName="", warp_size=32,
    )  # fmt: skip
    torch.cuda.get_device_properties = lambda *_, **__: device
    torch.cuda.get_device_capability = lambda *_, **__: (8, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_, **__: (32 << 30, 64 << 30)

    llama.DEVICE_COUNT = 1
    llama.get_current_device = lambda *_: "cpu"
    llama._LazyDeviceScratch = lambda _, make: OneDevice([make(torch.device("cpu"))])
    cache = llama._PerDeviceRopeCache
    tables = {
        "multi_gpu_cos_cached": None, "multi_gpu_sin_cached": None, "_rope_cache_versions": None,
        "_rope_rows_ready": 0, "_rope_rebuild_for_grad": False,
    }  # fmt: skip
    begin, grow = cache._init_rope_cache_state, cache._grow_rope_cache

    @functools.wraps(begin)
    def begin_on_cpu(self: Any, *args: Any) -> None:
        begin(self, *args)
        for name, empty in tables.items():
            setattr(self, name, OneDevice([empty]))

    @functools.wraps(grow)
    def grow_on_cpu(self: Any, *args: Any) -> None:
        grow(self, *args)
        self._rope_rows_ready = OneDevice([0])

    cache._init_rope_cache_state, cache._grow_rope_cache = begin_on_cpu, grow_on_cpu


def tokenizer() -> Any:
    """One token per character; ids 0, 1, 2 are pad, end of sequence, unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .:\n"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def qwen2_config(vocab_size: int, hidden_size: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip


def lora_model(tokens: Any, *, seed: int = 0) -> Any:
    """A plain float32 PEFT model that Unsloth's trainer accepts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    base = Qwen2ForCausalLM(qwen2_config(len(tokens), 32)).float()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return bind_modes(get_peft_model(base, lora))


def bind_modes(model: Any) -> Any:
    """Bind Unsloth's mode switches to a float32 model, so that its trainer accepts the model."""
    from unsloth.models.llama import FastLlamaModel

    model.for_training = functools.partial(FastLlamaModel.for_training, model)
    model.for_inference = functools.partial(FastLlamaModel.for_inference, model)
    # Otherwise the trainer asks for fp16 on a machine without bf16.
    model._unsloth_user_float32 = True
    return model


def fast_model(
    fast_language_model: Any, tokens: Any, *, dtype: str = "float32", max_seq_length: int = 256, seed: int = 0
) -> Any:
    """The real FastLanguageModel with LoRA; needs `patch(interpreter=True)`.

    In float32 Unsloth leaves out its fused LoRA kernels, in float16 it uses them; bfloat16 overflows in
    Triton's interpreter.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    folder = str(Path.cwd() / "qwen2")
    Qwen2ForCausalLM(qwen2_config(len(tokens), 64)).float().save_pretrained(folder)
    tokens.save_pretrained(folder)
    # Unsloth returns a Qwen2 tokenizer of its own making for this folder, so callers keep `tokens`.
    model, _ = fast_language_model.from_pretrained(
        folder, max_seq_length=max_seq_length, dtype=getattr(torch, dtype), load_in_4bit=False,
        device_map="cpu",
    )  # fmt: skip
    model = fast_language_model.get_peft_model(
        model, r=4, lora_alpha=8, target_modules=PROJECTIONS, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    model._unsloth_user_float32 = dtype == "float32"
    return model


def randomize_lora(model: Any, *, scale: float = 0.3, seed: int = 1) -> None:
    """LoRA starts at B = 0, where the adapter has no effect; change it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))


def grpo_config(**changes: Any) -> Any:
    from trl import GRPOConfig

    values: dict[str, Any] = {
        "output_dir": "out", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 6, "max_steps": 2, "learning_rate": 1e-2,
        "warmup_steps": 0, "optim": "adamw_torch", "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    return GRPOConfig(**(values | changes))


def dataset(copies: int = 4) -> Any:
    """Prompts of four lengths, so that batches are ragged."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": prompt} for prompt in ["ab", "cdef", "g", "hijkl a"] * copies])


def count_a(completions: list[str], **_: Any) -> list[float]:
    return [float(completion.count("a")) for completion in completions]


def main() -> None:
    arguments = sys.argv[1:]
    interpreter, gpu = (arguments[0] == flag for flag in ("--interpreter", "--gpu"))
    target, values = [*arguments[interpreter or gpu :], "{}"][:2]
    if interpreter:
        os.environ["TRITON_INTERPRET"] = "1"
    patch(interpreter=interpreter, gpu=gpu)
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(values))
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

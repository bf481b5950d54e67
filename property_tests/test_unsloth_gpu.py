"""FastLanguageModel on a GPU: a 4-bit base, its kernels, its attention, and too little memory.

Each observation is a fresh process, as in test_unsloth_cpu.py.
"""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path
from typing import Any

import pytest
import test_unsloth_fast
import tiny
import torch
import unsloth_driver as driver
import unsloth_layouts
from test_unsloth_sdpo import RUNS, TOLERANCE, differences, long_remark

from sdpo_rl.step import row_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing())),
]
WIDTH = 256


# --- in the fresh process ---------------------------------------------------------------------------------


def quantized_model(*, max_position_embeddings: int = 512, **changes: Any) -> Any:
    """A 4-bit base under bf16 LoRA on all linear layers, as the 24 GB recipe has it."""
    from unsloth import FastLanguageModel

    folder = Path.cwd() / "qwen2"
    if not folder.exists():
        sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "tie_word_embeddings": False}
        tiny.model(
            initializer_range=0.1, max_position_embeddings=max_position_embeddings, **sizes
        ).bfloat16().save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=500, dtype=None, load_in_4bit=True
    )
    settings = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "use_gradient_checkpointing": "unsloth"}
    model = FastLanguageModel.get_peft_model(model, target_modules=driver.PROJECTIONS, **(settings | changes))
    driver.randomize_lora(model, scale=0.05)
    return model


def sdpo_trainer(model: Any, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "use_cpu": False, "bf16": True, "optim": "adamw_8bit", "max_steps": 3, "learning_rate": 1e-3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_completion_length": 16,
    }  # fmt: skip
    return tiny.trainer(
        Path("out"),
        start=model,
        sdpo_config=tiny.config(**{"loss_backend": "auto", **(options or {})}),
        **settings | changes,
    )


def fingerprint(model: Any) -> list[int]:
    """Of every quantized weight, byte for byte."""
    return [
        int(torch.sum(parameter.data, dtype=torch.int64))
        for parameter in model.parameters()
        if type(parameter).__name__ == "Params4bit"
    ]


def observe_recipe() -> dict[str, Any]:
    """A short training on a 4-bit base, with the teacher and the changes of weights."""
    from reference_step import trainable

    tiny.remark = long_remark
    model = quantized_model()
    trainer = sdpo_trainer(model, num_iterations=2, gradient_checkpointing=True)
    before, start = fingerprint(model), trainable(model)
    average = {name: tensor.float() for name, tensor in start.items()}
    state = trainer._teacher.state
    seen: dict[str, Any] = {
        "teacher": sorted(state.params),
        "trainable": sorted(start),
        "teacher_dtypes": sorted({str(tensor.dtype) for tensor in state.params.values()}),
        "quantized": len(before),
        "batches": [],
    }
    true, tick = trainer._micro_batch_output, trainer._teacher.tick

    def both_backends(*args: Any, **kwargs: Any) -> Any:
        output = true(*args, **kwargs)
        mode, trainer._forward_mode = trainer._forward_mode, trainer._forward_mode._replace(fused=False)
        with torch.no_grad():
            seen["batches"].append([float(output.total.detach()), float(true(*args, **kwargs).total)])
        trainer._forward_mode = mode
        seen["fused"] = mode.fused
        return output

    def averaged(model: Any) -> None:
        tick(model)
        for name, tensor in trainable(model).items():
            average[name] = 0.7 * average[name] + 0.3 * tensor.float()

    # Dropout would have another mask for the second backend.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer._micro_batch_output, trainer._teacher.tick = both_backends, averaged
    trainer.train()
    after = trainable(model)
    held = {name: tensor.cpu() for name, tensor in trainer._teacher.state.params.items()}
    seen |= {
        "mro": [cls.__name__ for cls in type(trainer).__mro__],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "moved": max(float((tensor - start[name]).abs().max()) for name, tensor in after.items()),
        "teacher_error": max(float((average[name] - held[name]).abs().max()) for name in held),
        "teacher_behind": max(float((after[name] - held[name]).abs().max()) for name in held),
        "base_untouched": fingerprint(model) == before,
    }
    import sdpo_rl

    seen["report"] = sdpo_rl.training_report(trainer)
    seen["out_of_memory"] = run_out_of_memory(trainer)
    return seen


def run_out_of_memory(trainer: Any) -> list[str]:
    """The message, and the class of its cause, when memory runs out during a loss."""
    batch = trainer._buffered_inputs[0]
    trainer.model.train()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    filler = []
    for size in (2**20, 2**16, 2**12, 2**9):
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while True:
                filler.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    try:
        trainer.compute_loss(trainer.model, batch)
    except torch.cuda.OutOfMemoryError as error:
        return [str(error), type(error.__cause__).__name__, traceback.format_exc()]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return ["enough memory", "", ""]


def observe_grpo() -> dict[str, float]:
    """`enabled=False` against Unsloth's own trainer, and that one against itself."""
    import trl
    from reference_step import trainable

    after = {}
    for name in ("base", "again", "ours"):
        shared: dict[str, Any] = {
            "model": quantized_model(lora_dropout=0.0),
            "args": tiny.arguments(
                Path("out"), use_cpu=False, bf16=True, optim="adamw_torch", per_device_train_batch_size=4,
                gradient_accumulation_steps=2, learning_rate=1e-3,
            ),
            "processing_class": tiny.tokenizer(),
            "train_dataset": tiny.conversations(),
            "reward_funcs": tiny.parity,
        }  # fmt: skip
        if name == "ours":
            from sdpo_rl import SDPOTrainer

            trainer = SDPOTrainer(sdpo_config=tiny.config(enabled=False), **shared)
        else:
            trainer = trl.GRPOTrainer(**shared)
        trainer.train()
        after[name] = trainable(trainer.model)
    return {
        name: max(float((tensor - after["base"][key]).abs().max()) for key, tensor in after[name].items())
        for name in ("again", "ours")
    }


def observe_packed() -> dict[str, Any]:
    """Hidden states and gradients of rows that together exceed `max_seq_length`, packed and one by one."""
    from functools import partial

    from sdpo_rl.compat.unsloth import use_varlen_kernel
    from sdpo_rl.step import forward, model_check, packing
    from sdpo_rl.step.batch import TokenBatch, left_pad
    from sdpo_rl.step.call_cost import call_cost

    use_varlen_kernel()  # as the trainer does
    model = quantized_model(lora_dropout=0.0, max_position_embeddings=4096)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 30, (n,), generator=generator).tolist() for n in (400, 90, 350, 200)]
    ids, mask = left_pad([row[:40] for row in rows], pad_id=0, device=torch.device("cuda"))
    longest = max(map(len, rows)) - 40
    tails = torch.tensor([row[40:] + [0] * (longest - len(row) + 40) for row in rows], device="cuda")
    ids = torch.cat([ids, tails], dim=1)
    mask = torch.cat([mask, (tails > 0).long()], dim=1)
    batch = TokenBatch(ids, mask, [(40, len(row) - 40) for row in rows])
    seen: dict[str, Any] = {
        "layout": list(model_check.supported_layout(model, batch)),
        "limit": model_check.sequence_limit(model, batch),
        "overhead_tokens": call_cost(model).overhead_tokens,
    }
    model.for_training()
    probe = torch.randn(1, 1, WIDTH, generator=generator).cuda()
    found = []
    for layout, division in (("packed", [[0, 1, 2, 3]]), ("groups", [[0], [1], [2], [3]])):
        calls = packing.model_calls(batch, layout, division)
        with unsloth_layouts.attention() as paths:
            head = packing.run_calls(
                partial(forward.completion_head, model, model),
                calls,
                arguments=[forward.call_arguments(model, call) for call in calls],
                rows=len(rows),
                length=batch.completion_length,
            )
            model.zero_grad()
            (head.hidden.float() * probe).mean().backward()
        seen[f"attention of {layout}"] = sorted(paths)
        grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        found.append((head.hidden.detach().float(), torch.cat(grads)))
    for name, packed, alone in zip(("hidden", "gradient"), *found, strict=True):
        seen[name] = float((packed - alone).norm() / alone.norm())
    return seen


def observe_exact(runs: list[str]) -> dict[str, Any]:
    """Runs of the CPU suite, in float32, by FastLanguageModel's kernels and attention."""
    torch.backends.cuda.matmul.allow_tf32 = False
    seen = test_unsloth_fast.observe(runs, device="cuda:0")
    return {"layouts": seen, "allow_tf32": torch.backends.cuda.matmul.allow_tf32}


# --- tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    seen = driver.run("test_unsloth_gpu:observe_recipe", tmp_path_factory.mktemp("recipe"), gpu=True)
    print(seen["report"])
    return seen


def test_it_trains_over_the_rewritten_trainer(recipe: dict[str, Any]) -> None:
    assert recipe["mro"][0] == "SDPOTrainer"
    assert {"UnslothGRPOTrainer", "_UnslothGRPOTrainer"} <= set(recipe["mro"])
    assert all(loss > 0.0 for loss in recipe["losses"])
    assert recipe["moved"] > 0.0


def test_the_teacher_is_the_average_of_the_adapters_alone(recipe: dict[str, Any]) -> None:
    assert recipe["teacher"] == recipe["trainable"]
    assert all("lora_" in name for name in recipe["teacher"])
    assert recipe["teacher_dtypes"] == ["torch.float32"]
    assert recipe["teacher_error"] < 1e-5
    assert recipe["teacher_behind"] > 1e-5


def test_quantized_weights_do_not_change(recipe: dict[str, Any]) -> None:
    assert recipe["quantized"] == 2 * len(driver.PROJECTIONS)
    assert recipe["base_untouched"]


def test_fused_loss_and_whole_logits_agree(recipe: dict[str, Any]) -> None:
    assert recipe["fused"] is True
    for fused, whole in recipe["batches"]:
        assert fused == pytest.approx(whole, rel=0.05, abs=1e-3)


def test_an_out_of_memory_error_has_advice(recipe: dict[str, Any]) -> None:
    message, cause, trace = recipe["out_of_memory"]
    assert cause == "OutOfMemoryError", trace
    for word in ("per_device_train_batch_size=2", "max_completion_length=16", "loss_chunk_size"):
        assert word in message


def test_the_report_names_the_parts(recipe: dict[str, Any]) -> None:
    for part in ("Unsloth's rewritten GRPOTrainer", "4-bit", "bitsandbytes", "GPU"):
        assert part in recipe["report"]


def test_packed_rows_may_exceed_max_seq_length(tmp_path: Path) -> None:
    """1040 tokens in one forward of a model with `max_seq_length=500` are its four rows."""
    seen = driver.run("test_unsloth_gpu:observe_packed", tmp_path, gpu=True)
    assert seen["layout"] == ["packed", ""]
    assert seen["limit"] == 4096
    assert seen["overhead_tokens"] == 450
    if row_attention.grouped_kernel() is not None:
        assert seen["attention of packed"] == ["training packed bfloat16 sdpa: _torch_varlen_packed"]
    # Of bfloat16; a row that attends another changes by far more.
    assert seen["hidden"] < 0.02
    assert seen["gradient"] < 0.05


def test_grpo_is_unsloths_own(tmp_path: Path) -> None:
    moved = driver.run("test_unsloth_gpu:observe_grpo", tmp_path, gpu=True)
    # Two runs of one program may differ on a GPU; ours may not differ more.
    assert moved["ours"] <= 2 * moved["again"] + 1e-6


EXACT = ["two micro-batches", "two passes"]


@pytest.fixture(scope="module")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def exact(exact_folder: Path) -> dict[str, Any]:
    seen = driver.run("test_unsloth_gpu:observe_exact", exact_folder, gpu=True, runs=EXACT)
    assert seen["allow_tf32"] is False
    return seen["layouts"]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", EXACT)
def test_a_step_equals_plain_transformers(
    exact_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tiny, "remark", long_remark)
    difference = differences(exact_folder / f"{name}.pt", RUNS[name][2])
    print(difference)
    assert difference.gradient < 10 * TOLERANCE
    assert difference.loss < 10 * TOLERANCE


@pytest.mark.parametrize("name", EXACT)
def test_every_layout_gives_the_step_of_rows_alone(exact: dict[str, Any], name: str) -> None:
    test_unsloth_fast.check_layouts(exact[name], tolerance=10 * TOLERANCE)

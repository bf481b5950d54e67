"""What the ranks of a run do, each in a fresh process that talks over gloo; test_ranks.py reads what they saw.

    WORLD_SIZE=2 RANK=0 ... python rank_driver.py FOLDER torch
    WORLD_SIZE=2 RANK=0 ... python rank_driver.py FOLDER deepspeed

Rollouts are written down instead of sampled, by the place of a row among the rows of all ranks, so that any
number of ranks trains on the same ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
STEPS = 3
DEEPSPEED: dict[str, dict[str, Any]] = {
    f"zero{stage}": {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {
                "stage": stage,
                # 100 elements: norms and biases stay gathered, matrices do not.
                "stage3_param_persistence_threshold": 100,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        },
    }
    for stage in (2, 3)
}
TIMEOUT = 240
Observed = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run, the same for any number of ranks."""

    arguments: dict[str, Any] = field(default_factory=dict)  # batch sizes are those of one rank among two
    config: dict[str, Any] = field(default_factory=dict)
    succeeds: Callable[[int], bool] = lambda row: row in (1, 2, 9)  # by row of the generation batch
    feedback: bool = True
    tied: bool = True
    adapter: str = ""  # "lora", or "head" for LoRA with a trained head
    silent: tuple[int, ...] = ()  # generation batches without a success
    experts: bool = False
    alike: bool = True  # all ranks start with the same weights; otherwise the first rank's count


RUNS = {
    "tied": Run(),
    "untied": Run(tied=False),
    "lora": Run(adapter="lora", arguments={"learning_rate": 0.5}),
    "lora with a trained head": Run(adapter="head", tied=False, arguments={"learning_rate": 0.5}),
    "whole logits": Run(config={"loss_backend": "logits"}),
    "micro-batches": Run({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "a step over two generation batches": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    ),
    "two passes of two steps": Run(
        {"per_device_train_batch_size": 2, "steps_per_generation": 2, "num_iterations": 2}
    ),
    "the second rank has nothing to learn": Run(succeeds=lambda row: row == 1, feedback=False),
    "nobody has anything to learn": Run(succeeds=lambda row: False, feedback=False),
    "steps without signal around one with": Run(
        {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.5},
        succeeds=lambda row: row == 1,
        feedback=False,
        silent=(0, 2),
    ),
    "a group on both ranks": Run({"num_generations": 8}, succeeds=lambda row: row == 6),
    "sequence mean": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"loss_aggregation": "sequence-mean"},
    ),
    "trust region": Run(config={"teacher_mode": "trust_region"}),
    "live": Run(config={"teacher_mode": "live"}),
    "checkpointed": Run({"gradient_checkpointing": True}),
    "ranks that start apart": Run(alike=False),
}
SHARDED_RUNS = [
    "tied",
    "untied",
    "lora",
    "lora with a trained head",
    "whole logits",
    "a step over two generation batches",
    "the second rank has nothing to learn",
    "nobody has anything to learn",
    "steps without signal around one with",
    "a group on both ranks",
    "trust region",
    "live",
    "ranks that start apart",
]
EXPERTS = {
    "all ranks": Run(experts=True),
    "one rank": Run(succeeds=lambda row: row == 1, feedback=False, experts=True),
}


# DeepSpeed steps within the backward pass: a step cannot wait for a second generation batch.
DEEPSPEED_RUNS = [
    name
    for name in SHARDED_RUNS
    if name not in ("a step over two generation batches", "steps without signal around one with")
]


# --- in the process that tests ----------------------------------------------------------------------------


def launch(folder: Path, library: str) -> None:
    """One rank, then two, each process leaving `WORLD-RANK.pt` in the folder."""
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [_start(folder, library, world, rank, port) for rank in range(world)]
        deadline = time.monotonic() + TIMEOUT
        try:
            outputs = [rank.communicate(timeout=deadline - time.monotonic())[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        failed = [
            f"--- rank {index} of {world}\n{output[-6000:]}"
            for index, (rank, output) in enumerate(zip(ranks, outputs, strict=True))
            if rank.returncode
        ]
        if failed:
            raise RuntimeError("\n".join(failed))


def _start(folder: Path, library: str, world: int, rank: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "adapters"), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu",  # the default cpu:0 is no place that torch.load can restore to
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if world > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), library],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --- in a rank --------------------------------------------------------------------------------------------


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def strategy(name: str) -> Iterator[None]:
    """Trainers made inside run under this strategy. Accelerate shards on accelerators alone, hence the seams."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from sdpo_rl import SDPOTrainer

    create = SDPOTrainer.create_accelerator_and_postprocess

    def create_sharded(self: Any) -> None:
        create(self)
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=name.endswith("first rank loads"),
            state_dict_type="FULL_STATE_DICT",
        )
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if name.startswith("fsdp2"):
        SDPOTrainer.create_accelerator_and_postprocess = create_sharded
    if name in DEEPSPEED:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    try:
        yield
    finally:
        SDPOTrainer.create_accelerator_and_postprocess = create


def said(row: int, batch: int, succeeds: bool) -> str:
    """A completion that `tiny.score` calls a success or not."""
    import tiny

    text = "".join(
        chr(97 + (row * 5 + batch * 3 + i * (row % 4 + 1)) % 26) for i in range(2 + (row + batch) % 4)
    )
    return text if tiny.score(text) == float(succeeds) else text + "a"


def write_down_rollouts(trainer: Any, run: Run, batches: int = 0) -> None:
    """Replace sampling; `batches` are behind us."""
    import tiny

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        nonlocal batches
        rows = range(rank() * len(prompt_ids), (rank() + 1) * len(prompt_ids))
        texts = [said(row, batches, batches not in run.silent and run.succeeds(row)) for row in rows]
        batches += 1
        return [[*map(tiny.VOCABULARY.index, text), tiny.VOCABULARY.index(tiny.EOS)] for text in texts], None

    trainer._generate_single_turn = generate


def in_rank_order(batch: dict[str, Any]) -> dict[str, Any]:
    """In place of TRL's shuffle: micro-batches take the same rows on one rank as on two."""
    from torch import Tensor

    rows = len(batch["prompt_ids"])
    if world_size() == 2:
        return batch
    micro = in_rank_order.micro_batch  # type: ignore[attr-defined]
    order = [
        half * rows // 2 + start + row
        for start in range(0, rows // 2, micro)
        for half in range(2)
        for row in range(micro)
    ]
    return {
        name: value[order] if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }


def make_trainer(folder: Path, run: Run, *, batches: int = 0, **changes: Any) -> Any:
    import tiny
    from peft import LoraConfig
    from trl.trainer import grpo_trainer

    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.5,
        **run.arguments,
        **changes,
    }
    in_rank_order.micro_batch = settings["per_device_train_batch_size"]  # type: ignore[attr-defined]
    grpo_trainer.shuffle_sequence_dict = in_rank_order
    if world_size() == 1:
        settings["per_device_train_batch_size"] *= 2
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        modules_to_save=["lm_head"] if run.adapter == "head" else None,
    )
    import torch

    torch.manual_seed(0)
    trainer = tiny.trainer(
        folder,
        sdpo_config=tiny.config(**run.config),
        start=(tiny.experts if run.experts else tiny.model)(
            0 if run.alike else rank(), tie_word_embeddings=run.tied
        ),
        reward_funcs=tiny.judge if run.feedback else tiny.parity,
        peft_config=adapter if run.adapter else None,
        **settings,
    )
    write_down_rollouts(trainer, run, batches)
    return trainer


def whole(tensor: Any) -> Any:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def whole_gradient(parameter: Any) -> Any:
    return whole(parameter.detach().mul(0.0) if parameter.grad is None else parameter.grad)


def moments(trainer: Any) -> list[Any]:
    """What the optimizer remembers; under ZeRO this rank's part of it."""
    import torch

    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    slots = [slot for state in optimizer.state.values() for slot in state.values()]
    return [whole(slot) for slot in slots if isinstance(slot, torch.Tensor)]


def fixed_batch(unwrapped: Any) -> dict[str, Any]:
    import torch

    from sdpo_rl import hidden_states

    ids = torch.arange(7, 31).view(2, 12)
    mask = torch.ones_like(ids)
    return hidden_states.forward_arguments(unwrapped, ids, mask, mask.cumsum(-1) - 1, 13)


def observe_run(folder: Path, run: Run, **changes: Any) -> Observed:
    """Losses and gradients of every step, and afterwards the teacher as its forward shows it."""
    return observe_training(make_trainer(folder, run, **changes))


def observe_training(trainer: Any, **resume: Any) -> Observed:
    import torch
    from transformers import TrainerCallback

    from sdpo_rl import hidden_states

    gradients: list[Observed] = []
    prompts: list[list[str]] = []
    score = trainer._generate_and_score_completions

    def watch(inputs: Any) -> Any:
        output = score(inputs)
        prompts.append(
            trainer.processing_class.batch_decode(output["teacher_prompt_ids"], skip_special_tokens=True)
        )
        return output

    trainer._generate_and_score_completions = watch

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if trainer.is_deepspeed_enabled:
                return  # the engine keeps the gradients, and has stepped
            named = trainer._unwrapped.named_parameters()
            gradients.append({name: whole_gradient(p) for name, p in named if p.requires_grad})

    trainer.add_callback(Watch())
    trainer.train(**resume)
    unwrapped, model = trainer._unwrapped, trainer.model_wrapped
    arguments = fixed_batch(unwrapped)
    with torch.no_grad(), hidden_states.evaluating(unwrapped):
        before = model(**arguments).logits
        teacher = [
            hidden_states.completion_logits(model, unwrapped, arguments, length=11, params=params)
            for params in trainer._teacher.forwards(unwrapped)
        ]
        after = model(**arguments).logits
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": gradients,
        "prompts": prompts,
        "student": before,
        "teacher": teacher,
        "optimizer": moments(trainer),
        "student came back": torch.equal(before, after),
    }


def observe_exchange(folder: Path) -> Observed:
    """One parameter after the other replaced, right after a forward that leaves the outer units gathered."""
    import tiny
    import torch
    from torch.func import functional_call

    from sdpo_rl import hidden_states, ranks

    seen: Observed = {}
    for tied in (True, False):
        with strategy("fsdp2"):
            trainer = make_trainer(folder, Run(tied=tied))
            plain = tiny.model(tie_word_embeddings=tied).eval()
            trainer.model = trainer.model_wrapped = trainer.accelerator.prepare(
                trainer.model, trainer.create_optimizer()
            )[0]
            model = trainer.model.eval()
        arguments = fixed_batch(model)
        errors, unseen, gaps, stale = {}, {}, {}, {}
        with torch.no_grad():
            own = plain(**arguments).logits
            for name, parameter in plain.named_parameters():
                other = {
                    name: torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(errors)))
                }
                expected = functional_call(plain, other, args=(), kwargs=arguments).logits
                parts = ranks.held_parts(model, other)
                model(**arguments)
                shown = hidden_states._run(model, model, arguments, parts).logits
                errors[name] = (shown - expected).abs().max().item()
                unseen[name] = (own - expected).abs().max().item()
                gaps[name] = (model(**arguments).logits - own).abs().max().item()
                # The wrong twin: contents exchanged while units are still gathered.
                held = ranks.held_parameters(model)
                kept = held[name].clone()
                model(**arguments)
                held[name].copy_(parts[name])
                stale[name] = (model(**arguments).logits - expected).abs().max().item()
                held[name].copy_(kept)
                ranks.held_parameters(model)
        interrupted = {n: torch.zeros_like(p) for n, p in ranks.held_parameters(model).items()}
        try:
            with ranks.exchanged(model, interrupted):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        with torch.no_grad():
            gaps["after an interruption"] = (model(**arguments).logits - own).abs().max().item()
        whole_again = ranks.full_tensors(model, ranks.held_parameters(model))
        round_trip = all(torch.equal(whole_again[n], p) for n, p in plain.named_parameters())
        seen["tied" if tied else "untied"] = {
            "errors": errors,
            "unseen": unseen,
            "gaps": gaps,
            "stale": stale,
            "round trip": round_trip,
        }
    return seen


def observe_evaluation(folder: Path) -> Observed:
    """Two questions in groups of four, after a step: the Trainer prepares FSDP together with an optimizer."""
    import tiny

    run = Run(feedback=False, succeeds=lambda row: row in (1, 6))
    per_rank = {"num_generations_eval": 4, "per_device_eval_batch_size": 8 // world_size()}
    trainer = make_trainer(folder, run, eval_dataset=tiny.conversations(2), max_steps=1, **per_rank)
    trainer.train()
    return trainer.evaluate()


def observe_experts(folder: Path, run: Run) -> Observed:
    """A rank's rows are a micro-batch of one rank: experts are balanced over each of them."""
    if world_size() > 1:
        return observe_run(folder, run, router_aux_loss_coef=0.5)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(folder, run, router_aux_loss_coef=0.5, **halves)
    in_rank_order.micro_batch = 4  # type: ignore[attr-defined]
    return observe_training(trainer)


def observe_sampling(folder: Path, name: str, adapter: str = "") -> Observed:
    """Real generation of one group on both ranks, which stop at different lengths."""
    with strategy(name):
        run = Run({"num_generations": 8, "max_completion_length": 12}, adapter=adapter)
        trainer = make_trainer(folder, run, max_steps=1)
        del trainer._generate_single_turn
        trainer.generation_config.max_new_tokens = 3 + 6 * rank()
        completions: list[list[int]] = []
        score = trainer._generate_and_score_completions

        def watch(inputs: Any) -> Any:
            output = score(inputs)
            completions.extend(output["completion_ids"].tolist())
            return output

        trainer._generate_and_score_completions = watch
        trainer.train()
    return {"completions": completions}


SAVED_WITHIN_A_BATCH = Run(
    {
        "per_device_train_batch_size": 2,
        "steps_per_generation": 2,
        "max_steps": 5,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 3,
    }
)


def observe_resume(folder: Path, name: str, adapter: str) -> Observed:
    """A run that saves within a generation batch, and the same run resumed from there."""
    run = replace(SAVED_WITHIN_A_BATCH, adapter=adapter)
    place = folder / f"resume {name} {adapter} {world_size()}"
    with strategy(name):
        whole = observe_training(make_trainer(place, run))
    with strategy(name):
        trainer = make_trainer(place / "again", run, batches=2)
        resumed = observe_training(trainer, resume_from_checkpoint=str(place / "checkpoint-3"))
    return {"whole": whole, "resumed": resumed}


def observe_interrupted(folder: Path, kind: str, adapter: str) -> Observed:
    """A run, the same cut while DeepSpeed writes the last checkpoint and resumed, and twins that forget."""
    import deepspeed

    from sdpo_rl import progress

    run = replace(SAVED_WITHIN_A_BATCH, adapter=adapter)
    place = folder / f"resume {kind} {adapter}"
    engine: Any = deepspeed.DeepSpeedEngine
    save, load = engine._save_zero_checkpoint, engine.load_checkpoint

    def cut(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_steps == 5:
            raise InterruptedError
        save(self, *args, **kwargs)

    def forget_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return load(self, *args, **{**kwargs, "load_optimizer_states": False})

    with strategy(kind):
        trainer = make_trainer(place / "whole", run, **DEEPSPEED[kind])
        seen = {"whole": observe_training(trainer), "folder": str(place)}
        trainer.save_model(str(place / "whole" / "saved"))
    with strategy(kind), patch.object(engine, "_save_zero_checkpoint", cut):
        try:
            make_trainer(place / "cut", run, **DEEPSPEED[kind]).train()
        except InterruptedError:
            seen["left"] = [path.name for path in (place / "cut" / "checkpoint-5").iterdir()]
    with strategy(kind):
        trainer = make_trainer(place / "cut", run, batches=2, **DEEPSPEED[kind])
        seen["resumed"] = observe_training(trainer, resume_from_checkpoint=True)
    twins: dict[str, tuple[Run, Any]] = {
        "teacher": (replace(run, config={"teacher_on_resume": "restart"}), nullcontext()),
        "optimizer": (run, patch.object(engine, "load_checkpoint", forget_optimizer)),
        "progress": (run, patch.object(progress, "load", lambda *_: None)),
    }
    for forgotten, (twin, forgetting) in ({} if adapter else twins).items():
        with strategy(kind), forgetting:
            trainer = make_trainer(place / forgotten, twin, batches=2, **DEEPSPEED[kind])
            saved = str(place / "whole" / "checkpoint-3")
            seen["without", forgotten] = observe_training(trainer, resume_from_checkpoint=saved)
    return seen


def observe_more_ranks(folder: Path) -> Observed:
    """A run that one rank saves between two generation batches, and whoever comes later resumes."""
    run = Run(
        {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
        }
    )
    place = folder / "one to two"
    with strategy("ddp"):
        if world_size() == 1:
            return observe_training(make_trainer(place, run))
        trainer = make_trainer(place / "again", run, batches=2)
        return observe_training(trainer, resume_from_checkpoint=str(place / "checkpoint-2"))


def observe_turns(folder: Path) -> Observed:
    """Tools that the rows of the first rank alone call; every turn of a sharded model gathers its weights."""
    import talking
    import tiny
    import torch
    from datasets import Dataset

    from sdpo_rl import SDPOTrainer, trl_trainer

    chatty = [talking.call("multiply", '{"a": 6, "b": 7}')] * 2 + [f"it is 42{talking.END}"]
    silent = [f"it is 41{talking.END}"]
    scripts = [chatty if rank() == 0 and row % 2 else silent for row in range(4)]
    turns: list[int] = []

    with strategy("fsdp2"):
        trainer = SDPOTrainer(
            model=talking.model(),
            args=tiny.arguments(
                folder / "turns", per_device_train_batch_size=4, max_steps=1, max_completion_length=400
            ),
            sdpo_config=tiny.config(),
            processing_class=talking.tokenizer(),
            reward_funcs=[lambda completions, **_: [float("42" in c[-1]["content"]) for c in completions]],
            tools=[talking.multiply],
            train_dataset=Dataset.from_dict({"prompt": [tiny.user("6x7?")] * 2}),
        )
        say = talking.script(trainer.processing_class, scripts)

        def turn(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            turns.append(len(prompt_ids))
            with torch.no_grad():
                self.model(input_ids=torch.tensor(prompt_ids[:1]))
            return say(prompt_ids)

        sample = trl_trainer._BASE._generate_single_turn
        trl_trainer._BASE._generate_single_turn = turn
        try:
            trainer.train()
        finally:
            trl_trainer._BASE._generate_single_turn = sample
    return {"turns": turns, "loss": trainer.state.log_history[0]["loss"]}


def main_deepspeed(folder: Path) -> None:
    import torch

    kinds = ["ddp"] if world_size() == 1 else ["zero2", "zero3"]
    seen: Observed = {}
    for kind in kinds:
        for name in DEEPSPEED_RUNS:
            with strategy(kind):
                seen[kind, name] = observe_run(folder, RUNS[name], **DEEPSPEED.get(kind, {}))
            print(kind, name, "done", flush=True)
    if world_size() > 1:
        for kind in kinds:
            for adapter in ("", "lora"):
                seen["resume", kind, adapter] = observe_interrupted(folder, kind, adapter)
                print("resume", kind, adapter, "done", flush=True)
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")


def main(folder: Path) -> None:
    import torch

    sharded = [("fsdp2", name) for name in SHARDED_RUNS] if world_size() > 1 else []
    seen: Observed = {}
    for kind, name in [*(("ddp", name) for name in RUNS), *sharded]:
        # Without the broadcast of the first rank's weights FSDP would mix those of all ranks.
        with strategy(kind if kind == "ddp" or RUNS[name].alike else "fsdp2, first rank loads"):
            seen[kind, name] = observe_run(folder, RUNS[name])
        print(kind, name, "done", flush=True)
    for kind in ("ddp", "fsdp2")[: world_size()]:
        with strategy(kind):
            seen["evaluation", kind] = observe_evaluation(folder)
    for kind in ("ddp", "fsdp2")[: world_size()]:
        for name, run in EXPERTS.items():
            with strategy(kind):
                seen["experts", kind, name] = observe_experts(folder, run)
    seen["more ranks"] = observe_more_ranks(folder)
    if world_size() > 1:
        for kind in ("ddp", "fsdp2"):
            for adapter in ("", "lora"):
                seen["resume", kind, adapter] = observe_resume(folder, kind, adapter)
        seen["turns"] = observe_turns(folder)
        seen["exchange"] = observe_exchange(folder)
        seen["sampling"] = {
            "ddp": observe_sampling(folder, "ddp"),
            "fsdp2": observe_sampling(folder, "fsdp2"),
            "fsdp2, lora": observe_sampling(folder, "fsdp2", "lora"),
        }
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"torch": main, "deepspeed": main_deepspeed}[sys.argv[2]](Path(sys.argv[1]))

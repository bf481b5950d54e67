"""What a rank runs and records, in a process that rank_driver.py starts.

    WORLD_SIZE=2 RANK=0 ... python rank_observations.py FOLDER torch
    WORLD_SIZE=2 RANK=0 ... python rank_observations.py FOLDER deepspeed
    WORLD_SIZE=2 RANK=0 ... python rank_observations.py FOLDER batches
    WORLD_SIZE=2 RANK=0 ... python rank_observations.py FOLDER logs

The result is written to the folder as `WORLD-RANK.pt`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rank_driver import (
    DEEPSPEED,
    DEEPSPEED_RUNS,
    EXPERTS,
    RUNS,
    SHARDED_RUNS,
    Run,
    in_rank_order,
    make_trainer,
    rank,
    strategy,
    world_size,
)

Observed = dict[str, Any]


def whole(tensor: Any) -> Any:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def whole_gradient(parameter: Any) -> Any:
    return whole(parameter.detach().mul(0.0) if parameter.grad is None else parameter.grad)


def moments(trainer: Any) -> list[Any]:
    """The state of the optimizer; under ZeRO this rank's part."""
    import torch

    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    slots = [slot for state in optimizer.state.values() for slot in state.values()]
    return [whole(slot) for slot in slots if isinstance(slot, torch.Tensor)]


def fixed_batch(unwrapped: Any) -> dict[str, Any]:
    import torch

    from sdpo_rl.step import forward as step_forward

    ids = torch.arange(7, 31).view(2, 12)
    mask = torch.ones_like(ids)
    return step_forward.forward_arguments(unwrapped, ids, mask, mask.cumsum(-1) - 1, 13)


def observe_run(folder: Path, run: Run, **changes: Any) -> Observed:
    """Losses and gradients of every step, and the logits of student and teacher afterwards."""
    return observe_training(make_trainer(folder, run, **changes))


def observe_training(trainer: Any, **resume: Any) -> Observed:
    import torch
    from transformers import TrainerCallback

    from sdpo_rl.credit import files
    from sdpo_rl.step import forward as step_forward
    from sdpo_rl.teacher.shards import local_shards

    gradients: list[Observed] = []
    steps: list[Observed] = []
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

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            own = {name: shard.clone() for name, shard in local_shards(trainer._unwrapped).items()}
            teacher = trainer._teacher.state
            averaged = {name: shard.clone() for name, shard in teacher.params.items()}
            steps.append(
                {"own": own, "averaged": averaged, "moments": moments(trainer), "ticks": teacher.ticks}
            )

    trainer.add_callback(Watch())
    trainer.train(**resume)
    credit = Path(trainer.args.output_dir) / files.CREDIT
    unwrapped, model = trainer._unwrapped, trainer.model_wrapped
    arguments = fixed_batch(unwrapped)
    with torch.no_grad(), step_forward.evaluating(unwrapped):
        before = model(**arguments).logits
        teacher = [
            step_forward.completion_logits(model, unwrapped, arguments, length=11, params=params)
            for params in trainer._teacher.forwards(unwrapped, training=True)
        ]
        after = model(**arguments).logits
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "gradients": gradients,
        "steps": steps,
        "prompts": prompts,
        "student": before,
        "teacher": teacher,
        "optimizer": moments(trainer),
        "student came back": torch.equal(before, after),
        "credit": None if trainer._records.recorder is None else files.read(credit),
    }


def observe_exchange(folder: Path) -> Observed:
    """One parameter after the other replaced, after a forward that leaves the outer units gathered."""
    import tiny
    import torch
    from torch.func import functional_call

    from sdpo_rl.step import forward as step_forward
    from sdpo_rl.teacher import shards

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
                parts = shards.shard_tensors(model, other)
                model(**arguments)
                shown = step_forward._run(model, model, arguments, parts).logits
                errors[name] = (shown - expected).abs().max().item()
                unseen[name] = (own - expected).abs().max().item()
                gaps[name] = (model(**arguments).logits - own).abs().max().item()
                # The counter-example: contents exchanged while units are still gathered.
                held = shards.local_shards(model)
                kept = held[name].clone()
                model(**arguments)
                held[name].copy_(parts[name])
                stale[name] = (model(**arguments).logits - expected).abs().max().item()
                held[name].copy_(kept)
                shards.local_shards(model)
        interrupted = {n: torch.zeros_like(p) for n, p in shards.local_shards(model).items()}
        try:
            with shards.swap_shards(model, interrupted):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        with torch.no_grad():
            gaps["after an interruption"] = (model(**arguments).logits - own).abs().max().item()
        whole_again = shards.full_tensors(model, shards.local_shards(model))
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


def observe_unfrozen(folder: Path, **changes: Any) -> str:
    """The error of DDP where parameters without a gradient stay trainable; empty without one."""
    from sdpo_rl import trainer as trainer_module

    with strategy("ddp"), patch.object(trainer_module, "freeze_unreached_by_text", lambda model: []):
        trainer = make_trainer(folder, RUNS["a multimodal model"], **changes)
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error)
    return ""


def observe_experts(folder: Path, run: Run) -> Observed:
    """A rank's rows are a micro-batch on one rank: the router loss is that of each of them."""
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
    """A run, the same cut while DeepSpeed writes the last checkpoint and resumed; counter-examples that forget."""
    import deepspeed

    from sdpo_rl.resume import progress

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
    counter_examples: dict[str, tuple[Run, Any]] = {
        "teacher": (replace(run, config={"teacher_on_resume": "restart"}), nullcontext()),
        "optimizer": (run, patch.object(engine, "load_checkpoint", forget_optimizer)),
        "progress": (run, patch.object(progress, "load", lambda *_, **__: None)),
    }
    for forgotten, (counter_example, forgetting) in ({} if adapter else counter_examples).items():
        with strategy(kind), forgetting:
            trainer = make_trainer(place / forgotten, counter_example, batches=2, **DEEPSPEED[kind])
            saved = str(place / "whole" / "checkpoint-3")
            seen["without", forgotten] = observe_training(trainer, resume_from_checkpoint=saved)
    return seen


def observe_more_ranks(folder: Path) -> Observed:
    """A run that one rank saves between two generation batches and two ranks resume."""
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
    """Tools that only rows of the first rank call; every turn of a sharded model gathers its weights."""
    import scripted_turns
    import tiny
    import torch
    from datasets import Dataset

    from sdpo_rl import SDPOTrainer
    from sdpo_rl import trainer as trainer_module

    chatty = [scripted_turns.call("multiply", '{"a": 6, "b": 7}')] * 2 + [f"it is 42{scripted_turns.END}"]
    silent = [f"it is 41{scripted_turns.END}"]
    scripts = [chatty if rank() == 0 and row % 2 else silent for row in range(4)]
    turns: list[int] = []

    with strategy("fsdp2"):
        trainer = SDPOTrainer(
            model=scripted_turns.model(),
            args=tiny.arguments(
                folder / "turns", per_device_train_batch_size=4, max_steps=1, max_completion_length=400
            ),
            sdpo_config=tiny.config(),
            processing_class=scripted_turns.tokenizer(),
            reward_funcs=[lambda completions, **_: [float("42" in c[-1]["content"]) for c in completions]],
            tools=[scripted_turns.multiply],
            train_dataset=Dataset.from_dict({"prompt": [tiny.user("6x7?")] * 2}),
        )
        say = scripted_turns.script(trainer.processing_class, scripts)

        def turn(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            turns.append(len(prompt_ids))
            with torch.no_grad():
                self.model(input_ids=torch.tensor(prompt_ids[:1]))
            return say(prompt_ids)

        sample = trainer_module.BASE._generate_single_turn
        trainer_module.BASE._generate_single_turn = turn
        try:
            trainer.train()
        finally:
            trainer_module.BASE._generate_single_turn = sample
    return {"turns": turns, "loss": trainer.state.log_history[0]["loss"]}


def observe_batches(folder: Path, kind: str, adapter: str) -> Observed:
    """A run with real generation of one group on both ranks, and the same with batches drawn around its steps."""
    from transformers import TrainerCallback

    from sdpo_rl.diagnose.generation_batch import generation_batch

    batches: list[Any] = []

    class Between(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            batches.append(generation_batch(trainer))

    run = Run({"num_generations": 8}, config={"demonstration_policy": "random"}, adapter=adapter)
    seen: Observed = {}
    for name in ("plain", "drawn"):
        with strategy(kind):
            trainer = make_trainer(folder / f"{name} {kind} {adapter}", run)
            del trainer._generate_single_turn
            if name == "drawn":
                batches.append(generation_batch(trainer))
                seen["preview"] = str(trainer.preview(8))
                trainer.add_callback(Between())
            seen[name] = observe_training(trainer)
    return seen | {"batches": batches}


def observe_table(folder: Path) -> Observed:
    """The columns of the completions table of a run whose second rank has a row without a signal."""
    run = Run({"per_device_train_batch_size": 2, "steps_per_generation": 2}, feedback=False)
    trainer = make_trainer(folder / f"table {world_size()}", run, log_completions=True, max_steps=2)
    trainer.train()
    return {name: list(column) for name, column in trainer._logs["extra"].items()}


def observe_own_logs(folder: Path) -> Observed:
    """The log of a run, and that of one in which the main process alone logs around every step."""
    from transformers import TrainerCallback

    class Talks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.is_world_process_zero:
                trainer.log({"mine": 1.0})

        on_step_end = on_step_begin

    run = Run({"max_steps": 4, "logging_steps": 2, "log_completions": True})
    seen: Observed = {}
    for name in ("silent", "talking"):
        with strategy("ddp"):
            trainer = make_trainer(folder / f"{name} {world_size()}", run)
            if name == "talking":
                trainer.add_callback(Talks())
            trainer.train()
        seen[name] = [
            {key: value for key, value in entry.items() if not key.startswith("step_")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
    seen["own"] = [entry for entry in trainer.state.log_history if "mine" in entry]
    return seen


def leave_process_group() -> None:
    """The end of a process of a group.

    A process that ends while gloo's threads still hold tensors of the last reduction aborts.
    """
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main_batches(folder: Path) -> None:
    import torch

    seen: dict[Any, Observed] = {"table": observe_table(folder)}
    if world_size() == 1:
        torch.save(seen, folder / "1-0.pt")
        return
    seen |= {
        (kind, adapter): observe_batches(folder, kind, adapter)
        for kind in ("ddp", "fsdp2")
        for adapter in ("", "lora")
    }
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    leave_process_group()


def main_logs(folder: Path) -> None:
    import torch

    torch.save(observe_own_logs(folder), folder / f"{world_size()}-{rank()}.pt")
    leave_process_group()


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
        seen["unfrozen, with a search"] = observe_unfrozen(folder, ddp_find_unused_parameters=True)
        seen["unfrozen"] = observe_unfrozen(folder)
    torch.save(seen, folder / f"{world_size()}-{rank()}.pt")
    leave_process_group()


if __name__ == "__main__":
    mains = {"torch": main, "deepspeed": main_deepspeed, "batches": main_batches, "logs": main_logs}
    mains[sys.argv[2]](Path(sys.argv[1]))

"""Runs of several ranks, each in a new process that communicates over gloo, and the trainers they build.

A rank runs rank_observations.py, rank_head_observations.py or rank_engine_observations.py; test_ranks.py,
test_ranks_deepspeed.py, test_ranks_deepspeed_head.py, test_ranks_deepspeed_engine.py,
test_generation_batch_ranks.py and test_own_logs.py read what it saw.

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
            "gradient_clipping": "auto",  # without it Accelerate clips at 1
        },
    }
    for stage in (2, 3)
}
TIMEOUT = 600


@dataclass(frozen=True)
class Run:
    """A training run, the same for any number of ranks."""

    arguments: dict[str, Any] = field(default_factory=dict)  # batch sizes are those of one rank among two
    config: dict[str, Any] = field(default_factory=dict)
    succeeds: Callable[[int], bool] = lambda row: row in (1, 2, 9)  # by row of the generation batch
    feedback: bool = True
    judged: bool = True  # otherwise there is no reward function, and the dataset has the feedback
    tied: bool = True
    # "lora", "head" for LoRA with a trained head, "everywhere" for LoRA on all linear layers
    adapter: str = ""
    silent: tuple[int, ...] = ()  # generation batches without a success
    experts: bool = False
    multimodal: bool = False
    stream: bool = False
    alike: bool = True  # all ranks start with the same weights; otherwise the first rank's count


RUNS = {
    "tied": Run(config={"credit_rows": 8}),
    "untied": Run(tied=False),
    "lora": Run(adapter="lora", arguments={"learning_rate": 0.5}),
    "lora with a trained head": Run(adapter="head", tied=False, arguments={"learning_rate": 0.5}),
    "whole logits": Run(config={"loss_backend": "logits", "credit_rows": 8}),
    "micro-batches": Run({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "a step over two generation batches": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    ),
    "a stream whose pass ends within a step": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_generation": 4},
        stream=True,
    ),
    "two passes of two steps": Run(
        {"per_device_train_batch_size": 2, "steps_per_generation": 2, "num_iterations": 2}
    ),
    "the second rank has nothing to learn": Run(succeeds=lambda row: row == 1, feedback=False),
    "nobody has anything to learn": Run(
        config={"credit_rows": 8}, succeeds=lambda row: False, feedback=False
    ),
    "steps without signal around one with": Run(
        {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.5, "max_grad_norm": 1.0},
        succeeds=lambda row: row == 1,  # of which the second rank has no row
        feedback=False,
        silent=(0, 2),
    ),
    "lora, and a rank with nothing to learn": Run(
        {"learning_rate": 0.5, "ddp_find_unused_parameters": False},
        adapter="lora",
        succeeds=lambda row: row == 1,
        feedback=False,
        silent=(0, 2),
    ),
    "a group on both ranks": Run({"num_generations": 8}, succeeds=lambda row: row == 6),
    "sequence mean": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"loss_aggregation": "sequence-mean"},
    ),
    "a GRPO part": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"grpo_weight": 0.5}
    ),
    "a GRPO part with masks and ratios of rows": Run(
        {
            "per_device_train_batch_size": 2,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "importance_sampling_level": "sequence",
            "delta": 1.02,
            "epsilon": 0.01,
            "off_policy_mask_threshold": 1e-3,
            "top_entropy_quantile": 0.53,
        },
        {"grpo_weight": 0.5},
    ),
    "an anchor": Run(config={"anchor_weight": 0.7, "loss_backend": "auto"}),
    "weights of rows and of some tokens": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {
            "row_weights": "pass_rate",
            "token_weights": "confidence",
            "token_fraction": 0.5,
            "loss_aggregation": "batch-token-mean",
        },
    ),
    "evidence in a changing GRPO part": Run(
        config={"grpo_weight": 0.2, "grpo_weight_final": 0.8, "token_weights": "evidence"}
    ),
    "a gate": Run(config={"grpo_weight": 0.5, "token_weights": "gate"}),
    "no reward function": Run(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"loss_aggregation": "sequence-mean"},
        judged=False,
    ),
    "clipped entries": Run(config={"support": "full", "entry_clip": 0.002, "loss_backend": "auto"}),
    "credit of a sequence": Run(
        {"learning_rate": 0.05},
        {"support": "sampled", "alpha": 1.0, "credit": "sequence", "loss_backend": "auto"},
    ),
    "routing, and a rank without a distilled row": Run(
        config={"routing": "srpo", "loss_aggregation": "batch-token-mean", "token_weights": "confidence"},
        succeeds=lambda row: row in (1, 2),
        feedback=False,
    ),
    "trust region": Run(config={"teacher_mode": "trust_region"}),
    "live": Run(config={"teacher_mode": "live"}),
    "frozen with restarts": Run(config={"teacher_mode": "frozen", "teacher_restart_every": 2}),
    "checkpointed": Run({"gradient_checkpointing": True}),
    "several forwards": Run(config={"packing": "packed", "max_tokens_per_forward": 60}),
    "several forwards, one rank": Run(
        config={"packing": "packed", "max_tokens_per_forward": 30},
        succeeds=lambda row: row == 1,
        feedback=False,
    ),
    "groups": Run(config={"packing": "groups", "max_tokens_per_forward": 60}),
    "ranks that start apart": Run(alike=False),
    # With checkpointing the Trainer lets DDP wait for the gradient of every trainable parameter.
    "a multimodal model": Run({"learning_rate": 0.05, "gradient_checkpointing": True}, multimodal=True),
    "a multimodal model, lora": Run(
        {"learning_rate": 0.5, "ddp_find_unused_parameters": False}, adapter="everywhere", multimodal=True
    ),
}
SHARDED_RUNS = [
    "tied",
    "untied",
    "lora",
    "lora with a trained head",
    "whole logits",
    "a step over two generation batches",
    "a stream whose pass ends within a step",
    "the second rank has nothing to learn",
    "nobody has anything to learn",
    "steps without signal around one with",
    "a group on both ranks",
    "a GRPO part",
    "a GRPO part with masks and ratios of rows",
    "an anchor",
    "routing, and a rank without a distilled row",
    "trust region",
    "live",
    "frozen with restarts",
    "several forwards",
    "several forwards, one rank",
    "groups",
    "ranks that start apart",
    "a multimodal model",
    "a multimodal model, lora",
]
EXPERTS = {
    "all ranks": Run(experts=True),
    "one rank": Run(succeeds=lambda row: row == 1, feedback=False, experts=True),
    "beside a GRPO part with an entropy bonus": Run(
        {
            "loss_type": "bnpo",
            "entropy_coef": 0.3,
            "use_adaptive_entropy": True,
            "entropy_target": 9.0,
            "entropy_coef_delta": 0.1,
        },
        {"grpo_weight": 0.5},
        experts=True,
    ),
}


# DeepSpeed steps within the backward pass: a step cannot wait for a second generation batch.
OVER_TWO_BATCHES = {"a step over two generation batches", "a stream whose pass ends within a step"}
DEEPSPEED_RUNS = [name for name in SHARDED_RUNS if name not in OVER_TWO_BATCHES]


# --- in the testing process -------------------------------------------------------------------------------


def launch(folder: Path, library: str, script: str = "rank_observations.py") -> None:
    """Run one rank, then two; each process writes `WORLD-RANK.pt` to the folder."""
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [_start(folder, script, library, world, rank, port) for rank in range(world)]
        deadline = time.monotonic() + TIMEOUT
        try:
            for rank in ranks:
                rank.wait(timeout=deadline - time.monotonic())
        finally:
            for rank in ranks:
                rank.kill()
        failed = [
            f"--- rank {index} of {world}\n{_output(folder, world, index).read_text()[-6000:]}"
            for index, rank in enumerate(ranks)
            if rank.returncode
        ]
        if failed:
            raise RuntimeError("\n".join(failed))


def _output(folder: Path, world: int, rank: int) -> Path:
    return folder / f"{world}-{rank}.log"


def _start(
    folder: Path, script: str, library: str, world: int, rank: int, port: int
) -> subprocess.Popen[bytes]:
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
    folder.mkdir(parents=True, exist_ok=True)
    # Not to pipes: a rank whose pipe is full, while another one's is read, would stop all of them.
    with _output(folder, world, rank).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(HERE / script), str(folder), library],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


# --- in a rank --------------------------------------------------------------------------------------------


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def strategy(name: str) -> Iterator[None]:
    """Trainers built inside use this strategy. Accelerate shards on accelerators only, hence the replacements."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

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
    unset_hf_deepspeed_config()  # after a trainer with ZeRO-3, transformers makes models in parts
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


def completion(row: int, batch: int, succeeds: bool) -> str:
    """A completion that `tiny.score` scores as a success or not."""
    import tiny

    text = "".join(
        chr(97 + (row * 5 + batch * 3 + i * (row % 4 + 1)) % 26) for i in range(2 + (row + batch) % 4)
    )
    return text if tiny.score(text) == float(succeeds) else text + "a"


def replace_sampling(trainer: Any, run: Run, batches: int = 0) -> None:
    """Replace sampling; `batches` is the number of earlier generation batches."""
    import tiny

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        nonlocal batches
        rows = range(rank() * len(prompt_ids), (rank() + 1) * len(prompt_ids))
        texts = [completion(row, batches, batches not in run.silent and run.succeeds(row)) for row in rows]
        batches += 1
        return [[*map(tiny.VOCABULARY.index, text), tiny.VOCABULARY.index(tiny.EOS)] for text in texts], None

    trainer._generate_single_turn = generate


def in_rank_order(batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces TRL's shuffle: micro-batches have the same rows on one rank as on two."""
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
    import model_families
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
        target_modules="all-linear" if run.adapter == "everywhere" else ["q_proj", "v_proj"],
        init_lora_weights=False,
        modules_to_save=["lm_head"] if run.adapter == "head" else None,
    )
    import torch

    rewards = tiny.judge if run.feedback else tiny.parity
    hints = {} if run.judged else {"feedback": [f"hint {row}" for row in range(8)]}
    rows = tiny.conversations(**hints)
    torch.manual_seed(0)
    if run.multimodal:
        start = model_families.random_model("qwen3_vl")
    else:
        build = tiny.experts if run.experts else tiny.model
        start = build(0 if run.alike else rank(), tie_word_embeddings=run.tied)
    trainer = tiny.trainer(
        folder,
        sdpo_config=tiny.config(**run.config),
        start=start,
        reward_funcs=rewards if run.judged else None,
        train_dataset=rows.to_iterable_dataset() if run.stream else rows,
        peft_config=adapter if run.adapter else None,
        **settings,
    )
    replace_sampling(trainer, run, batches)
    return trainer

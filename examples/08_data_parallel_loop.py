"""The factor that data-parallel engines need: a loop of your own on several processes, with the core alone.

    torchrun --nproc-per-node 2 examples/08_data_parallel_loop.py --steps 3

DDP (FSDP and DeepSpeed as well) averages gradients over the R processes. The loss is a mean over the active tokens
of all of them, which are not equally many on each. So every process divides its sum by the count of all and
multiplies by R. The program prints the loss of every step: it does not depend on the number of processes.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sdpo

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 6, 17, 16


def make_batch(step: int) -> dict[str, torch.Tensor]:
    """Inputs of student and teacher, and which tokens have a loss: all rows of a step, on every process."""
    rng = torch.Generator().manual_seed(step)
    return {
        "student": torch.randn(ROWS, LENGTH, WIDTH, generator=rng),
        "teacher": torch.randn(ROWS, LENGTH, WIDTH, generator=rng),
        # The first rows have more active tokens than the last, so a mean of means would be another number.
        "loss_mask": torch.rand(ROWS, LENGTH, generator=rng) > torch.arange(ROWS)[:, None] / ROWS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A data-parallel loop with the core alone.")
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(WIDTH, VOCABULARY))
    teacher = sdpo.ema(update_rate=0.05)
    state = teacher.init(dict(model.module.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(steps):
        rows = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
        batch = {name: values[rows] for name, values in make_batch(step).items()}
        with torch.no_grad():
            teacher_logits = torch.func.functional_call(model.module, state.params, (batch["teacher"],))
        per_token = sdpo.distillation_loss(
            model(batch["student"]), teacher_logits, support="full", alpha=0.5, temperature=1.0
        )
        mask = batch["loss_mask"]
        loss = sdpo.self_distillation_loss(per_token, mask, row_mask=mask.any(dim=-1))

        count = loss.count.float()
        dist.all_reduce(count)  # active tokens of all processes
        (loss.total / count * processes).backward()  # DDP divides by the number of processes

        optimizer.step()
        optimizer.zero_grad()
        state = teacher.update(state, dict(model.module.named_parameters()))
        total = loss.total.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total / count:.6f}")
    # A process that ends while gloo's threads still hold tensors of the last reduction aborts.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

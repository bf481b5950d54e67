"""A vocabulary that is split over two processes gives the loss and the gradient of the whole one."""

from __future__ import annotations

import itertools
import math
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sdpo import distillation_loss
from sdpo.parallel import vocab_parallel_distillation_loss

VOCABULARY, SPLIT, K = 11, 6, 4
CASES = [
    *(
        ("full", None, alpha, temperature)
        for alpha, temperature in itertools.product((0.0, 0.3, 1.0), (1.0, 0.7))
    ),
    *itertools.product(("student", "teacher"), ("bucket", "renormalize"), (0.0, 0.3, 1.0), (1.0, 0.7)),
    ("sampled", None, 1.0, 1.0),
    ("sampled", None, 1.0, 0.7),
]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [3, 7, V] of both models with impossible tokens in either slice, and sampled tokens of both slices."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, VOCABULARY, generator=rng, dtype=torch.float64) * 3
    student[0, 0, 4] = teacher[0, 1, 3] = student[0, 2, 3] = teacher[0, 2, 3] = student[1, 0, 9] = -torch.inf
    tokens = torch.randint(0, VOCABULARY, (3, 7), generator=rng)
    tokens[0, :3], tokens[1, 0] = 5, 2
    return student, teacher, tokens


def whole(case: tuple[Any, ...], student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """The loss from whole logits."""
    support, tail, alpha, temperature = case
    return distillation_loss(
        student,
        teacher,
        tokens=tokens,
        support=support,
        k=K if tail else None,
        tail=tail,
        alpha=alpha,
        temperature=temperature,
    )


def by_definition(case: tuple[Any, ...], student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """The value from whole logits, in loops."""
    support, tail, alpha, temperature = case

    def of_position(z: list[float], w: list[float], token: list[int]) -> float:
        log_p, log_q = (oracles.log_softmax([x / temperature for x in logits]) for logits in (z, w))
        if support == "full":
            return oracles.jsd(log_p, log_q, alpha)
        if support == "sampled":
            p, q = log_p[token[0]], log_q[token[0]]
            return 0.0 if p == -math.inf else math.inf if q == -math.inf else (p - q) * p
        owner = log_p if support == "student" else log_q
        ids = sorted(range(VOCABULARY), key=lambda v: -owner[v])[:K]
        return oracles.topk_loss(log_p, log_q, ids, alpha, tail)

    return oracles.per_row(of_position, student, teacher, tokens[..., None])


def parallel(
    case: tuple[Any, ...],
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    shard: int,
    *,
    num_shards: int = 2,
    all_reduce: Any,
) -> Tensor:
    support, tail, alpha, temperature = case
    return vocab_parallel_distillation_loss(
        student,
        teacher,
        tokens=tokens if support == "sampled" else None,
        support=support,
        k=K if tail else None,
        tail=tail,
        alpha=alpha,
        temperature=temperature,
        vocabulary=VOCABULARY,
        shard=shard,
        num_shards=num_shards,
        all_reduce=all_reduce,
    )


def all_reduce(tensor: Tensor, op: str) -> Tensor:
    dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def worker(rank: int, port: int, output: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    student, teacher, tokens = inputs()
    columns = slice(0, SPLIT) if rank == 0 else slice(SPLIT, VOCABULARY)
    found = {}
    for case in CASES:
        logits = student[..., columns].clone().requires_grad_()
        loss = parallel(case, logits, teacher[..., columns], tokens, rank, all_reduce=all_reduce)
        loss.masked_fill(~loss.isfinite(), 0.0).sum().backward()
        found[case] = loss.detach(), logits.grad
    try:
        # Each process passes its slice as if it were the whole vocabulary.
        vocab_parallel_distillation_loss(
            student[..., columns], teacher[..., columns], support="full", alpha=0.5, temperature=1.0,
            vocabulary=student[..., columns].shape[-1], shard=rank, num_shards=2, all_reduce=all_reduce,
        )  # fmt: skip
    except ValueError as error:
        found["mistake"] = str(error)
    torch.save(found, Path(output) / f"{rank}.pt")
    # A process that ends while gloo's threads still hold tensors of the last reduction aborts.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    output = tmp_path_factory.mktemp("shards")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(output)), nprocs=2)
    return [torch.load(output / f"{rank}.pt") for rank in range(2)]


def reference(case: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    student, teacher, tokens = inputs()
    student.requires_grad_()
    loss = whole(case, student, teacher, tokens)
    loss.masked_fill(~loss.isfinite(), 0.0).sum().backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_slices_are_the_whole(observed: list[dict[Any, Any]], case: tuple[Any, ...]) -> None:
    loss, gradient = reference(case)
    torch.testing.assert_close(loss, by_definition(case, *inputs()), rtol=1e-12, atol=1e-12)
    for rank in range(2):
        torch.testing.assert_close(observed[rank][case][0], loss, rtol=1e-12, atol=1e-13)
    joined = torch.cat([observed[rank][case][1] for rank in range(2)], dim=-1)
    torch.testing.assert_close(joined, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", [("full", None, 0.3, 1.0), ("student", "bucket", 0.3, 1.0)], ids=str)
def test_a_loss_per_slice_is_another_number(case: tuple[Any, ...]) -> None:
    """The counter-example: each slice normalised by itself, and the losses added."""
    student, teacher, tokens = inputs()
    slices = [slice(0, SPLIT), slice(SPLIT, VOCABULARY)]
    apart = sum(whole(case, student[..., s], teacher[..., s], tokens) for s in slices)
    assert ((apart - reference(case)[0]).abs() > 1e-3).all()


def test_slices_that_do_not_add_up_are_refused(observed: list[dict[Any, Any]]) -> None:
    assert "expected the sum of all slices, 11" in observed[0]["mistake"]
    assert observed[0]["mistake"] != observed[1]["mistake"]


class Threads:
    """Processes that are threads: each calls its own `all_reduce`."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.tensors = count, threading.Barrier(count, timeout=60), {}

    def all_reduce(self, rank: int) -> Any:
        def reduce(tensor: Tensor, op: str) -> Tensor:
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            stacked = torch.stack([self.tensors[r] for r in range(self.count)])
            self.barrier.wait()
            return stacked.sum(0) if op == "sum" else stacked.amax(0)

        return reduce

    def run(self, function: Callable[[int, Any], Any]) -> list[Any]:
        found: dict[int, Any] = {}

        def call(rank: int) -> None:
            try:
                found[rank] = function(rank, self.all_reduce(rank))
            except ValueError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.count)]


@pytest.mark.parametrize("sizes", [(2, 6, 3), (1, 1, 9), (5, 5, 1)])
@pytest.mark.parametrize(
    "case", [CASES[0], ("student", "bucket", 0.3, 1.0), ("sampled", None, 1.0, 0.7)], ids=str
)
def test_slices_of_any_size(case: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    student, teacher, tokens = inputs()
    parts = list(zip(student.split(sizes, -1), teacher.split(sizes, -1), strict=True))

    def loss(rank: int, all_reduce: Any) -> Tensor:
        return parallel(case, *parts[rank], tokens, rank, num_shards=3, all_reduce=all_reduce)

    for found in Threads(3).run(loss):
        torch.testing.assert_close(found, reference(case)[0], rtol=1e-12, atol=1e-13)


def test_an_index_that_two_processes_have_is_refused_on_all() -> None:
    """Also on the process whose own index is right, which would wait for the others."""
    student, teacher, tokens = inputs()

    def loss(rank: int, all_reduce: Any) -> Tensor:
        parts = (logits.split((4, 4, 3), -1)[rank] for logits in (student, teacher))
        return parallel(CASES[0], *parts, tokens, min(rank, 1), num_shards=3, all_reduce=all_reduce)

    for message in Threads(3).run(loss):
        assert "shard: expected one process for each of 3 slices, got [1, 2, 0] processes" in message


SMOOTH = [("full", None, 0.3, 1.0), ("full", None, 1.0, 0.7), ("teacher", "bucket", 0.3, 1.0)]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_second_derivatives(case: tuple[Any, ...]) -> None:
    """The product of the Hessian with a vector, of which each process has a slice."""
    student, teacher, tokens = (x[1:, 1:] for x in inputs())  # finite
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = (2, 6, 3)
    parts = [x.split(sizes, -1) for x in (student, teacher, direction)]

    def product(loss: Callable[[Tensor], Tensor], logits: Tensor, vector: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(logits).sum(), logits, create_graph=True)
        return torch.autograd.grad((gradient * vector).sum(), logits)[0]

    def of_slice(rank: int, all_reduce: Any) -> Tensor:
        z, w, v = (part[rank] for part in parts)
        options = {"num_shards": 3, "all_reduce": all_reduce}
        return product(lambda x: parallel(case, x, w, tokens, rank, **options), z, v)

    expected = product(lambda x: whole(case, x, teacher, tokens), student, direction)
    torch.testing.assert_close(torch.cat(Threads(3).run(of_slice), -1), expected, rtol=1e-10, atol=1e-13)
    # The counter-example: a second derivative that stays within its slice.
    alone = (
        product(lambda x: whole(case, x, parts[1][0], tokens), parts[0][0], parts[2][0])
        if case[0] == "full"
        else 0
    )
    assert (expected[..., :2] - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    "case", [*SMOOTH, ("student", "renormalize", 1.0, 1.0), ("sampled", None, 1.0, 1.0)], ids=str
)
def test_function_transforms(case: tuple[Any, ...]) -> None:
    """`torch.func.grad`, and `vmap` over rows and their gradients."""
    student, teacher, tokens = inputs()
    sizes = (2, 6, 3)

    def of_slice(rank: int, all_reduce: Any) -> tuple[Tensor, Tensor]:
        z, w = (x.split(sizes, -1)[rank] for x in (student, teacher))

        def total(row: Tensor, teacher_row: Tensor, ids: Tensor) -> Tensor:
            loss = parallel(case, row, teacher_row, ids, rank, num_shards=3, all_reduce=all_reduce)
            return torch.where(loss.isfinite(), loss, 0.0).sum()

        return torch.func.grad(total)(z, w, tokens), torch.func.vmap(torch.func.grad(total))(z, w, tokens)

    for found in zip(*Threads(3).run(of_slice), strict=True):
        torch.testing.assert_close(torch.cat(found, -1), reference(case)[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"support": "full", "k": 3}, "k: expected None with support='full', got 3"),
        ({"support": "full", "tail": "bucket"}, "tail: expected None with support='full', got 'bucket'"),
        (
            {"support": "sampled", "tokens": torch.tensor([0, 5])},
            r"tokens: expected ids in \[0, 5\), got 5; give",
        ),
        ({"support": "student", "k": 0, "tail": "bucket"}, "k: expected an int in"),
        ({"support": "sampled", "alpha": 0.5, "tokens": torch.zeros(2).long()}, "alpha: expected 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"shard": 1}, "shard"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "support": "full", "alpha": 1.0, "temperature": 1.0, "vocabulary": 5, "shard": 0, "num_shards": 1,
        "all_reduce": lambda tensor, op: tensor,
    }  # fmt: skip
    logits = torch.zeros(2, 5)
    assert vocab_parallel_distillation_loss(logits, logits, **good).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=words):
        vocab_parallel_distillation_loss(logits, logits, **good | change)

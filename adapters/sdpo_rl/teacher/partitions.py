"""ZeRO-3's partitions of parameters: this rank's part, the full tensor, and other values for a forward.

DeepSpeed stores a flat part of every parameter on each rank. It gathers a parameter while its module runs; small
ones it keeps gathered until the next optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_partition(parameter: Any) -> bool:
    """Whether ZeRO-3 partitions the parameter."""
    return hasattr(parameter, "ds_tensor")


def local(parameter: Any) -> Tensor:
    """This rank's part [D] of a parameter, without padding, sharing its storage."""
    # All partitions are equally long, so the last ones end with padding.
    return parameter.ds_tensor.detach()[: max(parameter.ds_numel - _start(parameter), 0)]


def cut(parameter: Any, tensor: Tensor) -> Tensor:
    """This rank's part [D] of a full tensor."""
    start = _start(parameter)
    return tensor.flatten()[start : start + parameter.ds_tensor.numel()]


def gather(parameter: Any, part: Tensor) -> Tensor:
    """The full tensor from the parts of all ranks."""
    group = parameter.ds_process_group
    padded = part.new_zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    padded[: part.numel()] = part
    gathered = padded.new_empty(padded.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return _unpadded(parameter, gathered)


@contextmanager
def replaced_partitions(parameters: Sequence[Any], parts: Sequence[Tensor]) -> Iterator[None]:
    """Let the partitions of the parameters point to copies of `parts` [D], this rank's values, until the end.

    Parameters that DeepSpeed keeps gathered point to full tensors of these values, from one collective for each
    dtype and group. What the parameters pointed to before is not overwritten; they point to it again afterwards.
    """
    kept = [parameter for parameter in parameters if parameter.ds_persist and _is_gathered(parameter)]
    others = set(parameters).difference(kept)
    before = [(parameter, parameter.ds_tensor.data) for parameter in parameters]
    full_before = [(parameter, parameter.data) for parameter in kept]
    copies = dict(zip(parameters, _copies(parameters, parts), strict=True))
    full = _gather_together(kept, [copies[parameter] for parameter in kept])
    _release(others)
    try:
        for parameter, copy in copies.items():
            parameter.ds_tensor.data = copy
        for parameter, tensor in zip(kept, full, strict=True):
            parameter.data = tensor
        yield
    finally:
        for parameter, partition in before:
            parameter.ds_tensor.data = partition
        for parameter, tensor in full_before:
            parameter.ds_active_sub_modules.clear()  # not empty after an exception in a forward
            if _is_gathered(parameter):  # otherwise DeepSpeed gathers it again
                parameter.data = tensor
        _release(others)


def _copies(parameters: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parts, padded to the partitions' lengths, in their dtypes; waits until they are written."""
    copies = [torch.empty_like(parameter.ds_tensor) for parameter in parameters]
    for copy, part in zip(copies, parts, strict=True):
        if len(part) < len(copy):
            copy[len(part) :].zero_()
    _write([copy[: len(part)] for copy, part in zip(copies, parts, strict=True)], parts)
    for device in {copy.device for copy in copies}:
        _wait_for_writes(device)
    return copies


def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(values))


def _wait_for_writes(device: torch.device) -> None:
    """Block the host until the current stream is done; DeepSpeed gathers in another one, which would not wait."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream(device).synchronize()


def _gather_together(parameters: Sequence[Any], partitions: Sequence[Tensor]) -> list[Tensor]:
    """The full tensors from the partitions of all ranks, in one collective for those of one dtype and group."""
    full: dict[int, Tensor] = {}
    kinds = [(each.dtype, p.ds_process_group) for p, each in zip(parameters, partitions, strict=True)]
    for kind in dict.fromkeys(kinds):  # in the same order on all ranks
        alike, group = [i for i, each in enumerate(kinds) if each == kind], kind[1]
        sizes, ranks = [len(partitions[i]) for i in alike], dist.get_world_size(group)
        flat = torch.cat([partitions[i] for i in alike])
        by_rank = flat.new_empty(ranks * len(flat))
        dist.all_gather_into_tensor(by_rank, flat, group=group)
        by_parameter = flat.new_empty(by_rank.numel()).split([size * ranks for size in sizes])
        for rank, row in enumerate(by_rank.split(len(flat))):
            targets = [each.view(ranks, -1)[rank] for each in by_parameter]
            torch._foreach_copy_(targets, list(row.split(sizes)))
        full |= {i: _unpadded(parameters[i], each) for i, each in zip(alike, by_parameter, strict=True)}
    return [full[i] for i in range(len(kinds))]


def _unpadded(parameter: Any, gathered: Tensor) -> Tensor:
    """The full tensor from the partitions of all ranks, one after another."""
    return gathered[: parameter.ds_numel].view(parameter.ds_shape)


def _release(parameters: Iterable[Any]) -> None:
    """Free the full tensors of parameters, so that DeepSpeed gathers them again."""
    for parameter in parameters:
        if _is_gathered(parameter):
            parameter.ds_active_sub_modules.clear()  # not empty after an exception in a forward
            parameter.partition()


def _is_gathered(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")


def _start(parameter: Any) -> int:
    """Where this rank's part begins in the flat tensor."""
    start: int = parameter.ds_tensor.numel() * dist.get_rank(parameter.ds_process_group)
    return start

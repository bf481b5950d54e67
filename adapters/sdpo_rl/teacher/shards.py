"""One model on many ranks: which part of it a rank holds, and how other weights take its place.

Under DDP and ZeRO-2 every rank holds whole parameters. FSDP2 (`fully_shard`) keeps a shard of each as a
`DTensor`, ZeRO-3 a flat partition of it. A teacher is kept in the same parts, so that it costs a rank its share
and no more. Whatever talks to other ranks must be called by all of them: `exchanged` and the forward inside
it, `full_tensors`, `global_ratio`, `any_rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .swap import all_modules

Parts = dict[str, Tensor]

# What activation checkpointing under FSDP puts into the names of the layers it wraps.
_WRAPPER = "_checkpoint_wrapped_module."


def check_strategy(accelerator: Any, *, generate_every: int, accumulation_steps: int) -> None:
    """Refuse the ways to spread a model or a step under which the loss or the teacher would be wrong.

    Raises:
        ValueError: FSDP 1, whose parameters have no names of their own while they rest; or, under DeepSpeed, an
            optimizer step that spans several generation batches.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens parameters, so a teacher cannot take their place by name; set "
            "fsdp_version: 2 in the Accelerate config, or GRPOConfig(fsdp_config={'version': 2})"
        )
    if accelerator.distributed_type == "DEEPSPEED" and generate_every % accumulation_steps:
        raise ValueError(
            "under DeepSpeed an optimizer step must lie within one generation batch, because its gradient cannot "
            "be rescaled once all its tokens are counted: steps_per_generation * num_iterations "
            f"({generate_every}) must be a multiple of gradient_accumulation_steps ({accumulation_steps})"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only a part of some parameter, so that nothing may stand in for it whole."""
    if not _has_group():
        return False
    # A gathered FSDP unit shows plain parameters, hence the look at the modules.
    return any(isinstance(module, FSDPModule) for module in all_modules(model)) or is_partitioned(model)


def is_partitioned(model: nn.Module) -> bool:
    """Whether the parameters are ZeRO-3 partitions, which exist whole only inside their own module's forward."""
    return any(_is_partition(p) for module in all_modules(model) for p in module._parameters.values())


def held_parameters(model: nn.Module) -> Parts:
    """What this rank holds of every trainable parameter, by name, in the parameter's own memory."""
    return {name: _held(parameter) for name, parameter in _at_rest(model).items() if parameter.requires_grad}


@contextmanager
def exchanged(model: nn.Module, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """A sharded model with other contents in the parts that this rank holds; the very bits come back after it.

    `places.replaced` cannot do this: it would mix the plain tensors it is given with sharded ones.
    """
    parameters = _at_rest(model)
    kept = {name: _held(parameters[name]).clone() for name in parts}
    try:
        _fill(parameters, parts)
        yield
    finally:
        # The forward left units gathered, and these would go on to show the exchanged contents.
        _fill(_at_rest(model), kept)


def held_parts(model: nn.Module, full: Mapping[str, Tensor]) -> Parts:
    """This rank's parts of whole tensors, laid out as the model's parameters of the same names are."""
    parameters = _at_rest(model)
    return {name: _part(parameters[name], tensor) for name, tensor in full.items()}


def full_tensors(model: nn.Module, parts: Mapping[str, Tensor]) -> Parts:
    """Whole tensors from the parts of all ranks; every rank gets all of them."""
    parameters = _at_rest(model)
    return {name: _whole(parameters[name], part) for name, part in parts.items()}


def global_ratio(ratio: Tensor, parts: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """‖a‖/‖b‖ over all ranks from ‖a‖/‖b‖ over this rank's parts of both, `parts` being those of b."""
    if not is_sharded(model):
        return ratio
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(p.float()) for p in parts.values()])
    )
    squares = torch.stack([ratio * norm, norm]).square()
    dist.all_reduce(squares)
    return (squares[0] / squares[1].clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient by one number, in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            gradient.mul_(factor.to(gradient.device))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


def _has_group() -> bool:
    """Whether a model can be sharded at all: asked often, where a walk through thousands of modules is not free."""
    return dist.is_available() and dist.is_initialized()


def _at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, none of them gathered: the next forward gathers what the ranks then hold."""
    if _has_group():
        for module in all_modules(model):
            if isinstance(module, FSDPModule):
                module.reshard()
    return {name.replace(_WRAPPER, ""): parameter for name, parameter in model.named_parameters()}


def _fill(parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        parameter = parameters[name]
        _held(parameter).copy_(part)
        if _is_partition(parameter) and parameter.numel():
            # ZeRO-3 keeps small parameters gathered beside their partitions.
            parameter.data.copy_(_whole(parameter, part))


def _is_partition(parameter: nn.Parameter | None) -> bool:
    return hasattr(parameter, "ds_tensor")


def _held(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    if not _is_partition(parameter):
        return parameter.detach()
    # All partitions are equally long; behind the parameter's end lies padding.
    start = parameter.ds_tensor.numel() * dist.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor.detach()[: max(parameter.ds_numel - start, 0)]


def _part(parameter: Any, full: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        # No source rank: every rank has the whole tensor and cuts out its own part.
        return distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
    if not _is_partition(parameter):
        return full
    start = parameter.ds_tensor.numel() * dist.get_rank(parameter.ds_process_group)
    return full.flatten()[start : start + parameter.ds_tensor.numel()]


def _whole(parameter: Any, part: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            part.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
    if not _is_partition(parameter):
        return part
    group = parameter.ds_process_group
    padded = part.new_zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    padded[: part.numel()] = part
    gathered = padded.new_empty(padded.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered[: parameter.ds_numel].view(parameter.ds_shape)

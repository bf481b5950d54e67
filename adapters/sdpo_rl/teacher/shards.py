"""Parameters of a model that several ranks train together: local shards, full tensors, and swapping the shards.

A local shard is what this rank stores of a parameter. Under DDP and ZeRO-2 that is the whole parameter, under FSDP2
(`fully_shard`) the local tensor of a `DTensor`, under ZeRO-3 a flat partition. The teacher is stored in the same
shards, so that each rank holds its part only. These calls are collective, so every rank must make them:
`swap_shards` (entry, exit and the forward inside it), `full_tensors`, `global_ratio`, `any_rank`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from . import partitions

Tensors = dict[str, Tensor]  # by parameter name

# Activation checkpointing under FSDP adds this to the names of the layers it wraps.
_WRAPPER = "_checkpoint_wrapped_module."


def check_strategy(accelerator: Any, *, generate_every: int, accumulation_steps: int) -> None:
    """Refuse the distributed strategies under which the loss or the teacher would be wrong.

    Args:
        accelerator: Accelerate's.
        generate_every: micro-batches of a generation batch, `steps_per_generation * num_iterations`.
        accumulation_steps: micro-batches of an optimizer step.

    Raises:
        ValueError: FSDP 1, whose sharded parameters have no names of their own; or, under DeepSpeed, an optimizer
            step that spans several generation batches.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens parameters, so they have no names by which to replace them; set "
            "fsdp_version: 2 in the Accelerate config, or GRPOConfig(fsdp_config={'version': 2})"
        )
    if accelerator.distributed_type == "DEEPSPEED" and generate_every % accumulation_steps:
        raise ValueError(
            "under DeepSpeed an optimizer step must lie within one generation batch, because its gradient cannot "
            "be rescaled once all its tokens are counted: steps_per_generation * num_iterations "
            f"({generate_every}) must be a multiple of gradient_accumulation_steps ({accumulation_steps})"
        )


def check_zero3_options(accelerator: Any) -> None:
    """Refuse options of ZeRO-3 with which the teacher's forward would not gather the teacher's weights.

    Raises:
        ValueError: DeepSpeed gathers from secondary partitions (ZeRO++ hpZ), or offloads the partitions.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return
    options = plugin.deepspeed_config["zero_optimization"]
    hpz_size = options.get("zero_hpz_partition_size")
    # DeepSpeed takes the number as text as well. No value, 0 and "auto" mean its default, 1.
    if str(hpz_size) not in ("0", "1", "auto", "None"):
        raise ValueError(
            f"zero_hpz_partition_size: expected 1, got {hpz_size!r}; for the teacher's forward DeepSpeed would "
            "gather its secondary partitions, which have the student's weights. Remove the option from "
            "zero_optimization, or set SDPOConfig(teacher_mode='live') without anchor_weight"
        )
    device = (options.get("offload_param") or {}).get("device")
    if device in ("cpu", "nvme"):
        raise ValueError(
            f"offload_param: expected the device 'none', got {device!r}; the teacher's weights take the "
            "place of the partitions, and are compared over all processes, which needs them on the GPU. Remove the "
            "option from zero_optimization, or set SDPOConfig(teacher_mode='live') without anchor_weight"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is stored in parts, so that `torch.func.functional_call` cannot replace it."""
    if not _has_process_group():
        return False
    # An unsharded FSDP unit shows plain parameters, so its modules are examined instead.
    return is_partitioned(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitions the parameters, so that most are gathered only while their module runs."""
    # It partitions all of a model or none.
    return any(partitions.is_partition(parameter) for parameter in islice(model.parameters(), 1))


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names that they have without torch's wrappers of activation checkpointing.

    Names and order are otherwise those of `model.named_parameters()`, which nests one generator for each level of
    the model. With adapters a model has thousands of modules, and a step asks several times; this is one loop.
    """
    found: dict[nn.Parameter, str] = {}  # a tied parameter has its first name
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, prefix + name)
        for name, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((f"{prefix}{name}.", child))
    return {name.replace(_WRAPPER, ""): parameter for parameter, name in found.items()}


def local_shards(model: nn.Module) -> Tensors:
    """The trainable parameters by name: of a sharded model this rank's shards, sharing their storage."""
    trainable = {name: p for name, p in _resharded_parameters(model).items() if p.requires_grad}
    return {name: _local_shard(p) for name, p in trainable.items()} if is_sharded(model) else {**trainable}


@contextmanager
def swap_shards(model: nn.Module, shards: Mapping[str, Tensor]) -> Iterator[None]:
    """A sharded model with `shards`, by parameter name, as local shards; afterwards it has its own, bit for bit.

    Under FSDP2 `torch.func.functional_call` would mix plain tensors with sharded ones, which torch refuses.
    """
    parameters = _resharded_parameters(model)
    if is_partitioned(model):
        with partitions.replaced_partitions([parameters[name] for name in shards], list(shards.values())):
            yield
        return
    originals = {name: _local_shard(parameters[name]).clone() for name in shards}
    try:
        _write(parameters, shards)
        yield
    finally:
        _wait_for_copies(originals)
        # The forward left units unsharded, with the swapped values.
        _write(_resharded_parameters(model), originals)


def shard_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """This rank's shards of full tensors, cut like the model's parameters of the same names."""
    parameters = _resharded_parameters(model)
    return {name: _cut_shard(parameters[name], tensor) for name, tensor in tensors.items()}


def full_tensors(model: nn.Module, shards: Mapping[str, Tensor]) -> Tensors:
    """Full tensors from the shards of all ranks, on every rank."""
    parameters = _resharded_parameters(model)
    return {name: _gather(parameters[name], shard) for name, shard in shards.items()}


def global_ratio(ratio: Tensor, shards: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """‖a‖/‖b‖ [] over all ranks, from ‖a‖/‖b‖ [] over this rank's shards; `shards` are those of b."""
    if not is_sharded(model):
        return ratio
    norms = [torch.linalg.vector_norm(shard.float()) for shard in shards.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
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
    if not _has_process_group():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


def _has_process_group() -> bool:
    """Whether a process group is initialized; without one, the modules need not be traversed."""
    return dist.is_available() and dist.is_initialized()


def _resharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, none unsharded, so that the next forward gathers the shards as they are then."""
    if _has_process_group():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return parameters_by_name(model)


def _write(parameters: Mapping[str, Any], shards: Mapping[str, Tensor]) -> None:
    for name, shard in shards.items():
        _local_shard(parameters[name]).copy_(shard)


def _wait_for_copies(shards: Mapping[str, Tensor]) -> None:
    """With CPU offload, block until the GPU has copied the parameters' shards, before they are overwritten."""
    if torch.accelerator.is_available() and any(shard.device.type == "cpu" for shard in shards.values()):
        torch.accelerator.synchronize()


def _local_shard(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return partitions.local(parameter) if partitions.is_partition(parameter) else parameter.detach()


def _cut_shard(parameter: Any, tensor: Tensor) -> Tensor:
    """This rank's shard of a full tensor."""
    if isinstance(parameter, DTensor):
        # No source rank: every rank has the full tensor and cuts its own shard.
        return distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
    return partitions.cut(parameter, tensor) if partitions.is_partition(parameter) else tensor


def _gather(parameter: Any, shard: Tensor) -> Tensor:
    """The full tensor from the shards of all ranks."""
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            shard.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
    return partitions.gather(parameter, shard) if partitions.is_partition(parameter) else shard

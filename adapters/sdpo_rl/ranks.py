"""One model on many ranks: which part of it is held here, and how other weights take its place.

Under DDP and ZeRO-1/2 every rank holds whole parameters. FSDP2 (`fully_shard`) keeps a shard of each as a
`DTensor`, ZeRO-3 a flat partition. A teacher lives on the same parts, so it costs a rank its share and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Parts = dict[str, Tensor]


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only a part of some parameter, so that nothing may stand in for it whole."""
    # A gathered FSDP unit shows plain parameters, hence the look at the modules.
    return any(map(_is_fsdp_unit, model.modules())) or any(map(_is_partitioned, model.parameters()))


def held_parameters(model: nn.Module) -> Parts:
    """What this rank holds of every trainable parameter, by name, in the parameter's own memory."""
    return {name: _held(p) for name, p in _at_rest(model).items() if p.requires_grad}


@contextmanager
def exchanged(model: nn.Module, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """A sharded model with other contents in the parts that this rank holds; the very bits come back afterwards.

    `torch.func.functional_call` cannot do this: it would mix the plain tensors it is given with sharded ones.
    """
    held = held_parameters(model)
    kept = {name: held[name].clone() for name in parts}
    try:
        _copy(parts, held)
        yield
    finally:
        # The forward left units gathered, and they would go on to show the exchanged contents.
        _copy(kept, held_parameters(model))


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, part in source.items():
        target[name].copy_(part)


def _at_rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, none of them gathered, so that the next forward gathers what the ranks then hold."""
    for module in model.modules():
        if _is_fsdp_unit(module):
            module.reshard()
    # Activation checkpointing under FSDP wraps the layers; a teacher is named as the model was before.
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}


def held_parts(model: nn.Module, full: Mapping[str, Tensor]) -> Parts:
    """This rank's parts of whole tensors, laid out as the model's parameters of the same names are."""
    parameters = _at_rest(model)
    return {name: _part(parameters[name], tensor) for name, tensor in full.items()}


def full_tensors(model: nn.Module, parts: Mapping[str, Tensor]) -> Parts:
    """Whole tensors from the parts of all ranks; every rank takes part and gets all of them."""
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


def _part(parameter: nn.Parameter, full: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
    return full


def _whole(parameter: nn.Parameter, part: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            part.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
    return part


def _held(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def _is_fsdp_unit(module: nn.Module) -> TypeGuard[FSDPModule]:
    return isinstance(module, FSDPModule)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")

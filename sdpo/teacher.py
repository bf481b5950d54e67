"""The teacher's weights: pure ``(init, update)`` pairs over named tensors.

The teacher is the student's model with other weights; this module holds those weights alone. The average is
float32 whatever the parameters' dtype, because a step of r·(θ − θ') is mostly smaller than the spacing of
bfloat16 around θ', and rounding to nearest then drops it, always in the same direction.

Source: SDPO, arXiv 2601.20802, section 4 (self-teacher variants).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sdpo._numerics import upcast
from sdpo._validate import (
    LARGEST,
    check_choice,
    check_flag,
    check_int,
    check_real,
    check_shape,
    check_tensor,
    type_name,
)

StateDtype = Literal["float32", "bfloat16"]

# bfloat16 is the upper half of float32.
_LOWER_HALF = 0xFFFF

# What the operations over lists take together.
_PLAIN = (Tensor, torch.nn.Parameter)

# Numbers averaged at once: 64 MiB of float32.
_TOGETHER = 2**24


class TeacherState(NamedTuple):
    """The teacher's weights and the number of their updates: what a checkpoint must contain of a teacher.

    ``torch.save`` and ``torch.load`` with its defaults (``weights_only=True``) work on it.

    Args:
        params: detached tensors by parameter name, in the dtype of the rule; empty for ``live``.
        ticks: updates so far. With the seed it determines the stochastic rounding of a bfloat16 state.

    Source: SDPO, arXiv 2601.20802, section 4.
    """

    params: dict[str, Tensor]
    ticks: int


# So that torch.load reads it without weights_only=False.
torch.serialization.add_safe_globals([TeacherState])


class Teacher(NamedTuple):
    """A rule for the teacher's weights, as a pair of functions.

    Pass both the same names, those of ``model.named_parameters()``: it names tied weights once,
    ``state_dict()`` twice.

    Args:
        init: from the student's parameters by name to a state equal to them.
        update: from a state and the student's parameters to the next state; once per generation batch.

    Source: SDPO, arXiv 2601.20802, section 4; the form is optax's.
    """

    init: Callable[[Mapping[str, Tensor]], TeacherState]
    update: Callable[[TeacherState, Mapping[str, Tensor]], TeacherState]


def ema(
    *, update_rate: float, dtype: StateDtype = "float32", seed: int = 0, inplace: bool = False
) -> Teacher:
    """An exponential moving average of the student: ``θ' <- θ' + r·(θ − θ')``, r = update_rate.

    update_rate is the weight of the *student*: 0 is ``frozen``, 1 copies it. After n updates
    ``θ'_n = (1−r)^n θ_0 + r Σ_k (1−r)^(n−k) θ_k``. With adapters pass the trainable parameters only; the
    average of two factors A and B is not the average of their product B·A.

    dtype="bfloat16" halves the state. Its update is computed in float32 and rounded stochastically, up or
    down with the probabilities that keep the expectation, from (seed, ticks, name). So the state is an
    unbiased estimate of the float32 average and stays within the range of a bfloat16 student's past. An
    element strays from it by more than ``u·sqrt(log(2/δ) / (2r(2−r)))`` with probability δ at most
    (Azuma-Hoeffding; u is the bfloat16 spacing there). Noise instead of bias, but still noise, the more the
    smaller r: hence not the default. float64 parameters keep a float64 state.

    inplace=True lets ``update`` write into the tensors of the state it is given, which must not be used afterwards:
    no more is allocated than the largest parameter takes in float32, or 64 MiB; of a bfloat16 state four times
    64 MiB. The default leaves its inputs alone, as ``torch.func`` demands.

    Args:
        update_rate: r, the weight of the student, in [0, 1].
        dtype: of the averaged weights: ``"float32"``, or ``"bfloat16"`` with stochastic rounding.
        seed: of the stochastic rounding.
        inplace: write into the state that ``update`` is given.

    Returns:
        Teacher. Its state has the names and shapes of the parameters.

    Raises:
        TypeError: a parameter is not a floating tensor (frozen quantized storage, say); all are named. The state is
            no TeacherState.
        ValueError: update_rate outside [0, 1]; no parameters; or names, shapes or dtypes that differ between
            the state and the student, all listed.

    Gradient: none, in or out.

    Source: SDPO, arXiv 2601.20802, section 4.

    Examples:
        >>> teacher = ema(update_rate=0.25)
        >>> state = teacher.init({"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
        >>> teacher.update(state, {"w": torch.tensor([5.0, 2.0], dtype=torch.bfloat16)})
        TeacherState(params={'w': tensor([2., 2.])}, ticks=1)
    """
    rate = check_real("update_rate", update_rate, low=0.0, high=1.0, meaning="the weight of the student")
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    check_int("seed", seed, low=0, high=2**63 - 1, meaning="the seed of the stochastic rounding")
    check_flag("inplace", inplace, meaning="True to reuse the memory of the state")

    def update(state: TeacherState, params: Mapping[str, Tensor]) -> TeacherState:
        _check_match(state, params, dtype)
        averaged = dict(state.params)
        if inplace:
            _lerp_inplace([(old, params[n]) for n, old in averaged.items() if not _is_rounded(old)], rate)
        for name, old in state.params.items():
            if _is_rounded(old):
                target = old if inplace else torch.empty_like(old)
                key = f"{seed}|{state.ticks}|{name}"
                averaged[name] = _lerp_rounded(old, params[name].detach(), rate, target, key)
            elif not inplace:
                averaged[name] = torch.lerp(old, params[name].detach().to(old.dtype), rate)
        return TeacherState(averaged, state.ticks + 1)

    return Teacher(init=lambda params: _clones(params, dtype), update=update)


def rate_per_tick(update_rate: float, *, samples: float, per_samples: float) -> float:
    """The rate of one update from a rate that is given per so many samples: ``1 − (1 − r)^(n/m)``.

    An average that is updated more often, after fewer samples each, then forgets its start at the same pace per
    sample: two updates of n samples weigh the past like one of 2n. A rate of .05 per 256 samples is .013 per 64.

    Args:
        update_rate: r, the weight of the student after m samples, in [0, 1].
        samples: n, samples from one update to the next, > 0.
        per_samples: m, samples that the rate is given for, > 0.

    Returns:
        The weight of the student in one update, in [0, 1].

    Raises:
        TypeError: an argument is not a number.
        ValueError: a rate outside [0, 1], or a number of samples that is not above 0 and finite.

    Gradient: none, the arguments are numbers.

    Source: a choice of this library; the paper's rate of 0.05 is per batch of 32 prompts × 8 completions
    (arXiv 2601.20802, section 3).

    Examples:
        >>> round(rate_per_tick(0.05, samples=64, per_samples=256), 4)
        0.0127
    """
    rate = check_real("update_rate", update_rate, low=0.0, high=1.0, meaning="the weight of the student")
    n = check_real(
        "samples", samples, low=0.0, high=LARGEST, open_low=True, meaning="samples between updates"
    )
    m = check_real(
        "per_samples", per_samples, low=0.0, high=LARGEST, open_low=True, meaning="samples of the rate"
    )
    # The rate itself where nothing is converted, to the last bit.
    return rate if n == m or rate in (0.0, 1.0) else -math.expm1(n / m * math.log1p(-rate))


def frozen() -> Teacher:
    """The student as it was at the start: ``θ' = θ_0``; equals ``ema(update_rate=0)`` without its arithmetic.

    Nothing is averaged, so the state keeps the parameters' own dtypes, bit by bit.

    Returns:
        Teacher. Its state has the names, shapes and dtypes of the parameters.

    Raises:
        TypeError, ValueError: as ``ema``; an update, too, demands the same parameters.

    Gradient: none, in or out.

    Source: SDPO, arXiv 2601.20802, section 4, Table 4.

    Examples:
        >>> teacher = frozen()
        >>> state = teacher.init({"w": torch.zeros(2)})
        >>> teacher.update(state, {"w": torch.ones(2)})
        TeacherState(params={'w': tensor([0., 0.])}, ticks=1)
    """

    def update(state: TeacherState, params: Mapping[str, Tensor]) -> TeacherState:
        _check_match(state, params)
        return TeacherState(state.params, state.ticks + 1)

    return Teacher(init=lambda params: _clones(params, None), update=update)


def live() -> Teacher:
    """The student itself, ``θ' = θ``, so the state holds no weights; diverges in the paper, for ablations.

    Returns:
        Teacher with a state without weights.

    Gradient: none, in or out.

    Source: SDPO, arXiv 2601.20802, section 4, Table 4.

    Examples:
        >>> teacher = live()
        >>> teacher.update(teacher.init({"w": torch.zeros(2)}), {"w": torch.ones(2)})
        TeacherState(params={}, ticks=1)
    """
    return Teacher(
        init=lambda params: TeacherState({}, 0),
        update=lambda state, params: TeacherState(state.params, state.ticks + 1),
    )


def trust_region_logits(reference_logits: Tensor, live_logits: Tensor, *, coef: float) -> Tensor:
    """Logits of the trust-region teacher, ``(1−c)·z_ref + c·z_live``, whose softmax is q ∝ q_ref^(1−c)·q_θ^c.

    The reference is the student as it was at the start, whose weights ``frozen`` keeps: they do not depend on c.
    coef 0 is the reference and 1 the live student, exactly. A token impossible for either (−∞) is impossible
    for a mixture.

    Args:
        reference_logits: [..., V] floating, of the first model; -inf allowed.
        live_logits: [..., V] floating, of the student on the same prompt; -inf allowed.
        coef: c, the weight of the live student, in [0, 1].

    Returns:
        [..., V] nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument is not a floating tensor, or coef not a number.
        ValueError: the shapes differ, or coef is not in [0, 1].

    Gradient: none, also not to the live logits: here they are the teacher's.

    Source: SDPO, arXiv 2601.20802, section 4, Table 4.

    Examples:
        >>> trust_region_logits(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), coef=0.25)
        tensor([0.5000, 3.0000])
    """
    check_tensor("reference_logits", reference_logits, "floating", min_ndim=1)
    check_tensor("live_logits", live_logits, "floating", min_ndim=1)
    check_shape("live_logits", live_logits, reference_logits.shape, like="the shape of reference_logits")
    return _mix(reference_logits, live_logits, _check_coef(coef))


def trust_region_hidden(reference_hidden: Tensor, live_hidden: Tensor, *, coef: float) -> Tensor:
    """The same mixture before the head: ``W·mix(h_ref, h_live) + b = mix(W·h_ref + b, W·h_live + b)``.

    One head product instead of two, where both models share one *linear* head: not with a trained head, and
    not under soft-capping. Mixed in float32, returned in the dtype of reference_hidden, ready for the head: of
    16-bit states the rounding costs a divergence a few thousandths, which the fused loss spares.

    Args:
        reference_hidden: [..., D] floating, hidden states of the first model.
        live_hidden: [..., D] floating, hidden states of the student on the same prompt.
        coef: c, the weight of the live student, in [0, 1].

    Returns:
        [..., D] in the dtype of reference_hidden.

    Raises:
        TypeError, ValueError: as ``trust_region_logits``.

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, section 4; the linear head is our own use of it.

    Examples:
        >>> trust_region_hidden(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), coef=0.5)
        tensor([1., 2.])
    """
    check_tensor("reference_hidden", reference_hidden, "floating", min_ndim=1)
    check_tensor("live_hidden", live_hidden, "floating", min_ndim=1)
    check_shape("live_hidden", live_hidden, reference_hidden.shape, like="the shape of reference_hidden")
    return _mix(reference_hidden, live_hidden, _check_coef(coef)).to(reference_hidden.dtype)


def teacher_distance(state: TeacherState, params: Mapping[str, Tensor]) -> Tensor:
    """How far the teacher is from the student: ``‖θ' − θ‖ / ‖θ‖`` over all parameters together.

    Args:
        state: of any teacher.
        params: the student's parameters, by the same names, on one device. A state elsewhere is brought
            there one tensor at a time.

    Returns:
        [] ratio, float32 or float64, without a device synchronisation; 0 for ``live``.

    Raises:
        TypeError: state is no TeacherState, or a parameter not a floating tensor.
        ValueError: params are not the state's, as in ``ema``.

    Gradient: none.

    Source: the teacher's distance as a run logs it; a choice of this library.

    Examples:
        >>> state = frozen().init({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        >>> teacher_distance(state, {"a": torch.tensor([6.0]), "b": torch.tensor([8.0])})
        tensor(0.5000)
    """
    _check_state(state)
    _check_params(params)
    if not state.params:
        return upcast(next(iter(params.values())).detach()).new_zeros(())
    _check_match(state, params)
    gaps, norms = [], []
    for name, old in state.params.items():  # one parameter at a time: no second model in float32
        student = upcast(params[name].detach())
        gaps.append(torch.linalg.vector_norm(upcast(old.to(student.device)) - student))
        norms.append(torch.linalg.vector_norm(student))
    distance, norm = (torch.linalg.vector_norm(torch.stack(parts)) for parts in (gaps, norms))
    return distance / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # torch 2.6 has no clamp_min of shards


def _mix(reference: Tensor, live_values: Tensor, coef: float) -> Tensor:
    common = torch.promote_types(upcast(reference).dtype, live_values.dtype)
    start, end = reference.detach().to(common), live_values.detach().to(common)
    if coef in (0.0, 1.0):  # exactly one of the two, whatever is impossible for the other
        return end if coef else start
    # (1−c)·(−∞) + c·z is −∞ for every c in between, but torch.lerp takes a difference and makes it NaN.
    return torch.lerp(start, end, coef).masked_fill_(start.isneginf() | end.isneginf(), -math.inf)


def _check_coef(coef: float) -> float:
    return check_real("coef", coef, low=0.0, high=1.0, meaning="the weight of the live student")


def _clones(params: Mapping[str, Tensor], dtype: StateDtype | None) -> TeacherState:
    """Copies in ``dtype``, float64 as it is; in their own dtypes if None."""
    _check_params(params)
    clones = {}
    for name, param in params.items():
        kept = param.dtype if dtype is None or param.dtype == torch.float64 else getattr(torch, dtype)
        clones[name] = param.detach().to(kept, copy=True)
    return TeacherState(clones, 0)


def _is_rounded(average: Tensor) -> bool:
    return average.dtype == torch.bfloat16


@torch.no_grad()
def _lerp_inplace(pairs: list[tuple[Tensor, Tensor]], rate: float) -> None:
    """Every average towards its parameter, many small ones in one go, since each alone keeps no GPU busy."""
    start = size = 0
    for i, (old, _) in enumerate(pairs):
        if size and size + old.numel() > _TOGETHER:
            _lerp_together(pairs[start:i], rate)
            start, size = i, 0
        size += old.numel()
    if pairs:
        _lerp_together(pairs[start:], rate)


def _lerp_together(pairs: list[tuple[Tensor, Tensor]], rate: float) -> None:
    if not all(type(tensor) in _PLAIN for pair in pairs for tensor in pair):
        # A subclass, such as a sharded tensor, need not know the operations over lists.
        for old, new in pairs:
            old.lerp_(new.to(old.dtype), rate)
        return
    averages = [old for old, _ in pairs]
    wide = [new if new.dtype == old.dtype else torch.empty_like(old) for old, new in pairs]
    cast = [i for i, (old, new) in enumerate(pairs) if new.dtype != old.dtype]
    if cast:
        torch._foreach_copy_([wide[i] for i in cast], [pairs[i][1] for i in cast])
    torch._foreach_lerp_(averages, wide, rate)


def _lerp_rounded(old: Tensor, new: Tensor, rate: float, target: Tensor, key: str) -> Tensor:
    """Write the average into a bfloat16 tensor, each number to a neighbour, with the average as the expectation."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    starts, ends, rounded = (torch.atleast_1d(_local(tensor)) for tensor in (old, new, target))
    generator = torch.Generator(starts.device).manual_seed(int.from_bytes(digest))
    rows = max(1, _TOGETHER * len(starts) // max(1, starts.numel()))
    for start, end, out in zip(starts.split(rows), ends.split(rows), rounded.split(rows), strict=True):
        # In place: one tensor less beside those of the last rows, which are still there.
        average = start.float().lerp_(end.float(), rate)
        noise = torch.randint(
            _LOWER_HALF + 1, average.shape, generator=generator, dtype=torch.int32, device=average.device
        )
        # Adding noise below the cut carries with probability (lower half) / 2^16, away from zero on both sides
        # of it, since the sign is a bit of its own. In a NaN the carry could run into the sign: copy that as
        # it is.
        upper = noise.add_(average.view(torch.int32)).bitwise_and_(~_LOWER_HALF).view(torch.float32)
        out.copy_(torch.where(average.isfinite(), upper, average))
    return target


def _local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _check_params(params: Mapping[str, Tensor]) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params: expected a mapping of names to tensors, got {type(params).__name__}; "
            "pass dict(model.named_parameters())"
        )
    if not params:
        raise ValueError(
            "params: expected at least one parameter, got none; pass the trainable ones, "
            "and attach the adapter first if the model is to have one"
        )
    # Packed 4-bit storage may call itself bfloat16; only its quant_state tells.
    refused = [
        f"{name!r} ({getattr(param, 'dtype', type(param).__name__)})"
        for name, param in params.items()
        if not isinstance(param, Tensor)
        or not param.is_floating_point()
        or getattr(param, "quant_state", None) is not None
    ]
    if refused:
        raise TypeError(
            f"params: expected floating tensors that can be averaged, got {', '.join(refused)}; pass only "
            "trainable parameters: {n: p for n, p in model.named_parameters() if p.requires_grad}"
        )


def _check_state(state: object) -> None:
    if not isinstance(state, TeacherState):
        raise TypeError(
            f"state: expected a TeacherState, got {type_name(state)}; pass what init or the last update returned"
        )


def _check_match(state: TeacherState, params: Mapping[str, Tensor], dtype: StateDtype | None = None) -> None:
    """The state and the student have the same names and shapes, and the state is stored as this rule does."""
    _check_state(state)
    _check_params(params)
    kept = None if dtype is None else (getattr(torch, dtype), torch.float64)
    shared = [name for name in state.params if name in params]
    differences = [f"missing {name!r}" for name in state.params if name not in params]
    differences += [f"unexpected {name!r}" for name in params if name not in state.params]
    differences += [
        f"{name!r} has shape {tuple(params[name].shape)}, not {tuple(state.params[name].shape)}"
        for name in shared
        if params[name].shape != state.params[name].shape
    ]
    differences += [
        f"the state of {name!r} is {state.params[name].dtype}, not torch.{dtype}"
        for name in shared
        if kept is not None and state.params[name].dtype not in kept
    ]
    if differences:
        raise ValueError(
            f"params: expected the parameters of the teacher's state, got {'; '.join(differences)}; "
            "pass the parameters that init was given (dict(model.named_parameters()) names tied weights once, "
            "state_dict() twice), or restart the teacher with init"
        )

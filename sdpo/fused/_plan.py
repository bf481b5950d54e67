"""What the fused loss accepts, and how its work is cut: validation, chunk size, choice of backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo._validate import (
    check_alpha,
    check_choice,
    check_device,
    check_int,
    check_real,
    check_shape,
    check_tensor,
)
from sdpo.fused import _torch
from sdpo.fused import triton as kernels
from sdpo.fused._chunks import Backend, Operands, Plan
from sdpo.fused._matmul import autocast_dtype, grad_logits_dtype, operand_dtype, working_dtype
from sdpo.fused._types import Objective, Support, Tail

# Bytes of a chunk's buffers: enough to keep the matrix units busy, 1536 tokens of a vocabulary of 150k on a GPU
# where both models' logits take turns in one buffer, else 768.
_GPU_BYTES = 1344 * 2**20
_CPU_BYTES = 96 * 2**20
_MAX_ROWS = 7680
# Tiles of the products are 128, 192 or 256 tokens high: so many tokens leave none of them in part.
_WHOLE, _PART = 768, 128
# Chunks of slopes that wait for one product with the hidden states, where the head learns: without and with turns.
_SLOPE_BLOCKS = 4, 2

Model = tuple[Tensor | None, Tensor | None, Tensor | None]
_PARTS = ("hidden", "head", "bias")


def check_head(name: str, head: object) -> int:
    """Return the vocabulary size of an LM head [V, D]."""
    check_tensor(name, head, "floating", min_ndim=2)
    assert isinstance(head, Tensor)
    if head.ndim != 2 or 0 in head.shape:
        raise ValueError(
            f"{name}: expected a weight [V, D] with V, D > 0, got shape {tuple(head.shape)}; "
            "pass the weight of the output embedding"
        )
    return head.shape[0]


def check_objective(
    *,
    vocabulary: int,
    k: int | None,
    alpha: float,
    tail: Tail,
    support: Support,
    is_clip: float | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    trust_region_coef: float | None,
) -> Objective:
    """Validate the scalars of the objective."""
    alpha = check_alpha(alpha)
    check_choice("tail", tail, ("bucket", "renormalize"))
    check_choice("support", support, ("student", "teacher", "sampled"))
    if support == "sampled" and (k is not None or alpha != 1.0):
        raise ValueError(
            f"support: expected k=None and alpha=1 with 'sampled', got k={k!r}, alpha={alpha!r}; "
            "only the reverse divergence has an estimate from the sampled token alone"
        )
    if k is not None:
        k = check_int(
            "k", k, low=1, high=vocabulary, meaning=f"at most the vocabulary size, min(k, {vocabulary})"
        )
    if is_clip is not None:
        is_clip = _positive("is_clip", is_clip, "the largest importance weight, or None")
    if softcap is not None:
        softcap = _positive("softcap", softcap, "the bound of the logits, or None")
    if trust_region_coef is not None:
        meaning = "the weight of the live teacher's logits"
        trust_region_coef = check_real(
            "trust_region_coef", trust_region_coef, low=0.0, high=1.0, meaning=meaning
        )
    return Objective(
        # The support of all V tokens has no order and no tail: the full vocabulary.
        k=None if k == vocabulary else k,
        alpha=alpha,
        tail=tail,
        support=support,
        is_clip=is_clip,
        temperature=_positive("temperature", temperature, "the rollout temperature"),
        softcap=softcap,
        logit_scale=_positive("logit_scale", logit_scale, "the factor of the logits"),
        trust_region_coef=trust_region_coef,
    )


def check_operands(
    *,
    student: Model,
    teacher: Model,
    reference: Model,
    tokens: Tensor,
    loss_mask: Tensor,
    old_log_probs: Tensor | None,
    extra_weights: Tensor | None,
    trust_region_coef: float | None,
) -> Operands:
    """Validate the tensors and flatten their leading dimensions; every token counts as active."""
    check_tensor("tokens", tokens, "integer", min_ndim=1)
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, tokens.shape, like="the shape of tokens")
    for name, value in (("old_log_probs", old_log_probs), ("extra_weights", extra_weights)):
        if value is not None:
            check_tensor(name, value, "floating")
            check_shape(name, value, tokens.shape, like="the shape of tokens")
    student_hidden, student_head, student_bias = _check_model("student", student, tokens)
    teacher_hidden, teacher_head, teacher_bias = _check_model("teacher", teacher, tokens)
    check_shape(
        "teacher_head",
        teacher_head,
        (student_head.shape[0], teacher_head.shape[1]),
        like="the student's vocabulary",
    )
    centre = _check_centre(reference, teacher, tokens, trust_region_coef)
    if trust_region_coef == 0.0:
        # At the ends of the region one of the two models is all of the teacher.
        teacher_hidden, teacher_head, teacher_bias = _check_model("reference", centre, tokens)
    if trust_region_coef in (0.0, 1.0):
        centre = (None, None, None)
    _check_one_device(
        {"student": student, "teacher": teacher, "reference": reference},
        tokens=tokens,
        loss_mask=loss_mask,
        old_log_probs=old_log_probs,
        extra_weights=extra_weights,
    )
    return Operands(
        student_hidden=student_hidden,
        student_head=student_head,
        student_bias=student_bias,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        teacher_bias=teacher_bias,
        reference_hidden=None if centre[0] is None else centre[0].flatten(0, -2),
        reference_head=centre[1],
        reference_bias=centre[2],
        tokens=tokens.flatten().long(),
        active=None,
        old_log_probs=None if old_log_probs is None else old_log_probs.flatten(),
        extra_weights=None if extra_weights is None else extra_weights.flatten(),
    )


def find_active(operands: Operands, loss_mask: Tensor) -> Operands:
    """The active tokens among all.

    This waits for the device, which then has nothing to do until the first product: what can come before it, does.
    """
    active = loss_mask.flatten().nonzero().flatten()
    _check_token_ids(operands.tokens, active, operands.student_head.shape[0])
    return operands if active.shape[0] == loss_mask.numel() else operands._replace(active=active)


def make_plan(operands: Operands, recipe: Objective, *, chunk_size: int | None, backend: str) -> Plan:
    """Choose the backend and the number of tokens whose logits exist at a time."""
    check_choice("backend", backend, ("auto", "torch", "triton"))
    student = (operands.student_hidden, operands.student_head, operands.student_bias)
    hidden, head, bias = (
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in student
    )
    device = operands.student_hidden.device
    autocast = autocast_dtype(device)
    dtype = operand_dtype(operands.student_hidden, operands.student_head, autocast)
    missing = kernels.missing(device, working_dtype(dtype), recipe)
    if backend == "triton" and missing is not None:
        raise ValueError(f"backend: expected one that can run here, got 'triton', but {missing}; pass 'auto'")
    chosen: Backend = _torch.chunk
    if backend == "triton" or (backend == "auto" and missing is None and device.type == "cuda"):
        chosen = kernels.chunk
    slope = grad_logits_dtype(device, dtype)
    take_turns = chosen is kernels.chunk and kernels.take_turns(recipe, slope)
    # A head that learns makes its gradient once per block of slopes, and reads and writes all of it each time.
    blocks = _SLOPE_BLOCKS[take_turns] if head else 1
    own_reference = operands.reference_hidden is not None and not _shares_product(operands, recipe)
    if chunk_size is None:
        width = working_dtype(dtype).itemsize
        buffers = (1 if take_turns else 2) + own_reference
        per_row = width * buffers + (slope.itemsize if slope.itemsize < width else 0)
        if chosen is _torch.chunk:
            per_row += width * (1 if recipe.k is not None or recipe.support == "sampled" else 8)
        chunk_size = _rows_that_fit(per_row * operands.student_head.shape[0], device)
    else:
        chunk_size = check_int(
            "chunk_size", chunk_size, low=1, high=2**31, meaning="a number of tokens, or None for a choice"
        )
    return Plan(
        backend=chosen,
        chunk_rows=chunk_size,
        slope_rows=chunk_size * blocks,
        take_turns=take_turns,
        own_reference=own_reference,
        autocast=autocast,
        hidden=hidden,
        head=head,
        bias=bias,
    )


def check_reduction(reduction: str) -> str:
    """Validate the place where the gradient enters."""
    check_choice("reduction", reduction, ("sum", "none"))
    return reduction


def _positive(name: str, value: object, meaning: str) -> float:
    return check_real(name, value, low=0.0, high=math.inf, open_low=True, meaning=meaning)


def _check_model(name: str, model: Model, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validate hidden states [..., D] against the tokens [...] and a head [V, D]; flatten the former."""
    hidden, head, bias = model
    check_tensor(f"{name}_hidden", hidden, "floating", min_ndim=2)
    vocabulary = check_head(f"{name}_head", head)
    assert hidden is not None
    assert head is not None
    width = head.shape[1]
    check_shape(f"{name}_hidden", hidden, (*tokens.shape, width), like=f"tokens, then D of {name}_head")
    if bias is not None:
        check_tensor(f"{name}_bias", bias, "floating")
        check_shape(f"{name}_bias", bias, (vocabulary,), like=f"V of {name}_head")
    return hidden.flatten(0, -2), head, bias


def _check_centre(reference: Model, teacher: Model, tokens: Tensor, coef: float | None) -> Model:
    """Validate the centre of a trust region, whose head may be the teacher's."""
    hidden, head, _ = reference
    if (hidden is None) != (coef is None):
        given = "trust_region_coef" if hidden is None else "reference_hidden"
        raise ValueError(
            f"reference_hidden: expected together with trust_region_coef, got only {given}; "
            "pass both for a trust-region teacher, neither for any other"
        )
    if hidden is None:
        return reference
    reference = (hidden, *teacher[1:]) if head is None else reference
    _check_model("reference", reference, tokens)
    return reference


def _check_one_device(models: dict[str, Model], **others: Tensor | None) -> None:
    device_of = models["student"][0]
    assert device_of is not None
    parts = {f"{name}_{part}": model[i] for name, model in models.items() for i, part in enumerate(_PARTS)}
    for name, value in (parts | others).items():
        if value is not None:
            check_device(name, value, device_of, like="the device of student_hidden")


def _check_token_ids(tokens: Tensor, active: Tensor, vocabulary: int) -> None:
    """Refuse active ids outside the vocabulary where that costs nothing: a GPU would have to be waited for."""
    if tokens.device.type != "cpu":
        return
    ids = tokens[active]
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.numel() > 0:
        raise ValueError(
            f"tokens: expected ids in [0, {vocabulary}), the rows of student_head, where loss_mask is true, "
            f"got {int(outside[0])}; mask such positions"
        )


def _shares_product(operands: Operands, recipe: Objective) -> bool:
    """Whether a trust region's logits are one product: of the states in between, through one linear head."""
    same_head = operands.reference_head is operands.teacher_head
    return same_head and operands.reference_bias is operands.teacher_bias and recipe.softcap is None


def _rows_that_fit(bytes_per_row: int, device: torch.device) -> int:
    """Rows of a chunk: as many as the budget allows, of whole tiles where there is room for them."""
    budget = _CPU_BYTES
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < 4 * _GPU_BYTES:
            # What the caching allocator holds unused is free as well; to ask takes as long as a small product.
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(_GPU_BYTES, free // 4)
    rows = max(1, min(budget // bytes_per_row, _MAX_ROWS))
    return rows - rows % next((size for size in (_WHOLE, _PART) if rows >= size), 1)

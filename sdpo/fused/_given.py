"""The distribution of a teacher of whom the top K are given.

Of the other tokens only their mass is known. Statistics of the full vocabulary take it as spread evenly over them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo._numerics import logsumexp
from sdpo.fused._types import AtSupport
from sdpo.given import SMALLEST_TAIL, TeacherTopK, safe_tail, teacher_categories


def given_at_support(
    teacher: TeacherTopK, tokens: Tensor, student_log_tail: Tensor, vocabulary: int
) -> AtSupport:
    """The distribution at the given tokens [C, K], of sampled tokens [C] and beside a student's tail [C]."""
    given = safe_tail(teacher.log_probs.to(student_log_tail.dtype))
    categories = teacher_categories(given, student_log_tail)
    log_probs, log_tail = categories[:, :-1].contiguous(), categories[:, -1]
    log_others = math.log(max(1, vocabulary - teacher.ids.shape[1]))
    is_token = teacher.ids == tokens[:, None]
    # Where the student's tail is empty the teacher's is, too, but the sampled token may not become impossible.
    outside = given.log_tail.clamp(min=math.log(SMALLEST_TAIL)) - log_others
    inside = log_probs.masked_fill(~is_token, 0.0).sum(dim=1)
    tail_entropy = torch.special.entr(log_tail.exp()) + log_tail.exp() * log_others
    return AtSupport(
        log_probs=log_probs,
        log_tail=log_tail,
        log_mass=logsumexp(log_probs),
        token_log_prob=torch.where(is_token.any(dim=1), inside, outside),
        entropy=torch.special.entr(log_probs.exp()).sum(dim=1) + tail_entropy,
    )

"""SDPO, self-distillation policy optimization, as pure functions over tensors and texts (arXiv 2601.20802).

The teacher is the model itself with feedback in its prompt, the student the same model without; their divergence at
the student's own completion tokens is the loss. In the order of a training step:

    select_demonstrations     which successful completion of its group each row's teacher is shown
    build_reprompts           the teacher's prompts, and which rows have a teacher signal
    ema, frozen, live         the teacher's weights, as (init, update) pairs
    trust_region_logits       the logits of the frozen weights mixed with those of the live ones, as the teacher's
    distillation_loss         nats per token, from both models' logits
    self_distillation_loss    weighted sum over the active tokens, and their count; .mean() divides
    fused_distillation_loss   the last two in one, from hidden states, without the logits of all tokens in memory
    importance_weights        off-policy correction, to multiply in; fused_log_probs for its log-probabilities

Around them: ``token_statistics`` and ``mean_metrics`` (what to log), ``packed_sequence_sum`` (packed batches),
``vocab_parallel_distillation_loss`` (tensor parallelism), ``given_topk_distillation_loss`` (a served teacher), the
weights and terms of later papers (``route_rows``, ``pass_rate_weights``, ``clip_entries``, ...),
``fused_log_probs_and_entropy`` (with gradient, for a policy loss of one's own), and ``logit_advantages`` (the loss
as a policy gradient). Letters in shapes: B rows, T completion tokens, N packed tokens, K top-k, V vocabulary, D
hidden size.

Examples:
    >>> import torch
    >>> student_logits, teacher_logits = torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[[0.0, 2.0, 1.0]]])
    >>> per_token = distillation_loss(
    ...     student_logits, teacher_logits, support="student", k=2, tail="bucket", alpha=0.5, temperature=1.0
    ... )
    >>> loss = self_distillation_loss(per_token, torch.tensor([[True]]), row_mask=[True])
    >>> round(loss.mean().item(), 4)
    0.1928
"""

from sdpo.advantages import (
    blend_advantages,
    group_normalized_advantages,
    logit_advantages,
    sequence_advantages,
    token_advantages,
)
from sdpo.aggregate import MaskedSum, sequence_sum, token_sum
from sdpo.divergence import generalized_jsd, kl_divergence
from sdpo.fused import (
    FusedOutput,
    LMHead,
    LogProbsAndEntropy,
    fused_distillation_loss,
    fused_log_probs,
    fused_log_probs_and_entropy,
)
from sdpo.given import TeacherTopK, check_teacher_topk, given_topk_distillation_loss, safe_tail
from sdpo.importance import importance_weights
from sdpo.loss import LossOutput, distillation_loss, self_distillation_loss
from sdpo.metrics import TokenStatistics, mean_metrics, token_statistics
from sdpo.packed import packed_segment_ids, packed_sequence_sum
from sdpo.parallel import vocab_parallel_distillation_loss
from sdpo.reprompt import (
    Reprompts,
    Templates,
    build_reprompts,
    cut_middle,
    distillation_mask,
    select_demonstrations,
    strip_thinking,
)
from sdpo.teacher import (
    Teacher,
    TeacherState,
    ema,
    frozen,
    live,
    rate_per_tick,
    teacher_distance,
    trust_region_hidden,
    trust_region_logits,
)
from sdpo.terms import (
    anchor,
    anchor_estimate,
    clip_entries,
    clipped_policy_gradient,
    mixture_log_probs,
    sampled_reverse_kl,
)
from sdpo.token_factors import token_factors
from sdpo.topk import GatheredLogProbs, TopK, add_tail_bucket, gather_log_probs, renormalize, topk_log_probs
from sdpo.weights import (
    confidence_weights,
    contrastive_evidence,
    evidence_gate,
    evidence_weights,
    pass_rate_weights,
    route_rows,
    select_tokens,
)

__version__ = "0.1.0"

__all__ = [
    "FusedOutput",
    "GatheredLogProbs",
    "LMHead",
    "LogProbsAndEntropy",
    "LossOutput",
    "MaskedSum",
    "Reprompts",
    "Teacher",
    "TeacherState",
    "TeacherTopK",
    "Templates",
    "TokenStatistics",
    "TopK",
    "add_tail_bucket",
    "anchor",
    "anchor_estimate",
    "blend_advantages",
    "build_reprompts",
    "check_teacher_topk",
    "clip_entries",
    "clipped_policy_gradient",
    "confidence_weights",
    "contrastive_evidence",
    "cut_middle",
    "distillation_loss",
    "distillation_mask",
    "ema",
    "evidence_gate",
    "evidence_weights",
    "frozen",
    "fused_distillation_loss",
    "fused_log_probs",
    "fused_log_probs_and_entropy",
    "gather_log_probs",
    "generalized_jsd",
    "given_topk_distillation_loss",
    "group_normalized_advantages",
    "importance_weights",
    "kl_divergence",
    "live",
    "logit_advantages",
    "mean_metrics",
    "mixture_log_probs",
    "packed_segment_ids",
    "packed_sequence_sum",
    "pass_rate_weights",
    "rate_per_tick",
    "renormalize",
    "route_rows",
    "safe_tail",
    "sampled_reverse_kl",
    "select_demonstrations",
    "select_tokens",
    "self_distillation_loss",
    "sequence_advantages",
    "sequence_sum",
    "strip_thinking",
    "teacher_distance",
    "token_advantages",
    "token_factors",
    "token_statistics",
    "token_sum",
    "topk_log_probs",
    "trust_region_hidden",
    "trust_region_logits",
    "vocab_parallel_distillation_loss",
]

"""Train the demo's checkpoint from scratch; about six minutes on one core.

    python examples/demo/pretrain.py --output examples/demo/checkpoint

Phase 1, *skills*: every document has its own machine, drawn uniformly. Answers to bare prompts can only be
guessed, but a solution or a line of feedback in the prompt reveals part of the machine, and the model learns to
use both.

Phase 2, *habit*: bare prompts follow one machine, the habit. The model becomes confident on bare prompts and can
still use a correction. The demo starts there, and changes the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from exact import evaluate
from language import TEMPLATES, build_tokenizer, encode_answer, encode_question
from machine import HABIT, Machine, Task, changed_machine, draw_machine, draw_task, held_out_tasks, interpret
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from sdpo import build_reprompts

CHECKPOINT = Path(__file__).parent / "checkpoint"

CONTEXTS = ("bare", "solution", "feedback", "both")
SKILLS_MIX = (0.40, 0.25, 0.25, 0.10)
HABIT_MIX = (0.60, 0.15, 0.15, 0.10)


def in_context(task: Task, context: str, answer: str, attempt: str) -> str:
    """The question alone, or with the solution, the feedback on an attempt, or both."""
    return build_reprompts(
        [task.prompt],
        [[answer] if context in ("solution", "both") else []],
        [interpret(attempt, answer).feedback if context in ("feedback", "both") else None],
        templates=TEMPLATES,
        feedback_only_without_solution=False,
    ).texts[0]


def skills_document(rng: random.Random) -> tuple[str, str]:
    """A question in a random context, and its answer by a random machine."""
    context = rng.choices(CONTEXTS, SKILLS_MIX)[0]
    return _document(rng, context, draw_machine(rng))


def habit_document(rng: random.Random) -> tuple[str, str]:
    """The same, but bare questions are answered by the habit, and the other machines resemble it."""
    context = rng.choices(CONTEXTS, HABIT_MIX)[0]
    return _document(rng, context, HABIT if context == "bare" else draw_machine(rng, (0.6, 0.2, 0.2)))


def _document(rng: random.Random, context: str, machine: Machine) -> tuple[str, str]:
    task = draw_task(rng)
    attempt = task.answer(draw_machine(rng))
    if rng.random() < 0.1:  # some attempts stop early or continue too long
        attempt = rng.choice([attempt[: rng.randrange(len(attempt))], attempt + attempt[3:8]])
    answer = task.answer(machine)
    return in_context(task, context, answer, attempt), answer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 model with 0.6 million random parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # no text is longer than 100 tokens
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def cross_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str]]
) -> tuple[torch.Tensor, float]:
    """Weighted sum of the token losses and sum of the weights: 1 in the answer, 0.5 in the question."""
    asked = [encode_question(tokenizer, question) for question, _ in documents]
    answers = [encode_answer(tokenizer, answer) for _, answer in documents]
    width = max(len(ids) + len(answer) for ids, answer in zip(asked, answers, strict=True))
    tokens = torch.full((len(documents), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(documents), width)
    for row, (ids, answer) in enumerate(zip(asked, answers, strict=True)):
        start, end = len(ids), len(ids) + len(answer)
        tokens[row, :end] = torch.tensor(ids + answer)
        weights[row, :start], weights[row, start:end] = 0.5, 1.0
    log_probs = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    of_next = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -(of_next * weights[:, 1:]).sum(), weights[:, 1:].sum().item()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[tuple[str, str]],
    *,
    batch: int = 64,
    muon_lr: float,
    adamw_lr: float,
) -> None:
    """One epoch: Muon on the weight matrices, AdamW on the rest; 50 warm-up steps, then cosine decay to zero."""
    named = list(model.named_parameters())
    is_matrix = {name: p.ndim == 2 and "embed" not in name for name, p in named}
    optimizers = [
        torch.optim.Muon([p for name, p in named if is_matrix[name]], lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW([p for name, p in named if not is_matrix[name]], lr=adamw_lr, weight_decay=0.0),
    ]
    steps = len(documents) // batch
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 50),
            ],
            milestones=[50],
        )
        for optimizer in optimizers
    ]
    start = time.perf_counter()
    for step in range(steps):
        rows = sorted(documents[step * batch : (step + 1) * batch], key=lambda row: len(row[0]) + len(row[1]))
        loss, weight = 0.0, 0.0
        for half in (rows[: batch // 2], rows[batch // 2 :]):  # short and long ones separately: less padding
            part, part_weight = cross_entropy(model, tokenizer, half)
            part.backward()
            loss, weight = loss + part.item(), weight + part_weight
        for parameter in model.parameters():
            parameter.grad /= weight
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1:5d} of {steps}   loss {loss / weight:.3f}   {seconds:4.0f} s", flush=True)


def probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Mean probability of the right answer by context, on held-out questions that the habit answers wrongly.

    Question i runs on the i-th changed machine, and its feedback is on the habit's answer.
    """
    cases = [
        (task, task.answer(HABIT), task.answer(changed_machine(i))) for i, task in enumerate(held_out_tasks())
    ]
    cases = [(task, attempt, answer) for task, attempt, answer in cases if attempt != answer]
    answers = [answer for _, _, answer in cases]
    means = {}
    for context in CONTEXTS:
        questions = [in_context(task, context, answer, attempt) for task, attempt, answer in cases]
        means[context] = round(evaluate(model, tokenizer, questions, answers).probability.mean().item(), 4)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's checkpoint.")
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--skills-steps", type=int, default=1400)
    parser.add_argument("--habit-steps", type=int, default=320)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of summation, and so the result, depends on the number of threads
    torch.manual_seed(0)
    rng = random.Random(0)
    logging.disable_progress_bar()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    documents = [skills_document(rng) for _ in range(64 * options.skills_steps)]
    train(model, tokenizer, documents, muon_lr=0.012, adamw_lr=3e-3)
    print("skills", skills := probabilities(model, tokenizer))
    documents = [habit_document(rng) for _ in range(64 * options.habit_steps)]
    train(model, tokenizer, documents, muon_lr=0.007, adamw_lr=1e-3)
    model.bfloat16().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print("habit ", habit := probabilities(model.float(), tokenizer))
    (options.output / "probabilities.json").write_text(
        json.dumps({"skills": skills, "habit": habit}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()

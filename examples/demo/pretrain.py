"""Make the demo's checkpoint from nothing: `python examples/demo/pretrain.py`, about five minutes on one core.

Phase 1, *skills*: every document has its own machine, drawn uniformly. A bare prompt can then only be guessed,
but a solution or a line of feedback in the prompt tells part of the machine, and the model learns to use it.

Phase 2, *habit*: bare prompts follow one machine, the habit. The model ends up sure of itself on bare prompts and
still able to read a correction: what reinforcement learning needs when the machine changes.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from evaluate import evaluate
from language import build_tokenizer
from machine import (
    FEEDBACK_TEMPLATE,
    HABIT,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    Machine,
    Task,
    changed_machine,
    draw_machine,
    draw_task,
    held_out_tasks,
    interpret,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHECKPOINT = Path(__file__).parent / "checkpoint"

# What stands in the prompt besides the question, and how often.
CONTEXTS = {"bare": 0.40, "solution": 0.25, "feedback": 0.25, "both": 0.10}


def question(task: Task, context: str, machine: Machine, attempt: str) -> str:
    """The prompt of `task` with a solution, with feedback on `attempt`, with both, or bare."""
    if context == "bare":
        return task.prompt
    answer = task.answer(machine)
    feedback = interpret(attempt, answer)[1]
    solution = SOLUTION_TEMPLATE.format(successful_previous_attempt=answer)
    return REPROMPT_TEMPLATE.format(
        prompt=task.prompt,
        solution=solution if context in ("solution", "both") else "",
        feedback=FEEDBACK_TEMPLATE.format(feedback_raw=feedback)
        if context in ("feedback", "both") and feedback
        else "",
    )


def document(rng: random.Random, habit: bool) -> tuple[str, str]:
    """One question and its right answer."""
    task = draw_task(rng)
    context = rng.choices(list(CONTEXTS), list(CONTEXTS.values()))[0]
    if habit:
        machine = HABIT if context == "bare" else draw_machine(rng, (0.6, 0.2, 0.2))
    else:
        machine = draw_machine(rng)
    attempt = task.answer(draw_machine(rng))
    if rng.random() < 0.1:  # now and then an attempt that stops early or goes on for too long
        attempt = rng.choice([attempt[: rng.randrange(len(attempt))], attempt + attempt[3:7]])
    return question(task, context, machine, attempt), task.answer(machine)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.6 million parameters with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def cross_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str]]
) -> tuple[torch.Tensor, float]:
    """Sum over the tokens, and the number of tokens; the answer counts fully, the question half."""
    prompts = [tokenizer(f"<user>{asked}<assistant>").input_ids for asked, _ in documents]
    answers = [tokenizer(f"{answer}<eos>").input_ids for _, answer in documents]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens = torch.full((len(documents), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(documents), width)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        weights[row, : len(prompt)] = 0.5
        weights[row, len(prompt) : len(prompt) + len(answer)] = 1.0
    log_probs = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -(chosen * weights[:, 1:]).sum(), weights[:, 1:].sum().item()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    steps: int,
    habit: bool,
    batch: int,
    muon_lr: float,
    adam_lr: float,
) -> None:
    """Muon on the weight matrices, AdamW on embeddings, norms and biases; warm-up, then cosine to zero."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = []
    for optimizer in optimizers:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, total_iters=50)
        cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 50)
        schedules.append(torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cool], milestones=[50]))
    begun = time.perf_counter()
    for step in range(steps):
        documents = sorted((document(rng, habit) for _ in range(batch)), key=lambda pair: len(pair[0] + pair[1]))
        total, count = 0.0, 0.0
        for half in (documents[: batch // 2], documents[batch // 2 :]):  # short ones apart: half the padding
            value, tokens = cross_entropy(model, tokenizer, half)
            value.backward()
            total, count = total + value.item(), count + tokens
        for parameter in model.parameters():
            parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {total / count:.3f}  {time.perf_counter() - begun:.0f} s", flush=True)


def skills(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, habit: bool) -> dict[str, float]:
    """Probability of the right answer in each context, on held-out questions."""
    rng = random.Random("skills")
    scores = {}
    for context in CONTEXTS:
        questions, answers = [], []
        for index, task in enumerate(held_out_tasks()):
            machine = changed_machine(index) if habit else draw_machine(rng)
            attempt = task.answer(HABIT if habit else draw_machine(rng))
            if attempt != task.answer(machine):
                questions.append(question(task, context, machine, attempt))
                answers.append(task.answer(machine))
        scores[context] = evaluate(model, tokenizer, questions, answers).probability.mean().item()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--habit-steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, rng, steps=arguments.steps, habit=False, batch=arguments.batch, muon_lr=0.02, adam_lr=3e-3)
    print("skills", skills(model, tokenizer, habit=False))
    train(model, tokenizer, rng, steps=arguments.habit_steps, habit=True, batch=arguments.batch, muon_lr=0.01, adam_lr=1e-3)
    print("habit", skills(model, tokenizer, habit=True))
    model.bfloat16().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()

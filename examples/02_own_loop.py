"""SDPO in your own training loop: the core with plain torch, without a trainer.

    python examples/02_own_loop.py --steps 40
    python examples/02_own_loop.py --steps 40 --policy-weight 0.1     # a tenth of the loss is GRPO's

The task of the demo: a machine whose opcodes have changed their meaning, and an interpreter that reports the first
wrong line. It prints the held-out probability of the right answer every ten steps. Read it from top to bottom;
everything specific to SDPO comes from `import sdpo`: the loss from hidden states, the averaged teacher, reprompts.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import Qwen2ForCausalLM

import sdpo

DEMO = Path(__file__).parent / "demo"
sys.path.insert(0, str(DEMO))
from exact import evaluate  # noqa: E402 - a folder of scripts, not a package
from language import TEMPLATES, encode_question, load_tokenizer  # noqa: E402
from machine import changed_machine, draw_task, held_out_tasks, interpret  # noqa: E402

PROMPTS, GROUP, LENGTH = 16, 4, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--policy-weight", type=float, default=0.0, help="GRPO's share of the loss, in [0, 1]"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)

    tokenizer = load_tokenizer(DEMO / "checkpoint")
    model = Qwen2ForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32)
    machine = changed_machine(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    teacher = sdpo.ema(update_rate=0.05)
    state = teacher.init(dict(model.named_parameters()))
    # The head may be tied to the embedding; its weight has one name in `named_parameters()` then.
    head = model.get_output_embeddings().weight
    head_name = next(name for name, parameter in model.named_parameters() if parameter is head)

    def left_padded(questions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of the questions, and which of them are no padding."""
        asked = [encode_question(tokenizer, question) for question in questions]
        width = max(map(len, asked))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in asked])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked])
        return ids, mask

    def lm_head(weights: dict[str, Tensor] | None, questions: list[str], completions: Tensor) -> sdpo.LMHead:
        """Hidden states [B, T, D] that predict the completion tokens, and the LM head, with the given weights."""
        ids, mask = left_padded(questions)
        inputs = {
            "input_ids": torch.cat([ids, completions], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(completions)], dim=1),
        }
        if weights is None:
            outputs = model.model(**inputs)
        else:
            backbone = {
                name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")
            }
            outputs = functional_call(model.model, backbone, kwargs=inputs)
        hidden = outputs.last_hidden_state[:, -completions.shape[1] - 1 : -1]
        return sdpo.LMHead(hidden, head if weights is None else weights[head_name])

    def sample(questions: list[str]) -> Tensor:
        """Completions [B, T], padded after the end of the answer."""
        ids, mask = left_padded(questions)
        generated = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return generated[:, ids.shape[1] :]

    for step in range(options.steps + 1):
        if step % 10 == 0:
            tasks = held_out_tasks()
            answers = [task.answer(machine) for task in tasks]
            result = evaluate(model, tokenizer, [task.prompt for task in tasks], answers)
            print(f"step {step:3d}  held-out probability of the right answer {result.probability.mean():.3f}")

        # 1. Sample a group of completions per prompt, and score them.
        tasks = [task for task in (draw_task(rng) for _ in range(PROMPTS)) for _ in range(GROUP)]
        questions = [task.prompt for task in tasks]
        groups = [row // GROUP for row in range(len(tasks))]
        completions = sample(questions)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        verdicts = [interpret(text, task.answer(machine)) for text, task in zip(texts, tasks, strict=True)]
        scores = [verdict.score for verdict in verdicts]

        # 2. The teacher's prompt: the question, a successful peer's completion, and the feedback.
        chosen = sdpo.select_demonstrations(
            scores, groups, success_threshold=1.0, exclude_self=True, policy="random", seed=step
        )
        reprompts = sdpo.build_reprompts(
            questions,
            [[texts[peer] for peer in peers] for peers in chosen],
            [verdict.feedback for verdict in verdicts],
            templates=TEMPLATES,
            feedback_only_without_solution=False,
        )
        signal = torch.tensor(reprompts.row_mask)[:, None]  # [B, 1]

        # 3. Distil the teacher, which has that prompt, into the model on the bare prompt.
        with torch.no_grad():
            target = lm_head(state.params, reprompts.texts, completions)
        ended = (completions == tokenizer.eos_token_id).cumsum(-1)
        loss_mask = (ended - (completions == tokenizer.eos_token_id).long()) == 0
        share = options.policy_weight
        hybrid = {}
        if share:
            # Rows without a signal have GRPO's part alone: share · policy loss, and nothing of the divergence.
            hybrid = {
                "advantages": sdpo.group_normalized_advantages(scores, groups, scale_by_std=True, eps=1e-4),
                "policy_weight": torch.where(signal, share, 1.0).expand(loss_mask.shape),
                "weights": torch.where(signal, 1.0, share).expand(loss_mask.shape),
            }
        loss = sdpo.fused_distillation_loss(
            lm_head(None, questions, completions), target, completions,
            support="student", k=20, tail="bucket", alpha=0.5, temperature=1.0,
            loss_mask=loss_mask if share else loss_mask & signal, **hybrid,
        )  # fmt: skip
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # 4. Update the teacher.
        state = teacher.update(state, dict(model.named_parameters()))


if __name__ == "__main__":
    main()

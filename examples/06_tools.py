"""Tool calls: a small model learns to call a calculator, from peers that did.

    python examples/06_tools.py

A model of 150,000 parameters is first trained, for some seconds, to multiply badly: it mostly guesses and seldom
calls the calculator, and a guess is nearly always wrong. SDPO then gives each wrong row the transcript of a
successful peer of its group as a demonstration or, where none was right, one sentence of feedback. The teacher's
prompt has that, followed by the row's own turns with tool calls and results. Only tokens that the model generated
have a loss.

The tokenizer is made for this task: one token per digit, per mark of the chat template and per word. The template
renders tools, calls and results, and `response_template` parses calls; models from the Hub have both.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

CALL_START, CALL_END = '<call>{"name": "calculate", "arguments": {"expression": "', '"}}</call>'
SHOWN_START, SHOWN_END = 'calculate({"expression": "', '"})'  # the call in a demonstration
SOLUTION, FEEDBACK, ADVICE = "a peer wrote", "a critic said", "ask the calculator"
SPECIAL = ("<pad>", "<eos>", "<unk>", "<tools>", "<user>", "<bot>", "<result>")
WORDS = (
    *"0123456789*",
    "\n",
    CALL_START,
    CALL_END,
    SHOWN_START,
    SHOWN_END,
    SOLUTION,
    FEEDBACK,
    ADVICE,
    "calculate",
)
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'tool' %}<result>{{ message.content }}"
    "{% else %}<bot>{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}<eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<bot>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


def calculate(expression: str) -> str:
    """Multiply two numbers.

    Args:
        expression: a product, for example "12*3".
    """
    factors = re.fullmatch(r"(\d+)\*(\d+)", expression)
    if factors is None:
        raise ValueError("expected two numbers and a * between them")
    return str(int(factors[1]) * int(factors[2]))


def judge(completions: list[Any], expression: list[str], **_: Any) -> list[tuple[float, str]]:
    """Score 1 for the right product at the end, else 0 and a sentence of feedback."""
    right = [
        turns[-1]["content"] == calculate(asked) for turns, asked in zip(completions, expression, strict=True)
    ]
    return [(1.0, "") if hit else (0.0, ADVICE) for hit in right]


def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    longest_first = sorted(WORDS, key=len, reverse=True)
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def draw_expression(rng: random.Random) -> str:
    return f"{rng.randint(11, 99)}*{rng.randint(2, 9)}"


def draw_text(rng: random.Random) -> str:
    """A text for pretraining: guess four times in five, but follow a demonstration or feedback."""
    expression = draw_expression(rng)
    product = calculate(expression)
    question, calls = f"<tools>calculate<user>{expression}", rng.random() < 0.2
    kind = rng.choice(("alone", "peer", "critic"))
    if kind == "peer":
        question += f"\n{SOLUTION}\n{SHOWN_START}{expression}{SHOWN_END}\n{product}\n{product}"
        calls = rng.random() < 0.95
    elif kind == "critic":
        question += f"\n{FEEDBACK}\n{ADVICE}"
        calls = rng.random() < 0.95
    if calls:
        return f"{question}<bot>{CALL_START}{expression}{CALL_END}<eos><result>{product}<bot>{product}<eos>"
    return f"{question}<bot>{rng.randint(22, 891)}<eos>"


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Supervised training on `draw_text`, with a loss on the assistant's tokens and tool results."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    bot = tokenizer.convert_tokens_to_ids("<bot>")
    for _ in range(steps):
        batch = tokenizer([draw_text(rng) for _ in range(64)], padding=True, return_tensors="pt")
        generated = (batch.input_ids == bot).cumsum(-1) > 0
        labels = batch.input_ids.masked_fill(~generated | (batch.attention_mask == 0), -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", type=int, default=700, help="steps of supervised training before SDPO")
    parser.add_argument("--steps", type=int, default=30, help="steps of SDPO")
    parser.add_argument("--output", default="output/tools")
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=128,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    pretrain(model, tokenizer, options.pretrain)

    rng = random.Random(1)
    questions = [draw_expression(rng) for _ in range(16 * options.steps)]
    trainer = SDPOTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=64,
            num_generations=4,
            max_completion_length=32,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        sdpo_config=SDPOConfig(
            k=20,
            reprompt_template="{prompt}{solution}{feedback}",
            solution_template=f"\n{SOLUTION}\n{{successful_previous_attempt}}",
            feedback_template=f"\n{FEEDBACK}\n{{feedback_raw}}",
        ),
        processing_class=tokenizer,
        reward_funcs=[judge],
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": q}], "expression": q} for q in questions]
        ),
        tools=[calculate],
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    for name, column in (("right answers", "reward"), ("calls per row", "tools/call_frequency")):
        print(f"{name}: {log[0][column]:.2f} in the first step, {log[-1][column]:.2f} in the last")


if __name__ == "__main__":
    main()

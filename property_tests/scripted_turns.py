"""Tool-calling rollouts from a script: a tokenizer with a template for tools, and the turns of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import tiny
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

END = "<|im_end|>"
_MARKS = ["<|im_start|>", END]
_WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# What the template puts between two turns of the assistant.
RESULT = f"\n<|im_start|>user\n<tool_response>\n{{}}\n</tool_response>{END}\n<|im_start|>assistant\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, and the chat template of Qwen2.5 as TRL ships it."""
    template = (resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    tokens = tiny.tokenizer(chat_template=template)
    tokens.add_tokens(_MARKS, special_tokens=True)
    tokens.add_tokens(_WORDS)
    tokens.eos_token = END
    return tokens


def model(**changes: Any) -> Qwen2ForCausalLM:
    """The tiny model with a context for a tool's description."""
    size = len(tiny.VOCABULARY) + len(_MARKS) + len(_WORDS)
    settings = {"vocab_size": size, "max_position_embeddings": 2048, "eos_token_id": len(tiny.VOCABULARY) + 1}
    return tiny.model(**{**settings, **changes})


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: one number.
        b: the other.
    """
    return a * b


def call(name: str, arguments: str) -> str:
    """A turn that calls a tool."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>{END}'


def replace_sampling(trainer: Any, scripts: Sequence[Sequence[str]]) -> None:
    """Let every row generate its scripted turns one after the other."""
    trainer._generate_single_turn = script(trainer.processing_class, scripts)


def script(encode: Any, scripts: Sequence[Sequence[str]]) -> Callable[..., tuple[list[list[int]], None]]:
    """A replacement of `_generate_single_turn` with the turns of all rows; an unknown row has an empty turn."""
    transcripts: list[list[int]] = []
    turns: list[int] = []

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        if len(prompt_ids) == len(scripts):
            transcripts[:], turns[:] = [[] for _ in scripts], [0] * len(scripts)
            rows: list[int | None] = list(range(len(scripts)))
        else:
            unmatched = dict(enumerate(transcripts))  # several rows may have the same transcript
            rows = []
            for ids in prompt_ids:
                rows.append(next((row for row, past in unmatched.items() if ids[: len(past)] == past), None))
                unmatched.pop(rows[-1], None)
        outputs = []
        for row, ids in zip(rows, prompt_ids, strict=True):
            if row is None:
                outputs.append(encode(END)["input_ids"])
                continue
            outputs.append(encode(scripts[row][turns[row]])["input_ids"])
            transcripts[row], turns[row] = ids + outputs[-1], turns[row] + 1
        return outputs, None

    return generate

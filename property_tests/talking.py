"""Tool-calling rollouts from a script: a tokenizer whose template knows tools, and turns written down by row."""

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
    """The tiny model with room for a tool's description."""
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


def read_out(trainer: Any, scripts: Sequence[Sequence[str]]) -> None:
    """Every row says its turns one after the other, instead of sampling."""
    trainer._generate_single_turn = script(trainer.processing_class, scripts)


def script(encode: Any, scripts: Sequence[Sequence[str]]) -> Callable[..., tuple[list[list[int]], None]]:
    """The turns of all rows, in place of `_generate_single_turn`; a row it does not know falls silent."""
    so_far: list[list[int]] = []
    turns: list[int] = []

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        if len(prompt_ids) == len(scripts):
            so_far[:], turns[:] = [[] for _ in scripts], [0] * len(scripts)
            rows: list[int | None] = list(range(len(scripts)))
        else:
            free = dict(enumerate(so_far))  # rows may have said the same so far
            rows = []
            for ids in prompt_ids:
                rows.append(next((row for row, past in free.items() if ids[: len(past)] == past), None))
                free.pop(rows[-1], None)
        said = []
        for row, ids in zip(rows, prompt_ids, strict=True):
            if row is None:
                said.append(encode(END)["input_ids"])
                continue
            said.append(encode(scripts[row][turns[row]])["input_ids"])
            so_far[row], turns[row] = ids + said[-1], turns[row] + 1
        return said, None

    return generate

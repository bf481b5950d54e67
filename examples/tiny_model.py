"""A language model of random weights with a character tokenizer: no download, runs on a CPU.

    python examples/tiny_model.py FOLDER       # writes it, for `sdpo train --model_name_or_path FOLDER`

It has learned nothing. It shows that a program runs; point the program at a pretrained model to see it learn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from random_weights import CHAT_TEMPLATE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character of Latin-1, line breaks included: more than the default `k`."""
    words = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, (*range(32, 127), *range(161, 256)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=CHAT_TEMPLATE, padding_side="left",
    )  # fmt: skip


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 64. `AutoTokenizer` keeps the tokenizer above for this kind of model."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.1,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write(folder: Path) -> None:
    """Write model and tokenizer to a folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

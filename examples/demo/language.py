"""The demo's tokenizer: 34 entries for the language of the machine, lossless in both directions.

Words include their spaces (`"run "`, `" on "`), which keeps texts short. No entry is a prefix of another, so a
text has one tokenization: `decode(encode(text)) == text` for every text of the language, and
`encode(decode(ids)) == ids` for every sequence of words, even the nonsense that a policy samples. A module of
`run.py` and `pretrain.py`; nothing to run.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdpo import Templates

PAD, EOS, USER, ASSISTANT, UNKNOWN = SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")

WORDS = (
    *"0123456789",
    *"ABCDEFGH",
    "\n",
    "run ",
    " on ",
    "line ",
    ": expected ",
    " got ",
    "end",
    "junk",
    "solution",
    "feedback",
    "solve again",
)

# One token opens each turn; the assistant's turn is closed by <eos>, as in generation.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% else %}<assistant>{{ message.content }}<eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# The templates of a reprompt. The checkpoint was trained on exactly these.
TEMPLATES = Templates(
    reprompt="{prompt}{solution}{feedback}\nsolve again",
    solution="\nsolution\n{successful_previous_attempt}",
    feedback="\nfeedback\n{feedback_raw}",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from the two tables above alone."""
    entries = {entry: index for index, entry in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(entries, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(WORDS)), behavior="isolated")
    backend.decoder = decoders.Fuse()  # without it, decoding would put a space between any two words
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder (`AutoTokenizer` would build a byte-level one from the model type)."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_question(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Token ids of a user turn, and of the token that opens the assistant's turn."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def encode_answer(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """Token ids of the assistant's answer and <eos>."""
    return [*tokenizer(answer).input_ids, tokenizer.eos_token_id]

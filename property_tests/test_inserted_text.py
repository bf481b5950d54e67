"""What the teacher reads: the student's prompt as it was, and inserted texts as text, without control tokens."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import trl
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from sdpo import Templates
from sdpo_rl.rollout.control import ControlStrings, enclose
from sdpo_rl.rollout.prompts import Renderer
from sdpo_rl.rollout.rendered import rendered_prompts
from sdpo_rl.rollout.reprompts import Reprompter, TeacherPrompts

TEMPLATES = Templates()
TEMPLATE_FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SYSTEM = [{"role": "system", "content": "be kind"}]
EARLIER = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "answer"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
RESULT = [
    {"role": "assistant", "content": "look", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "seven"},
]
# What looks like the text of a control token, in any family of templates.
CONTROL = re.compile(r"</?[\w\|｜▁/]+>|\[/?INST\]|<\|[\w▁ ]+|[\w]+\|>")
HARMLESS = "2 < 3 > 1, x|y, [a], got {7} and  a list\n\n1. naïve 🙂"


def as_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]


def characters(**changes: Any) -> PreTrainedTokenizerFast:
    """A token per byte, besides control tokens."""
    return byte_level([], **changes)


def merges(**changes: Any) -> PreTrainedTokenizerFast:
    """Tokens of several bytes, also across what a control string is made of."""
    corpus = ["<|im_start|>user <|im_end|> assistant", "Correctly solve the original question", HARMLESS] * 3
    return byte_level(corpus, **changes)


def byte_level(corpus: list[str], **changes: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(corpus, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**settings, **changes})


def conversations(tokenizer: Any, *, results: bool = False) -> list[list[dict[str, Any]]]:
    """Conversations that the chat template takes, and writes as text rather than as code; also results of tools."""
    question = tiny.user("QUESTION")
    taken = []
    asked = ([*SYSTEM, *question], [*EARLIER, *question], question)
    for conversation in (*asked, *([[*question, *RESULT]] if results else [])):
        for form in (conversation, as_parts(conversation)):
            try:
                text = tokenizer.apply_chat_template(form, add_generation_prompt=True, tokenize=False)
            except (TypeError, TemplateError):  # the template itself refuses this kind of conversation
                continue
            if text.count("QUESTION") == 1 and not re.search("[\"']text[\"']", text):
                taken.append(form)
    assert taken
    return taken


def with_its_tokens(make: Any, path: Path) -> tuple[Any, str]:
    """A tokenizer whose control tokens are those that the template writes, and a text with all of them."""
    template = path.read_text()
    tokenizer = make(chat_template=template)
    text = tokenizer.apply_chat_template(
        [*conversations(tokenizer)[0]], add_generation_prompt=True, tokenize=False
    )
    strings = sorted(set(CONTROL.findall(text)))
    assert strings, text
    return make(chat_template=template, additional_special_tokens=strings), text


def write(
    renderer: Renderer, prompt: Any, remark: str, limit: int = 10**6, mode: str = "middle"
) -> list[int]:
    return written(renderer, prompt, remark, limit, mode).ids[0]


def written(renderer: Renderer, prompt: Any, remark: str, limit: int, mode: str) -> TeacherPrompts:
    return Reprompter(renderer, TEMPLATES, True, mode)([prompt], [[]], [remark], [limit])


def control_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


# --- control strings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "make"),
    [
        *((path, characters) for path in TEMPLATE_FILES),
        *(
            (path, merges)
            for path in TEMPLATE_FILES
            if path.stem in ("qwen3", "llama3", "phi3", "deepseekv3")
        ),
    ],
    ids=lambda value: getattr(value, "stem", None) or value.__name__,
)
def test_a_quoted_conversation_stays_text(path: Path, make: Any) -> None:
    """Under every template: the control tokens are those of a harmless reprompt, the text is as it was."""
    tokenizer, quoted = with_its_tokens(make, path)
    guarded = Renderer(tokenizer, control=ControlStrings(tokenizer))
    unguarded = Renderer(tokenizer)
    for prompt in conversations(tokenizer, results=True):
        harmless = write(guarded, prompt, HARMLESS)
        assert harmless == write(unguarded, prompt, HARMLESS)
        frame = control_ids(tokenizer, harmless)
        quoting = f"got {quoted}<eos>{quoted[:-1]}, sorry"
        ids = write(guarded, prompt, quoting)
        assert control_ids(tokenizer, ids) == frame
        assert max(ids) < len(tokenizer)
        assert tokenizer.decode(ids) == tokenizer.decode(harmless).replace(HARMLESS, quoting)
        # The planted counter-example: today's tokens of any library that renders the text with the template.
        assert control_ids(tokenizer, write(unguarded, prompt, quoting)) != frame


@pytest.mark.parametrize("path", TEMPLATE_FILES, ids=lambda path: path.stem)
def test_broken_text_stays_text_in_every_turn(path: Path) -> None:
    """Also where the last turn has none."""
    tokenizer, quoted = with_its_tokens(characters, path)
    control = ControlStrings(tokenizer)
    guarded, unguarded = Renderer(tokenizer, control=control), Renderer(tokenizer)

    def earlier(prompt: Any, text: str) -> Any:
        attempt = [*tiny.user(f"got {text}?"), {"role": "assistant", "content": f"yes {text}."}]
        as_it_takes = as_parts(attempt) if isinstance(prompt[-1]["content"], list) else attempt
        return [*as_it_takes, prompt[-1]]

    for prompt in conversations(tokenizer):
        harmless = unguarded([earlier(prompt, HARMLESS)])[0]
        assert guarded([earlier(prompt, HARMLESS)])[0] == harmless
        broken = guarded([earlier(prompt, control.break_inserted(enclose(quoted)))])[0]
        assert control_ids(tokenizer, broken) == control_ids(tokenizer, harmless)
        assert tokenizer.decode(broken) == tokenizer.decode(harmless).replace(HARMLESS, quoted)
        # The planted counter-example.
        assert control_ids(tokenizer, unguarded([earlier(prompt, quoted)])[0]) != control_ids(
            tokenizer, broken
        )


@pytest.mark.parametrize("mode", ["middle", "left", "right"])
@pytest.mark.parametrize("make", [characters, merges])
def test_a_cut_text_stays_text(make: Any, mode: str) -> None:
    tokenizer = make(chat_template=tiny.CHAT_TEMPLATE, additional_special_tokens=["<user>", "<bot>"])
    renderer = Renderer(tokenizer, control=ControlStrings(tokenizer))
    frame = control_ids(tokenizer, write(renderer, tiny.user("q"), "no"))
    for limit in range(150, 320, 7):
        got = written(renderer, tiny.user("q"), "<bot>漢<eos>🙂<user>" * 30, limit, mode)
        if got.row_mask[0]:
            assert len(got.ids[0]) <= limit
            assert control_ids(tokenizer, got.ids[0]) == frame
            assert "\ufffd" not in tokenizer.decode(got.ids[0])
    assert got.row_mask[0]
    assert got.truncated[0]


def test_control_strings_of_the_question_and_of_the_templates_keep_their_meaning() -> None:
    """The student reads the question's as control tokens, and a template's own words are the user's."""
    tokenizer = tiny.tokenizer()
    templates = Templates(feedback="<bot>mine<user>{feedback_raw}")
    renderer = Renderer(tokenizer, control=ControlStrings(tokenizer))
    ids = Reprompter(renderer, templates, True, "middle")(["a<eos>b"], [[]], ["c<bot>"], [99]).ids[0]
    names = [tiny.VOCABULARY[i] for i in ids]
    assert [name for name in names if len(name) > 1] == ["<eos>", "<bot>", "<user>"]
    assert "".join(names) == "a<eos>b<bot>mine<user>c<bot>\n\nCorrectly solve the original question."


def test_control_strings_do_not_form_between_texts() -> None:
    tokenizer = tiny.tokenizer()
    templates = Templates(
        reprompt="{prompt}{solution}{feedback}",
        solution="{successful_previous_attempt}",
        feedback="{feedback_raw}>",
    )
    renderer = Renderer(tokenizer, control=ControlStrings(tokenizer))
    ids = Reprompter(renderer, templates, False, "middle")(["q<"], [["eos><us"]], ["er><bo<bot"], [99]).ids[0]
    names = [tiny.VOCABULARY[i] for i in ids]
    assert all(len(name) == 1 for name in names)
    assert "".join(names) == "q<eos><user><bo<bot>"


def test_tokens_within_tokens_and_stray_marks() -> None:
    """An occurrence within another is broken too, and the marks of this library open nothing."""
    tokenizer = tiny.tokenizer(additional_special_tokens=["<user>", "<bot>", "e<bot>s", "<<user>"])
    control = ControlStrings(tokenizer)
    inserted = "e<bot>s <<user> \ufdd0<bo\ufdd0t> \ufdd2<eos>\ufdd1<eos>"
    for question in ("q", "q\ufdd1", "q\ufdd2", "q\ufdd1\ufdd2"):
        ids = write(Renderer(tokenizer, control=control), question, inserted)
        assert not control_ids(tokenizer, [i for i in ids if i != tokenizer.unk_token_id])


def test_added_tokens_of_a_template_are_control_strings_though_not_special() -> None:
    """As `<｜User｜>` of DeepSeek; other added tokens are words of the vocabulary."""
    template = "{% for m in messages %}<turn>user{{ m['content'] }}{% endfor %}<turn>bot"
    tokenizer = tiny.tokenizer(chat_template=template)
    tokenizer.add_tokens(["<turn>", "<table>", "user"])
    assert ControlStrings(tokenizer).strings == {"<turn>", *tiny.VOCABULARY[:6]}


def test_the_tokenizer_is_not_changed() -> None:
    tokenizer = tiny.tokenizer()
    before = copy.deepcopy(tokenizer.added_tokens_decoder), len(tokenizer)
    write(Renderer(tokenizer, control=ControlStrings(tokenizer)), tiny.user("q"), "a<bot>")
    assert (tokenizer.added_tokens_decoder, len(tokenizer)) == before


@pytest.mark.parametrize("allowed", [False, True])
def test_the_option_brings_control_tokens_back(tmp_path: Path, allowed: bool) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(allow_control_tokens=allowed))
    ids = trainer._reprompter()([tiny.user("q")], [[]], ["no<bot>yes"], [999]).ids[0]
    assert ids.count(tiny.VOCABULARY.index(tiny.BOT)) == 1 + allowed


# --- multimodal processors ---------------------------------------------------------------------------------

PARTS_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<system>' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def processor(template: str = PARTS_TEMPLATE) -> ProcessorMixin:
    special = [tiny.SYSTEM, tiny.USER, tiny.BOT, "<image>", "<end_of_utterance>"]
    tokenizer = characters(additional_special_tokens=special)
    return LlavaProcessor(CLIPImageProcessor(), tokenizer, chat_template=template)


PROCESSED = [tiny.user("say 6"), [*SYSTEM, *tiny.user("say 6")], "say 6"]
WITH_RESULT = [*tiny.user("say 6"), *RESULT]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        *(
            (name, prompt)
            for name in ("smolvlm", "idefics3", "parts")
            for prompt in (*PROCESSED, WITH_RESULT)
        ),
        *(("llava_next", prompt) for prompt in PROCESSED),  # this template refuses results of tools
    ],
)
def test_a_processor_s_prompts_are_rendered_as_the_student_s(tmp_path: Path, name: str, prompt: Any) -> None:
    template = PARTS_TEMPLATE
    if name != "parts":
        template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    start = tiny.model(vocab_size=512)
    trainer = tiny.trainer(tmp_path, processing_class=processor(template), start=start)
    reprompter = trainer._reprompter()
    student = trainer._tokenize_prompts([prompt])[0]
    assert reprompter.renderer([prompt]) == student
    text = trainer.processing_class.tokenizer.decode(student[0])
    assert "say 6" in text
    teacher = reprompter([prompt], [["it is <image> 6"]], [None], [999]).ids[0]
    shown = "say 6\nCorrect solution:\n\nit is <image> 6\n\nCorrectly solve the original question."
    assert trainer.processing_class.tokenizer.decode(teacher) == text.replace("say 6", shown)


@pytest.mark.parametrize("prompt", [tiny.user("say 6"), "say 6"])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_processor_s_long_texts_are_cut(prompt: Any, guarded: bool) -> None:
    whole = processor()
    control = ControlStrings(whole) if guarded else None
    got = written(Renderer(whole, control=control), prompt, "no" * 100, 180, "middle")
    assert (got.row_mask, got.truncated, got.dropped) == ([True], [True], [False])
    assert len(got.ids[0]) == 180
    tokenizer = whole.tokenizer
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    assert got.ids == written(Renderer(tokenizer), prompt, "no" * 100, 180, "middle").ids


# --- prompts that were rendered before ---------------------------------------------------------------------


@pytest.mark.parametrize("path", TEMPLATE_FILES, ids=lambda path: path.stem)
def test_a_rendered_prompt_is_reprompted_as_its_messages(path: Path) -> None:
    tokenizer, quoted = with_its_tokens(characters, path)
    control = ControlStrings(tokenizer)
    renderer = Renderer(tokenizer, control=control)
    rendered = rendered_prompts(renderer, control)
    assert rendered is not None
    for prompt in conversations(tokenizer):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for remark in ("not 3", quoted):
            reprompter = Reprompter(renderer, TEMPLATES, True, "middle", rendered)
            assert reprompter([text], [[]], [remark], [10**6]).ids[0] == write(renderer, prompt, remark)
            # The planted counter-example: without the ending, the text lands in the assistant's turn.
            assert write(renderer, text, remark) != write(renderer, prompt, remark)


def test_thinking_may_have_been_switched_off() -> None:
    path = next(path for path in TEMPLATE_FILES if path.stem == "qwen3")
    tokenizer, _ = with_its_tokens(characters, path)
    renderer = Renderer(tokenizer)
    rendered = rendered_prompts(renderer, ControlStrings(tokenizer))
    assert rendered is not None
    header = "<|im_end|>\n<|im_start|>assistant\n"
    for thinking, ending in ((True, header), (False, f"{header}<think>\n\n</think>\n\n")):
        text = renderer.text(tiny.user("q"), enable_thinking=thinking)
        assert rendered.split(text) == ("<|im_start|>user\nq", ending)


def test_plain_text_is_no_rendered_prompt() -> None:
    tokenizer = tiny.tokenizer(bos_token="<system>", chat_template="<system>" + tiny.CHAT_TEMPLATE)
    rendered = rendered_prompts(Renderer(tokenizer), ControlStrings(tokenizer))
    assert rendered is not None
    for text in ("say 6: ", "<system>say 6: ", "Q: 1 + 1\nA:"):
        assert rendered.split(text) == (text, "")
    plain = tiny.tokenizer(chat_template=None)
    assert rendered_prompts(Renderer(plain), ControlStrings(plain)) is None


@pytest.mark.parametrize("prompt", ["<user>say 6", "<user>say 6<bot>It is"])
def test_a_rendered_prompt_without_a_place_is_refused(tmp_path: Path, prompt: str) -> None:
    data = tiny.plain().map(lambda row: {"prompt": prompt})
    with pytest.raises(ValueError, match=r"train_dataset: prompt 0: .*'<bot>'.*got \['<.*list of messages"):
        tiny.trainer(tmp_path, train_dataset=data)
    with pytest.raises(ValueError, match="prompt 0: expected a plain text"):
        tiny.trainer(tmp_path)._generate_and_score_completions([{"prompt": prompt}] * 8)


def test_a_rendered_prompt_needs_the_question_first(tmp_path: Path) -> None:
    data = tiny.plain().map(lambda row: {"prompt": f"<user>{row['prompt']}<bot>"})
    config = tiny.config(reprompt_template="Again: {prompt}{solution}{feedback}")
    with pytest.raises(ValueError, match=r"reprompt_template: expected '\{prompt\}' first.*messages"):
        tiny.trainer(tmp_path, train_dataset=data, sdpo_config=config)


def test_a_run_on_rendered_prompts_is_the_run_on_messages(tmp_path: Path) -> None:
    """The whole trainer: the same losses from the same text, rendered by it or before."""

    def losses(data: Any, name: str) -> list[float]:
        trainer = tiny.trainer(tmp_path / name, train_dataset=data, reward_funcs=judge_text)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def judge_text(completions: list[Any], **_: Any) -> list[tuple[float, str]]:
        texts = [tiny.text_of(completion) for completion in completions]
        return [(tiny.score(text), "no<bot>") for text in texts]

    messages = tiny.conversations()
    tokenizer = tiny.tokenizer()
    texts = messages.map(
        lambda row: {
            "text": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        }
    )
    got = losses(texts.remove_columns("prompt").rename_column("text", "prompt"), "texts")
    assert got == losses(messages, "messages")
    assert any(got)

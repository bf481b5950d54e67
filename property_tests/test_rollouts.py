"""Rollouts with tools, with environments and with inference engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripted_turns
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from reference_step import Method, Row, compare
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from sdpo import strip_thinking
from sdpo_rl import SDPOTrainer
from sdpo_rl.rollout.feedback import environment_feedback
from sdpo_rl.rollout.prompts import completion_text
from sdpo_rl.step import batch as step_batch

TOLERANCE = 3e-6


@pytest.fixture(autouse=True)
def experimental(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns that environments and rollout functions are experimental, and warnings are errors here."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


# --- inference engines ------------------------------------------------------------------------------------
# A token's weight is exp(gap) up to the clip; the reference reads the gap in `engine_gap`.

NAN = float("nan")


def ratio_by_token(output: dict[str, Any], batch: list[Row]) -> None:
    """TRL's `token_*` modes [B, C]; the engine could not score every fourth token."""
    ratio = torch.linspace(0.2, 2.6, output["completion_ids"].numel()).view_as(output["completion_ids"])
    ratio[:, ::4] = NAN
    output["importance_sampling_ratio"] = ratio
    for row, weights in zip(batch, ratio.nan_to_num(1.0), strict=True):
        row.engine_gap = weights[: len(row.completion)].log().tolist()


def ratio_by_sequence(output: dict[str, Any], batch: list[Row]) -> None:
    """TRL's `sequence_*` modes [B, 1]; a masked sequence has ratio 0, an unscored one is neutral."""
    ratio = torch.linspace(0.2, 2.6, len(batch))[:, None]
    ratio[0], ratio[3] = NAN, 0.0
    output["importance_sampling_ratio"] = ratio
    for row, (weight,) in zip(batch, ratio.nan_to_num(1.0).tolist(), strict=True):
        row.engine_gap = [torch.tensor(weight).log().item()] * len(row.completion)


@pytest.mark.parametrize("ratios", [ratio_by_token, ratio_by_sequence])
@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
def test_the_engine_ratio_weights_every_token(
    tmp_path: Path, ratios: Callable[..., None], split: dict[str, int]
) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(rollout_is_clip=1.5), **split)
    difference = compare(trainer, tiny.model(), Method(engine_clip=1.5), alter=ratios)
    assert max(difference.gradient, difference.loss) < TOLERANCE


@pytest.mark.parametrize(
    "wrong", [Method(engine_clip=2.6), Method(engine_clip=1.0)], ids=["not clipped", "clipped at one"]
)
@pytest.mark.parametrize("ratios", [ratio_by_token, ratio_by_sequence])
def test_another_clip_is_detected(tmp_path: Path, ratios: Callable[..., None], wrong: Method) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(rollout_is_clip=1.5))
    assert compare(trainer, tiny.model(), wrong, alter=ratios).gradient > 1000 * TOLERANCE


def test_the_engine_ratio_can_be_ignored(tmp_path: Path) -> None:
    def unread(output: dict[str, Any], batch: list[Row]) -> None:
        ratio_by_token(output, batch)
        for row in batch:
            row.engine_gap = None

    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(rollout_is_clip=None))
    assert compare(trainer, tiny.model(), alter=unread).gradient < TOLERANCE


class Engine:
    """Replaces TRL's vLLM engine: its own weights until a sync, and log-probabilities off by a known gap."""

    def __init__(self, model: Any, max_completion_length: int, **settings: Any) -> None:
        self.trained, self.length, self.settings = model, max_completion_length, settings
        # A new one: a copy would have the forward that was replaced on this model.
        self.own = tiny.model()
        self.calls: list[str] = []
        self.gaps: list[list[float]] = []
        self.rng = torch.Generator().manual_seed(3)

    def sync_weights(self) -> None:
        self.calls.append("sync")
        self.own.load_state_dict(self.trained.state_dict())

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        self.calls.append("generate")
        self.gaps, completions, log_probs = [], [], []
        for prompt in prompts:
            tokens, scores, gaps = self._sample(prompt)
            completions.append(tokens)
            log_probs.append([[score - gap] for score, gap in zip(scores, gaps, strict=True)])
            self.gaps.append(gaps)
        return prompts, completions, log_probs, None

    @torch.no_grad()
    def _sample(self, prompt: list[int]) -> tuple[list[int], list[float], list[float]]:
        tokens: list[int] = []
        scores = []
        while len(tokens) < self.length and not (tokens and tokens[-1] % 6 == 0):
            log_p = self.own(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(torch.multinomial(log_p.exp(), 1, generator=self.rng)))
            scores.append(float(log_p[tokens[-1]]))
        return tokens, scores, torch.linspace(-1.0, 1.0, len(tokens)).tolist()


class Sampler:
    """A `rollout_func`: an engine that has the trainer's weights."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        if self.engine is None:
            self.engine = Engine(trainer.model, trainer.args.max_completion_length)
        self.engine.sync_weights()
        ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        _, completions, log_probs, _ = self.engine.generate(ids)
        scores = [[score for (score,) in row] for row in log_probs]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": scores}

    def note(self, output: dict[str, Any], batch: list[Row]) -> None:
        """What the reference corrects, without a ratio of TRL's; the second token was not scored."""
        assert self.engine is not None
        assert output.get("importance_sampling_ratio") is None
        output["sampling_per_token_logps"][:, 1] = NAN
        for row, gap in zip(batch, self.engine.gaps, strict=True):
            row.engine_gap = [0.0 if i == 1 else one for i, one in enumerate(gap)][: len(row.completion)]


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"num_iterations": 2}],
    ids=["on-policy", "on-policy, four micro-batches", "with the trainer's own"],
)
def test_the_log_probabilities_of_a_rollout_function_are_corrected(
    tmp_path: Path, changes: dict[str, Any], backend: str
) -> None:
    config = tiny.config(rollout_is_clip=1.5, loss_backend=backend)
    trainer = tiny.trainer(tmp_path, sdpo_config=config, max_steps=3, **changes)
    trainer.rollout_func = sampler = Sampler()
    difference = compare(trainer, tiny.model(), Method(engine_clip=1.5), alter=sampler.note)
    assert max(difference.gradient, difference.loss) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"is_clip": 0.9}, Method(engine_clip=0.9)),
        ({"rollout_is_clip": 1.5}, Method(engine_clip=2.7)),
        ({"rollout_is_clip": None}, Method(engine_clip=1.5)),
    ],
    ids=["clipped at is_clip", "not clipped", "not corrected"],
)
def test_another_correction_on_policy_is_detected(
    tmp_path: Path, changes: dict[str, Any], method: Method
) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(**changes))
    trainer.rollout_func = sampler = Sampler()
    assert compare(trainer, tiny.model(), method, alter=sampler.note).gradient > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "synced", [True, False], ids=["as it is", "counter-example: the engine keeps the first weights"]
)
@pytest.mark.parametrize("by_trl", [True, False])
def test_an_engine_receives_the_weights_and_its_gap_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool, by_trl: bool
) -> None:
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    if not synced:
        monkeypatch.setattr(Engine, "sync_weights", lambda self: None)
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(rollout_is_clip=1.5), use_vllm=True, vllm_mode="colocate",
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=100.0, max_steps=3,
        vllm_importance_sampling_correction=by_trl,
    )  # fmt: skip
    engine = trainer.vllm_generation

    def note(output: dict[str, Any], batch: list[Row]) -> None:
        for row, gap in zip(batch, engine.gaps, strict=True):
            row.engine_gap = gap[: len(row.completion)]

    difference = compare(trainer, tiny.model(), Method(engine_clip=1.5), alter=note)
    assert (max(difference.gradient, difference.loss) < 10 * TOLERANCE) == synced
    if synced:
        assert engine.calls == ["sync", "generate"] * 3


@pytest.mark.parametrize(("dtype", "moves"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_merge_for_an_engine_moves_a_base_in_bfloat16(dtype: torch.dtype, moves: bool) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(tiny.model().to(dtype), adapter, autocast_adapter_dtype=False)
    parts = dict(model.named_parameters())
    base = {name: p.detach().clone() for name, p in parts.items() if ".base_layer." in name}
    generator = torch.Generator().manual_seed(0)
    for name in parts.keys() - base.keys():
        if ".lora_" in name:
            parts[name].data.copy_(0.1 * torch.randn(parts[name].shape, generator=generator))
    engine = VLLMGeneration.__new__(VLLMGeneration)
    engine.model = model
    engine._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())
    sent = [name for name, _ in engine._iter_named_params()]
    assert sorted(sent) == sorted(name for name, _ in tiny.model().named_parameters())
    change = max(float((parts[name] - before).norm() / before.norm()) for name, before in base.items())
    assert (change > 1e-4) == moves
    assert moves or change < 1e-6


# --- tools ------------------------------------------------------------------------------------------------

QUESTION, OTHER = "6x7?", "2x3?"
SCRIPTS = [
    [scripted_turns.call("multiply", '{"a": 6, "b": 7}'), f"it is 42{scripted_turns.END}"],
    [f"it is 13{scripted_turns.END}"],
    [scripted_turns.call("multiply", '{"a": 6, "c": 7}'), f"it is 0{scripted_turns.END}"],
    [
        scripted_turns.call("multiply", '{"a": 6, "b": 6}'),
        scripted_turns.call("multiply", '{"a": 36, "b": 1}'),
        f"it is 36{scripted_turns.END}",
    ],
    *[[f"it is {n}{scripted_turns.END}"] for n in range(4)],
]
ERROR = "{'error': \"multiply() got an unexpected keyword argument 'c'\"}"
RESULTS = [["42"], [], [ERROR], ["36", "36"], [], [], [], []]
DEMONSTRATION = 'multiply({"a": 6, "b": 7})\n42\nit is 42'


def product(completions: list[Any], **_: Any) -> list[Any]:
    return [
        (1.0, "") if "42" in completion[-1]["content"] else (0.0, f"{len(completion)} turns, no 42")
        for completion in completions
    ]


def tool_trainer(folder: Path, scripts: list[list[str]] = SCRIPTS, **options: Any) -> SDPOTrainer:
    changes = {
        "max_completion_length": 400,
        "max_steps": 1,
        "shuffle_dataset": False,
        "optim": "sgd",
        "learning_rate": 1.0,
        **options.pop("changes", {}),
    }
    settings: dict[str, Any] = {
        "reward_funcs": product,
        "tools": [scripted_turns.multiply],
        "train_dataset": Dataset.from_dict({"prompt": [tiny.user(QUESTION), tiny.user(OTHER)]}),
        **options,
    }
    trainer = SDPOTrainer(
        model=scripted_turns.model(),
        args=tiny.arguments(folder, **changes),
        sdpo_config=tiny.config(support="full", alpha=1.0),
        processing_class=scripted_turns.tokenizer(),
        **settings,
    )
    scripted_turns.replace_sampling(trainer, scripts)
    return trainer


def watch(trainer: Any) -> list[dict[str, Any]]:
    """The generation batches that the loss gets."""
    batches: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def keep(inputs: Any) -> Any:
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = keep
    return batches


def expected_parts(row: int) -> list[tuple[str, bool]]:
    """A completion as (text, whether the model wrote it)."""
    parts = [(SCRIPTS[row][0], True)]
    for result, turn in zip(RESULTS[row], SCRIPTS[row][1:], strict=True):
        parts += [(scripted_turns.RESULT.format(result), False), (turn, True)]
    return parts


def expected_reprompt(row: int) -> str | None:
    if row == 0:
        return None
    if row < 4:
        return f"{QUESTION}\nCorrect solution:\n\n{DEMONSTRATION}\n\nCorrectly solve the original question."
    remark = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n1 turns, no 42"
    return f"{OTHER}{remark}\n\nCorrectly solve the original question."


def rendered(tokens: Any, question: str, tools: list[Any], after: list[dict[str, Any]] = []) -> list[int]:  # noqa: B006
    turns = [*tiny.user(question), *after]
    return tokens.apply_chat_template(turns, tools=tools, add_generation_prompt=True)["input_ids"]


def test_the_teacher_gets_the_same_tokens_and_a_transcript(tmp_path: Path) -> None:
    trainer = tool_trainer(tmp_path)
    (batches, tokens) = watch(trainer), trainer.processing_class
    trainer.train()
    (batch,) = batches
    assert batch["row_mask"].tolist() == [False] + [True] * 7
    for row in range(8):
        parts = expected_parts(row)
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        pieces = [tokens(text)["input_ids"] for text, _ in parts]
        assert ids.tolist() == [*chain(*pieces)]
        written = [own for piece, (_, own) in zip(pieces, parts, strict=True) for _ in piece]
        assert batch["tool_mask"][row][: len(ids)].bool().tolist() == written
        reprompt = expected_reprompt(row)
        reads = attended(batch, "teacher_prompt", row)
        assert reads == ([] if reprompt is None else rendered(tokens, reprompt, [scripted_turns.multiply]))


def step(name: str, arguments: dict[str, Any], result: str) -> list[dict[str, Any]]:
    """The turns of a tool call and its result in a prompt."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
    ]


def attended(batch: dict[str, Any], name: str, row: int) -> list[int]:
    ids: list[int] = batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()
    return ids


STEPS = [*step("multiply", {"a": 6, "b": 6}, "36"), *step("multiply", {"a": 6, "b": 8}, "48")]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_may_end_with_the_result_of_a_tool(tmp_path: Path, streamed: bool) -> None:
    """The model continues with a call or an answer; the reprompt stands in the user turn, before the steps."""
    rows = [{"prompt": [*tiny.user(QUESTION), *STEPS]}, {"prompt": tiny.user(OTHER)}]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    trainer = tool_trainer(tmp_path, train_dataset=dataset)
    batches, tokens = watch(trainer), trainer.processing_class
    trainer.train()
    (batch,) = batches
    assert batch["row_mask"].tolist() == [False] + [True] * 7
    tools = [scripted_turns.multiply]
    for row in range(8):
        question, after = (QUESTION, STEPS) if row < 4 else (OTHER, [])
        assert attended(batch, "prompt", row) == rendered(tokens, question, tools, after)
        pieces = [tokens(text)["input_ids"] for text, _ in expected_parts(row)]
        assert attended(batch, "completion", row) == [*chain(*pieces)]
        reads = attended(batch, "teacher_prompt", row)
        reprompt = expected_reprompt(row)
        if reprompt is None:
            assert reads == []
            continue
        assert reads == rendered(tokens, reprompt, tools, after)
        # The planted counter-example: the reprompt in the last turn.
        last = {**STEPS[-1], "content": reprompt.replace(question, STEPS[-1]["content"], 1)}
        assert row > 3 or reads != rendered(tokens, question, tools, [*after[:-1], last])


def reference_gradient(
    model: nn.Module, tokens: Any, *, tools_count: bool, tools_read: bool
) -> dict[str, Tensor]:
    """Gradient of Σ KL(student‖teacher) over the model's own tokens; teacher and student have the same weights."""
    losses = []
    for row in range(1, 8):
        parts = [part for part in expected_parts(row) if part[1] or tools_read]
        pieces = [tokens(text)["input_ids"] for text, _ in parts]
        completion = [*chain(*pieces)]
        counts = torch.tensor(
            [own or tools_count for piece, (_, own) in zip(pieces, parts, strict=True) for _ in piece]
        )
        question = QUESTION if row < 4 else OTHER
        reprompt = expected_reprompt(row)
        assert reprompt is not None
        log_p, log_q = (
            model(input_ids=torch.tensor([prompt + completion]))
            .logits[0, len(prompt) - 1 : -1]
            .double()
            .log_softmax(-1)
            for prompt in (
                rendered(tokens, question, [scripted_turns.multiply]),
                rendered(tokens, reprompt, [scripted_turns.multiply]),
            )
        )
        losses.append((log_p.exp() * (log_p - log_q.detach())).sum(-1)[counts])
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(torch.cat(losses).mean(), list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("tools_count", "tools_read", "equal"),
    [(False, True, True), (True, True, False), (False, False, False)],
    ids=["as it is", "counter-example: tools have a loss", "counter-example: tools are no context"],
)
@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}])
def test_only_the_model_s_own_tokens_have_a_loss(
    tmp_path: Path, split: dict[str, int], tools_count: bool, tools_read: bool, equal: bool
) -> None:
    trainer = tool_trainer(tmp_path, changes=split)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    tokens = trainer.processing_class
    expected = reference_gradient(
        scripted_turns.model(), tokens, tools_count=tools_count, tools_read=tools_read
    )
    moved = {name: start[name] - p.detach() for name, p in trainer.model.named_parameters()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    gap = torch.stack([(moved[name] - g).norm() for name, g in expected.items()]).norm()
    assert (gap / norm < 1e-5) == equal  # weights minus weights: some digits are lost


@pytest.mark.parametrize("thinking", [True, False])
def test_a_transcript_of_turns(thinking: bool) -> None:
    completion = [
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "Let me see.",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ä": "{x}"}}},
                {"function": {"name": "now", "arguments": '{"raw": 1}'}},
            ],
        },
        {"role": "tool", "name": "add", "content": "<think>kept: no thought of the model's</think>3"},
        {"role": "tool", "name": "now", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": "<think>so it is</think>It is 3."},
    ]
    lines = [
        "<think>hm</think>",
        "Let me see.",
        'add({"a": 1, "ä": "{x}"})',
        'now({"raw": 1})',
        "<think>kept: no thought of the model's</think>3",
        "noon",
        "<think>so it is</think>It is 3.",
    ]
    if not thinking:
        lines = [*lines[1:6], "It is 3."]
    assert completion_text(completion, strip=None if thinking else strip_thinking) == "\n".join(lines)


def test_an_unclosed_thought_hides_its_own_turn_only() -> None:
    turns = [
        {"role": "assistant", "content": "<think>cut", "tool_calls": []},
        {"role": "tool", "name": "t", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    assert completion_text(turns, strip=strip_thinking) == "4\nfour"


# --- environments -----------------------------------------------------------------------------------------


class Shop:
    """An environment with feedback in an attribute."""

    feedback: str | None

    def reset(self, **_: Any) -> None:
        self.feedback = None

    def buy(self, item: str) -> str:
        """Buy something.

        Args:
            item: what.
        """
        self.feedback = f"the shop has no {item}{{}}"
        return "sold out"

    def get_reward(self) -> float:
        return 0.0


class Garden:
    """An environment with feedback in a property, and an observation before the prompt."""

    def reset(self, **_: Any) -> str:
        return " It rains."

    def dig(self, depth: int) -> str:
        """Dig a hole.

        Args:
            depth: how deep.
        """
        return f"{depth} deep"

    @property
    def feedback(self) -> str:
        return "roots everywhere"


def both(environments: list[Any], **_: Any) -> list[Any]:
    return [(0.0, "think again") if isinstance(e, Garden) else 0.0 for e in environments]


BOUGHT = step("buy", {"item": "milk"}, "sold out")
ENVIRONMENT_SCRIPTS = [
    [scripted_turns.call("buy", '{"item": "tea"}'), f"no tea{scripted_turns.END}"],
    [scripted_turns.call("buy", '{"item": "jam"}'), f"no jam{scripted_turns.END}"],
    [f"nothing{scripted_turns.END}"],
    [f"no{scripted_turns.END}"],
    *[[scripted_turns.call("dig", f'{{"depth": {n}}}'), f"deep{scripted_turns.END}"] for n in range(4)],
]


def test_the_feedback_of_an_environment_is_that_of_its_row(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(
        {
            "prompt": [[*tiny.user("shop?"), *BOUGHT], tiny.user("dig?")],
            "environment": ["shop", "garden"],
            "feedback": ["from the dataset", None],
        }
    )
    trainer = tool_trainer(
        tmp_path,
        ENVIRONMENT_SCRIPTS,
        tools=None,
        reward_funcs=both,
        train_dataset=dataset,
        environment_factory={"shop": Shop, "garden": Garden},
        changes={"max_steps": 2},
    )
    batches, tokens = watch(trainer), trainer.processing_class
    trainer.train()
    remarks = [
        "the shop has no tea{}",
        "the shop has no jam{}",
        "from the dataset",
        "from the dataset",
        *["think again\n\nroots everywhere"] * 4,
    ]
    questions = ["shop?"] * 4 + ["dig? It rains."] * 4
    after = [BOUGHT] * 4 + [[]] * 4
    tools = [[Shop().buy]] * 4 + [[Garden().dig]] * 4
    assert len(batches) == 2  # reset forgets what was said before
    for batch in batches:
        for row in range(8):
            reads = attended(batch, "teacher_prompt", row)
            reprompt = (
                f"{questions[row]}\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
                f"{remarks[row]}\n\nCorrectly solve the original question."
            )
            assert reads == rendered(tokens, reprompt, tools[row], after[row])
            assert attended(batch, "prompt", row) == rendered(tokens, questions[row], tools[row], after[row])


def test_the_tools_of_all_environments_are_another_prompt() -> None:
    """The counter-example: one list of tools for every row is another prompt."""
    tokens = scripted_turns.tokenizer()
    assert rendered(tokens, "q", [Shop().buy]) != rendered(tokens, "q", [Shop().buy, Garden().dig])


def test_feedback_is_no_tool() -> None:
    class Method_:  # noqa: N801
        def feedback(self) -> str:
            return "offered to the model"

    with pytest.raises(
        TypeError, match=r"Method_\.feedback: expected a string or None, got method.*property"
    ):
        environment_feedback([Shop.__new__(Garden), Method_()])
    assert environment_feedback([Garden(), object()]) == ["roots everywhere", None]


def test_an_environment_may_return_the_prompts(tmp_path: Path) -> None:
    class Quiz(Garden):
        def reset(self, **_: Any) -> str:
            return "What now?"

    trainer = tool_trainer(
        tmp_path,
        [[f"hm{scripted_turns.END}"]] * 8,
        tools=None,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        train_dataset=None,
        environment_factory=Quiz,
    )
    batches, tokens = watch(trainer), trainer.processing_class
    trainer.train()
    text = tokens.decode(batches[0]["teacher_prompt_ids"][0])
    assert "What now?\nThe following is feedback" in text
    assert "roots everywhere" in text


def test_mask_and_feedback_of_a_rollout_function(tmp_path: Path) -> None:
    """TRL's `rollout_func`: `env_mask` marks the model's tokens, any other key is a column of the rows."""
    tokens = scripted_turns.tokenizer()
    said = tokens(f"abcdef{scripted_turns.END}")["input_ids"]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        ids = [rendered(tokens, prompt[-1]["content"], []) for prompt in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [list(said) for _ in prompts],
            "logprobs": [[0.0] * len(said) for _ in prompts],
            "env_mask": [[1, 1, 0, 0, 1, 1, 1] for _ in prompts],
            "feedback": [f"row {row}" for row, _ in enumerate(prompts)],
        }

    trainer = tool_trainer(
        tmp_path,
        tools=None,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        rollout_func=rollout,
    )
    batches = watch(trainer)
    trainer.train()
    (batch,) = batches
    for row in range(8):
        assert batch["tool_mask"][row].tolist() == [1, 1, 0, 0, 1, 1, 1]
        assert f"attempt:\n\nrow {row}\n\nCorrectly" in tokens.decode(batch["teacher_prompt_ids"][row])
    assert trainer._window._counts is not None
    assert trainer._window._counts.tolist() == [8 * 5.0]


# --- planted errors ---------------------------------------------------------------------------------------


def test_a_teacher_with_other_tool_tokens_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter-example: the teacher's completion without the tools' answers."""
    true = step_batch.compact

    def without_tool_results(prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, *rest: Any) -> Any:
        return true(prompt_ids, prompt_mask, torch.where(ids > 100, 0, ids), *rest)

    def losses() -> list[float]:
        trainer = tool_trainer(tmp_path)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses()
    monkeypatch.setattr(step_batch, "compact", without_tool_results)
    assert losses() != pytest.approx(expected, rel=1e-3)

"""The probe of a trainer: its numbers, that training after it is the same to the bit, its refusals."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scripted_turns
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from programs import ROOT
from programs import run as program

from sdpo_rl import SDPOTrainer, probe
from sdpo_rl.diagnose.probe import measure
from sdpo_rl.diagnose.probe.result import ProbeResult
from sdpo_rl.diagnose.probe.retry import why_not


class Judge:
    """The reward of `tiny.judge`, which remembers what it was called with."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, completions: list[Any], prompts: list[Any], **columns: Any) -> list[tuple[float, str]]:
        texts = [tiny.text_of(completion) for completion in completions]
        self.calls.append({"prompts": prompts, "texts": texts, "answer": columns.get("answer")})
        return tiny.judge(completions)


def answers(rows: int = 8) -> Dataset:
    return tiny.conversations(rows, answer=[f"yes {i}" for i in range(rows)])


def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The generation batches that a probe makes, in order."""
    made: list[Any] = []
    generate = measure.scored_batch

    def recorded(*args: Any) -> Any:
        made.append(generate(*args))
        return made[-1]

    monkeypatch.setattr(measure, "scored_batch", recorded)
    return made


def has_signals(batch: Any) -> list[bool]:
    return [bool(row.teacher_prompt_ids) for row in batch.rows]


def test_rates_are_those_of_the_reward_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, judge = batches_of(monkeypatch), Judge()
    result = probe(tiny.trainer(tmp_path, reward_funcs=judge), batches=2)
    assert [call["prompts"] for call in judge.calls[::2]] == [call["prompts"] for call in judge.calls[1::2]]
    bare, same, again, groups = [], [], [], []
    for (call, retry), batch in zip(zip(*[iter(judge.calls)] * 2, strict=True), made[::2], strict=True):
        first, second = ([tiny.score(text) for text in each["texts"]] for each in (call, retry))
        bare += first
        for row, has_signal in enumerate(has_signals(batch)):
            if has_signal:
                start = row // tiny.GROUP * tiny.GROUP
                same.append(sum(first[start : start + tiny.GROUP]) / tiny.GROUP)
                again.append(second[row])
                groups.append((len(bare), start))
    assert (result.rows, result.batches) == (16, 2)
    assert result.success.bare == pytest.approx(sum(bare) / 16)
    assert result.success.same_prompts == pytest.approx(sum(same) / len(same))
    assert result.success.retry == pytest.approx(sum(again) / len(again))
    assert result.success.retried == len(again)
    assert result.signal.share == len(again) / 16
    assert 0 < result.success.bare < 1
    differences: dict[Any, list[float]] = {}
    for group, rate, right in zip(groups, same, again, strict=True):
        differences.setdefault(group, []).append(right - rate)
    mean = sum(again) / len(again) - sum(same) / len(same)
    spread = sum((sum(d) - len(d) * mean) ** 2 for d in differences.values())
    count = len(differences)
    assert result.success.error == pytest.approx(math.sqrt(count / (count - 1) * spread) / len(again))


def test_retries_start_from_the_teacher_s_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches_of(monkeypatch)
    trainer = tiny.trainer(tmp_path)
    probe(trainer, batches=1)
    first, second = made
    used = 0
    for row, has_signal in enumerate(has_signals(first)):
        ids = second.rows[row].prompt_ids
        bare = first.rows[row].prompt_ids
        assert ids == (first.rows[row].teacher_prompt_ids if has_signal else bare)
        used += has_signal
    assert used
    assert "_tokenize_prompts" not in vars(trainer)


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], answer: list[int], temperature: float) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return float(logits.log_softmax(-1)[range(len(answer)), answer].sum())


@pytest.mark.parametrize("backend", ["torch", "logits"])
def test_the_gain_of_right_answers_equals_plain_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    made = batches_of(monkeypatch)
    config = tiny.config(loss_backend=backend)
    trainer = tiny.trainer(tmp_path, train_dataset=answers(), sdpo_config=config, temperature=0.8)
    result = probe(trainer, batches=1, answer_column="answer").right_answers
    model, first, gains, bares, tokens = tiny.model().eval(), made[0], [], [], 0
    for row, has_signal in enumerate(has_signals(first)):
        if not has_signal:
            continue
        place = int(tiny.text_of([first.rows[row].prompt[-1]]).split()[-1])
        answer = [*tiny.tokenizer()(f"yes {place}").input_ids, 1]
        bare = first.rows[row].prompt_ids
        bares.append(log_prob(model, bare, answer, 0.8))
        gains.append(log_prob(model, first.rows[row].teacher_prompt_ids, answer, 0.8) - bares[-1])
        tokens += len(answer)
    assert result is not None
    assert (result.source, result.count) == ("answer_column", len(gains))
    assert result.gain_per_sequence == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    assert result.gain_per_token == pytest.approx(sum(gains) / tokens, abs=1e-4)
    assert result.bare_per_sequence == pytest.approx(sum(bares) / len(bares), rel=1e-4)
    assert abs(result.gain_per_sequence) > 0.01


def test_without_a_column_right_answers_are_the_successes_of_other_rows(tmp_path: Path) -> None:
    result = probe(tiny.trainer(tmp_path), batches=2)
    assert result.right_answers is not None
    assert result.right_answers.source == "successes of the group"
    assert result.right_answers.shown > 0  # the teacher sees one of them


def test_the_models_are_compared_on_the_tokens_with_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = batches_of(monkeypatch)
    result = probe(tiny.trainer(tmp_path, per_device_train_batch_size=4, steps_per_generation=2), batches=1)
    model, (first, _) = tiny.model().eval(), made
    agreed = entropy = tokens = 0.0
    for row, has_signal in enumerate(has_signals(first)):
        if not has_signal:
            continue
        answer = first.rows[row].completion_ids
        bare = first.rows[row].prompt_ids
        p, q = (
            model(torch.tensor([prompt + answer]))
            .logits[0, len(prompt) - 1 : -1]
            .detach()
            .double()
            .softmax(-1)
            for prompt in (bare, first.rows[row].teacher_prompt_ids)
        )
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
        entropy -= float((p * p.log()).sum())
        tokens += len(answer)
    found = result.agreement
    assert found is not None
    assert found.tokens == tokens
    assert found.argmax == pytest.approx(agreed / tokens)
    assert found.student_entropy == pytest.approx(entropy / tokens, rel=1e-4)
    assert found.divergence > 0.01
    assert [effect.alpha for effect in found.effects] == [0.0, 0.1, 0.5, 1.0]


# --- rows without a signal ------------------------------------------------------------------------------------


def failing(completions: list[Any], **_: Any) -> list[tuple[float, str]]:
    return [(0.0, "no good") for _ in completions]


def mute(completions: list[Any], **_: Any) -> list[tuple[float, str]]:
    return [(0.0, "  ") for _ in completions]


@pytest.mark.parametrize(
    ("reward", "config", "reason"),
    [
        (mute, {}, "no feedback, or a blank one"),
        (failing, {"include_environment_feedback": False}, "include_environment_feedback=False"),
        (failing, {"max_reprompt_length": 16}, "max_reprompt_length=16"),
    ],
)
def test_without_any_signal_the_reason_is_named_and_nothing_is_retried(
    tmp_path: Path, reward: Any, config: dict, reason: str
) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=reward, sdpo_config=tiny.config(**config))
    result = probe(trainer, batches=1)
    ((found, share),) = result.signal.without.items()
    assert share == 1.0
    assert reason in found
    assert "best score" not in found
    assert (result.success.retry, result.success.not_measured) == (None, "no row has a signal")
    assert (result.agreement, result.right_answers) == (None, None)
    assert result.verdict.outlook == "does not learn"
    assert found in str(result)


@pytest.mark.parametrize(("limit", "context"), [(150, 512), (10240, 160)])
def test_the_limit_of_the_teacher_s_prompts_is_the_smaller_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, context: int
) -> None:
    """That of the options, and what the model's context leaves beside the longest completion."""
    made = batches_of(monkeypatch)
    trainer = tiny.trainer(
        tmp_path,
        start=tiny.model(max_position_embeddings=context),
        sdpo_config=tiny.config(max_reprompt_length=limit),
    )
    result = probe(trainer, batches=1)
    longest = max(len(row.completion_ids) for row in made[0].rows)
    assert result.lengths.teacher_prompt_limit == min(limit, context - longest)
    assert f" of {min(limit, context - longest)} tokens" in str(result)


# --- nothing moves --------------------------------------------------------------------------------------------


def run(folder: Path, *, probed: bool, **options: Any) -> tuple[dict[str, torch.Tensor], list, dict]:
    """Weights, log and teacher of a run, with a probe before it or without."""
    peft = (
        LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if options.pop("lora", False) else None
    )
    # Dropout draws random numbers in every step.
    start = tiny.model(attention_dropout=0.1)
    trainer = tiny.trainer(folder, start=start, peft_config=peft, max_steps=3, **options)
    if probed:
        probe(trainer, batches=2)
    trainer.train()
    timed = ("runtime", "per_second", "_time", "flos")
    log = [
        {name: value for name, value in entry.items() if not any(word in name for word in timed)}
        for entry in trainer.state.log_history
    ]
    return dict(trainer.model.state_dict()), log, dict(trainer._teacher.state.params)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": True}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}],
    ids=["full", "lora", "two micro-batches"],
)
def test_training_after_a_probe_is_the_same_to_the_bit(tmp_path: Path, options: dict) -> None:
    expected = run(tmp_path / "a", probed=False, **options)
    found = run(tmp_path / "b", probed=True, **options)
    for before, after in ((expected[0], found[0]), (expected[2], found[2])):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert found[1] == expected[1]
    moved = tiny.model(attention_dropout=0.1).state_dict()
    assert options.get("lora") or any(not torch.equal(moved[name], found[0][name]) for name in moved)


def test_a_probe_between_two_trainings_reads_the_teacher(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer._teacher.state.params.items()}
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    result = probe(trainer, batches=1)
    assert isinstance(result, ProbeResult)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer._teacher.state.params.items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


# --- environments, several processes -------------------------------------------------------------------------


class Counter:
    """An environment whose task is the row's; its tool takes what the model counts to."""

    def reset(self, goal: int, **_: Any) -> None:
        self.goal, self.said = goal, 0

    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: to add.
        """
        self.said += number
        return "added"

    @property
    def feedback(self) -> str:
        return f"count to {self.goal}, not {self.said}"


def test_environments_and_tools_run_for_both_completions_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen: list[list[tuple[int, int]]] = []

    def reward(environments: list[Counter], **_: Any) -> list[float]:
        seen.append([(each.goal, each.said) for each in environments])
        return [float(each.goal == each.said) for each in environments]

    trainer = SDPOTrainer(
        model=scripted_turns.model(),
        args=tiny.arguments(tmp_path, max_completion_length=400, shuffle_dataset=False),
        sdpo_config=tiny.config(),
        processing_class=scripted_turns.tokenizer(),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [tiny.user("count")] * 2, "goal": [3, 4]}),
        environment_factory=Counter,
    )
    last = f"done{scripted_turns.END}"
    turns = [scripted_turns.call("add", '{"number": 3}'), last]
    scripted_turns.replace_sampling(trainer, [*[turns] * 7, [last]])  # the last row calls no tool
    prompts: list[list[list[int]]] = []
    sample = trainer._generate_single_turn

    def kept(prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        prompts.append(prompt_ids)
        return sample(prompt_ids, *rest, **options)

    trainer._generate_single_turn = kept
    result = probe(trainer, batches=1)
    assert seen == [[(3, 3)] * 4 + [(4, 3)] * 3 + [(4, 0)]] * 2
    assert (result.success.bare, result.success.retry) == (0.5, 0.5)
    first, second = prompts[0], prompts[2]  # each followed by a turn after the tool
    assert all(len(retry) > len(bare) for bare, retry in zip(first, second, strict=True))
    assert "count to 4, not 0" in trainer.processing_class.decode(second[-1])
    assert result.right_answers is not None
    assert result.right_answers.count == 4
    assert trainer.environments is None or not trainer.environments


DRIVER = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[2])
import tiny
from sdpo_rl import probe
trainer = tiny.trainer(Path(sys.argv[1]), per_device_train_batch_size=4)
before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
result = probe(trainer, batches=2)
assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())
trainer.train()
rank = trainer.accelerator.process_index
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result.to_dict()))
trainer.accelerator.wait_for_everyone()
# Without the end of the interpreter: a thread of gloo may still hold a tensor of Python, and would abort there.
os._exit(0)
"""


def test_all_processes_get_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program(tmp_path, *launch, str(tmp_path / "driver.py"), str(tmp_path), str(ROOT / "property_tests"))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for result in (first, second):
        assert result.pop("cost")["generation_seconds"] > 0
    assert first == second
    assert (first["rows"], first["batches"]) == (16, 2)
    assert first["success"]["retried"] == round(16 * first["signal"]["share"]) > 0


# --- how it reads, and refusals -------------------------------------------------------------------------------


def test_the_result_prints_and_is_json(tmp_path: Path) -> None:
    result = probe(tiny.trainer(tmp_path), batches=1)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["verdict"]["outlook"] == result.verdict.outlook
    assert values["cost"]["generation_peak_bytes"] is None
    tensors = [*tiny.model().parameters(), *tiny.model().buffers()]
    assert values["cost"]["weight_bytes"] == sum(tensor.numel() * 4 for tensor in tensors)
    assert values["cost"]["step_seconds"] > values["cost"]["generation_seconds"] > 0
    text = str(result)
    assert text.startswith(f"VERDICT: {result.verdict.summary}")
    assert "α=0.5" in text
    assert "same most likely token at" in text
    assert "favourite" not in text
    assert "activations: not known on a CPU" in text
    assert "{" not in text
    assert max(map(len, text.splitlines())) < 140


def test_a_fast_teacher_is_told_in_the_words_of_the_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny.trainer(tmp_path, sdpo_config=tiny.config(teacher_update_rate=0.3))
    result = probe(trainer, batches=1)
    (remark,) = [remark for remark in result.verdict.remarks if remark.rule == "fast_teacher"]
    assert remark.text in caplog.text
    assert result.teacher_rate.per_256_samples == pytest.approx(1 - 0.7 ** (256 / 8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batches": 0}, ValueError, "batches: expected at least 1, got 0"),
        ({"batches": 1.5}, TypeError, "batches: expected an integer, got float"),
        ({"answer_column": "no"}, ValueError, "answer_column: expected a column of train_dataset, got 'no'"),
        ({"answer_column": "prompt"}, TypeError, "expected a column of texts, got list in 'prompt'; write"),
        ({"answer_column": "number"}, TypeError, "expected a column of texts, got int in 'number'; write"),
        ({"answer_column": "some"}, TypeError, "expected a column of texts, got NoneType in 'some'; write"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, error: type, message: str, streamed: bool
) -> None:
    """Before anything is generated, also where the rows of a stream are the first to show it."""
    data = tiny.conversations(number=list(range(8)), some=[None] * 8)
    stream = IterableDataset.from_generator(lambda: iter(list(data)))  # does not know its columns
    trainer = tiny.trainer(tmp_path, train_dataset=stream if streamed else data)
    made = batches_of(monkeypatch)
    with pytest.raises(error, match=message):
        probe(trainer, **changes)
    assert made == []


def test_grpo_has_nothing_to_probe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sdpo_config: expected enabled=True, got False"):
        probe(tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False)))


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_parts_of_weights_are_refused(tmp_path: Path, name: str) -> None:
    trainer = tiny.trainer(tmp_path)
    setattr(trainer, name, True)
    with pytest.raises(ValueError, match="expected one process or DDP, got FSDP or DeepSpeed"):
        probe(trainer)


def test_a_rollout_function_is_not_asked_to_retry(tmp_path: Path) -> None:
    tokens = tiny.tokenizer()

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        replies = [tokens("ab" if row % 2 else "aa").input_ids for row in range(len(prompts))]
        return {
            "prompt_ids": tokens.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"],
            "completion_ids": replies,
            "logprobs": [[-1.0] * len(reply) for reply in replies],
        }

    trainer = tiny.trainer(tmp_path)
    trainer.rollout_func = rollout
    result = probe(trainer, batches=1)
    assert (result.success.bare, result.success.retry) == (0.5, None)
    assert result.success.not_measured == "a rollout_func writes its own prompts"
    assert result.verdict.outlook == "not known"
    assert "not measured: a rollout_func" in str(result)
    assert result.right_answers is not None


def test_vllm_is_not_asked_for_more_than_it_can_hold(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_completion_length=8)
    model = SimpleNamespace(max_model_len=20)
    trainer.vllm_generation = SimpleNamespace(
        llm=SimpleNamespace(llm_engine=SimpleNamespace(model_config=model))
    )
    assert why_not(trainer, [[1] * 100]) is None
    trainer.use_vllm, trainer.vllm_mode = True, "colocate"
    assert why_not(trainer, [[1] * 12, [1]]) is None
    assert why_not(trainer, [[1], [1] * 13]) == (
        "the teacher's prompts and completions need 21 tokens, vllm_max_model_length is 20"
    )
    trainer.vllm_mode = "server"
    assert "samples all completions of a group from one prompt" in (why_not(trainer, [[1]]) or "")


def test_prompts_that_are_not_used_are_not_taken_for_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(measure.retry, "prompts_replaced", lambda *_: contextlib.nullcontext([]))
    result = probe(trainer, batches=1)
    assert result.success.not_measured == "this GRPOTrainer writes its prompts in another way"
    assert result.verdict.outlook == "not known"


def test_a_dataset_of_one_batch_is_probed_once(tmp_path: Path) -> None:
    result = probe(tiny.trainer(tmp_path, train_dataset=tiny.conversations(2)), batches=3)
    assert (result.batches, result.rows) == (1, 8)

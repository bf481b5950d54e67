"""Groups are global: any number of processes writes the reprompts that one would write, and counts the same."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import tiny
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of

from sdpo import select_demonstrations, strip_thinking
from sdpo_rl import Attempt, SDPOConfig
from sdpo_rl.rollout import demonstrations
from sdpo_rl.rollout.demonstrations import Rollout, TeacherContext, teacher_context
from sdpo_rl.rollout.prompts import Renderer
from sdpo_rl.rollout.reprompts import Reprompter

GROUP = 3
TOKENIZER = tiny.tokenizer()
REPEATED = "the Original question"  # of the templates
texts = st.sampled_from(["two", " ", "<think>so</think>", "<think>so</think>four", "{x}", REPEATED])


@dataclass(frozen=True)
class Batch:
    scores: list[float]
    completions: list[str]
    feedback: list[str | None]
    has_loss: list[bool]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows = 6 * draw(st.integers(1, 2))  # whole groups, and divisible over two or three ranks

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=rows, max_size=rows))

    return Batch(
        column(st.sampled_from([0.0, 0.5, 1.0, math.nan])),
        column(texts),
        column(st.none() | st.just("got {3}")),
        column(st.sampled_from([True, True, True, False])),
    )


configs = st.builds(
    SDPOConfig,
    demonstration_policy=st.sampled_from(["first", "random", "shortest", "longest", "best"]),
    dont_reprompt_on_self_success=st.booleans(),
    remove_thinking_from_demonstration=st.booleans(),
    include_environment_feedback=st.booleans(),
    environment_feedback_only_without_solution=st.booleans(),
    num_demonstrations=st.integers(1, 2),
    max_reprompt_length=st.sampled_from([10240, 90]),
    row_weights=st.sampled_from(["none", "pass_rate"]),
    routing=st.sampled_from(["none", "srpo"]),
)


def on_ranks(
    batch: Batch, config: SDPOConfig, ranks: int, *, local: bool = False, function: Any = None
) -> list[TeacherContext]:
    """The contexts of all processes, each in its own thread, which share nothing but `gather`."""
    rows = len(batch.scores) // ranks
    board: list[list[Any]] = [[] for _ in range(ranks)]
    barrier = Barrier(ranks, timeout=30)

    def work(rank: int) -> TeacherContext:
        def gather(own: list[Any]) -> list[Any]:
            if local:
                return list(own) * ranks
            board[rank] = own
            barrier.wait()
            everything = [item for part in board for item in part]
            barrier.wait()
            return everything

        mine = slice(rank * rows, (rank + 1) * rows)
        completions = batch.completions[mine]
        rollout = Rollout(
            prompts=[tiny.user(f"q{i}") for i in range(len(batch.scores))][mine],
            completions=[[{"role": "assistant", "content": text}] for text in completions],
            completion_lengths=[len(text) for text in completions],
            demonstrations=[
                strip_thinking(text) if config.remove_thinking_from_demonstration else text
                for text in completions
            ],
            feedback=batch.feedback[mine],
            scores=torch.tensor(batch.scores),
            rewards=torch.tensor(batch.scores)[:, None],
        )
        reprompter = Reprompter(
            Renderer(TOKENIZER),
            config.templates(),
            config.environment_feedback_only_without_solution,
            "middle",
        )
        has_loss = batch.has_loss[mine]
        return teacher_context(
            rollout._replace(columns=[{"row": rank * rows + row} for row in range(rows)]),
            config,
            reprompter,
            has_loss=has_loss,
            group_size=GROUP,
            context_length=math.inf,
            rank=rank,
            seed=5,
            gather=gather,
            teacher_prompt_func=function,
        )

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


def property_the_number_of_processes_does_not_matter(
    world: Any, batch: Batch, config: SDPOConfig, ranks: int
) -> None:
    alone, spread = on_ranks(batch, config, 1)[0], world(batch, config, ranks)
    assert [ids for part in spread for ids in part.prompts.ids] == alone.prompts.ids
    assert [on for part in spread for on in part.prompts.row_mask] == alone.prompts.row_mask
    assert [on for part in spread for on in part.distilled] == alone.distilled
    assert [weight for part in spread for weight in part.row_weights or []] == (alone.row_weights or [])
    assert [rows for part in spread for rows in part.demonstration_rows] == alone.demonstration_rows
    assert all(part.metrics == alone.metrics for part in spread)


def property_a_function_gets_each_row_that_can_have_a_loss_once(
    world: Any, batch: Batch, config: SDPOConfig, ranks: int
) -> None:
    calls: dict[int, list[Attempt]] = {}

    def function(attempt: Attempt) -> Any:
        calls.setdefault(attempt.columns["row"], []).append(attempt)
        shown = " ".join([*attempt.demonstrations, attempt.feedback or "none"])
        return None if shown == "none" else [*attempt.prompt, *attempt.completion, *tiny.user(shown)]

    alone = on_ranks(batch, config, 1, function=function)[0]
    expected = {row: tuple(attempts) for row, attempts in calls.items()}
    calls.clear()
    spread = world(batch, config, ranks, function=function)
    assert {row: tuple(attempts) for row, attempts in calls.items()} == expected
    assert {row: 1 for row, counts in enumerate(batch.has_loss) if counts} == {
        row: len(attempts) for row, attempts in calls.items()
    }
    assert [ids for part in spread for ids in part.prompts.ids] == alone.prompts.ids
    assert all(part.metrics == alone.metrics for part in spread)


def property_metrics_and_rows_are_those_of_a_loop(world: Any, batch: Batch, config: SDPOConfig) -> None:
    (context,) = world(batch, config, 1)
    total = len(batch.scores)
    has, available, used, active, solved = [], [], [], [], []
    for row in range(total):
        group = range(row // GROUP * GROUP, row // GROUP * GROUP + GROUP)
        shown = {}
        for peer in group:
            text = batch.completions[peer]
            shown[peer] = text.split("</think>")[-1] if config.remove_thinking_from_demonstration else text
        peers = [j for j in group if batch.scores[j] >= 1.0 and shown[j].strip() and batch.has_loss[j]]
        if config.dont_reprompt_on_self_success:
            peers = [j for j in peers if j != row]
        if not batch.has_loss[row]:
            peers = []
        has.append(bool(peers))
        named = context.demonstration_rows[row]
        assert len(set(named)) == min(len(peers), config.num_demonstrations)
        assert set(named) <= set(peers)
        assert context.demonstrations[row] == [shown[j] for j in named]
        available.append(batch.feedback[row] is not None)
        alone = not (config.environment_feedback_only_without_solution and peers)
        use = batch.has_loss[row] and config.include_environment_feedback and alone
        used.append(available[-1] and use)
        active.append(has[-1] or used[-1])
    for first in range(0, total, GROUP):
        solved.append(any(score >= 1.0 for score in batch.scores[first : first + GROUP]))
    metrics = {k.removeprefix("self_distillation/"): v for k, v in context.metrics.items()}
    prompts = context.prompts
    texts = ["".join(tiny.VOCABULARY[i] for i in ids) for ids in prompts.ids]
    shows = ["Correct solution" in text for text in texts]
    words = {True: " successful earlier attempt", False: "unsuccessful earlier attempt"}
    right = [score >= 1.0 for score in batch.scores]
    hints = [words[success] in text for success, text in zip(right, texts, strict=True)]
    assert not any(words[not success] in text for success, text in zip(right, texts, strict=True))
    for row in range(total):  # what does not fit is left out
        cut = prompts.truncated[row] or prompts.dropped[row]
        assert shows[row] == has[row] or (cut and has[row])
        assert hints[row] == used[row] or (cut and used[row])
    assert metrics["success_sample_fraction"] == pytest.approx(sum(shows) / total)
    assert metrics["feedback_available_fraction"] == pytest.approx(sum(available) / total)
    assert metrics["feedback_used_fraction"] == pytest.approx(sum(hints) / total)
    assert metrics["success_group_fraction"] == pytest.approx(sum(solved) / len(solved))
    expected = [on and not lost for on, lost in zip(active, prompts.dropped, strict=True)]
    assert prompts.row_mask == expected
    assert metrics["reprompt_sample_fraction"] == pytest.approx(sum(expected) / total)
    judged = [score for score in batch.scores if not math.isnan(score)]
    assert metrics.get("best_score") == max(judged, default=None)
    assert metrics["empty_target_batch"] == float(not any(expected))
    repeats = [text == REPEATED for text in batch.completions]
    assert metrics["reprompt_text_fraction"] == pytest.approx(sum(repeats) / total)


def one_group(batch: Batch, config: SDPOConfig, ranks: int) -> Any:
    """Takes the whole batch for one group."""
    best = max(score if score == score else 0.0 for score in batch.scores)
    return on_ranks(replace(batch, scores=[best] * len(batch.scores)), config, ranks)


def masked_like_others(batch: Batch, config: SDPOConfig, ranks: int) -> Any:
    """Takes completions without a loss for demonstrations."""
    return on_ranks(replace(batch, has_loss=[True] * len(batch.scores)), config, ranks)


def failed_words_alone(batch: Batch, config: SDPOConfig, ranks: int) -> Any:
    """Introduces all feedback as that on a failed attempt, as the published code does."""
    return on_ranks(batch, replace(config, success_feedback_template=config.feedback_template), ranks)


def property_peers_with_the_row_s_own_text_come_last(world: Any, batch: Batch, config: SDPOConfig) -> None:
    config = replace(config, dont_reprompt_on_self_success=True, max_reprompt_length=10240)
    (context,) = world(batch, config, 1)
    for row, ids in enumerate(context.prompts.ids):
        group = set(range(row // GROUP * GROUP, row // GROUP * GROUP + GROUP)) - {row}
        peers = [batch.completions[j] for j in group if batch.scores[j] >= 1.0 and batch.has_loss[j]]
        shown = {text: text.split("</think>")[-1] for text in peers}
        if not config.remove_thinking_from_demonstration:
            shown = {text: text for text in peers}
        own = batch.completions[row]
        others = [shown[text] for text in peers if shown[text].strip() and own not in (text, shown[text])]
        prompt = "".join(tiny.VOCABULARY[i] for i in ids)
        got = [section.partition("\n")[0] for section in prompt.split("Correct solution:\n\n")[1:]]
        if batch.has_loss[row]:
            assert sum(text in others for text in got) == min(len(others), config.num_demonstrations)


def by_index_alone(batch: Batch, config: SDPOConfig, ranks: int) -> Any:
    """A peer with the row's own text is like any other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demonstrations,
            "_choose",
            lambda peers, scores, config, group_size, seed: [
                list(chosen)
                for chosen in select_demonstrations(
                    scores,
                    [row // group_size for row in range(len(peers))],
                    success_threshold=config.success_reward_threshold,
                    exclude_self=True,
                    policy=config.demonstration_policy,
                    seed=seed,
                    count=config.num_demonstrations,
                    eligible=[peer.is_eligible for peer in peers],
                    lengths=[peer.length for peer in peers],
                )
            ],
        )
        return on_ranks(batch, config, ranks)


CLAIMS = [
    Claim(
        property_the_number_of_processes_does_not_matter,
        on_ranks,
        lambda batch, config, ranks: on_ranks(batch, config, ranks, local=True),
        {"batch": batches(), "config": configs, "ranks": st.sampled_from([2, 3])},
    ),
    Claim(
        property_a_function_gets_each_row_that_can_have_a_loss_once,
        on_ranks,
        partial(on_ranks, local=True),
        {"batch": batches(), "config": configs, "ranks": st.sampled_from([2, 3])},
    ),
    *(
        Claim(
            property_metrics_and_rows_are_those_of_a_loop,
            on_ranks,
            counter_example,
            {"batch": batches(), "config": configs},
        )
        for counter_example in (one_group, masked_like_others, failed_words_alone)
    ),
    Claim(
        property_peers_with_the_row_s_own_text_come_last,
        on_ranks,
        by_index_alone,
        {"batch": batches(), "config": configs},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize(("local", "expected"), [(False, [0.5, 0.5]), (True, [0.0, 1.0])], ids=["all", "own"])
def test_each_of_two_processes_counts_the_completions_of_both(local: bool, expected: list[float]) -> None:
    """The planted counter-example counts those of its own process."""
    batch = Batch([0.0] * 6, ["two"] * 3 + [REPEATED] * 3, [None] * 6, [True] * 6)
    contexts = on_ranks(batch, SDPOConfig(), 2, local=local)
    name = "self_distillation/reprompt_text_fraction"
    assert [context.metrics[name] for context in contexts] == expected


def test_a_reprompt_leaves_tokens_for_its_completion() -> None:
    batch = Batch([1.0, 0.0, 0.0], ["a" * 200, "b", "c" * 40], [None] * 3, [True] * 3)
    config = SDPOConfig(demonstration_policy="first")
    rollout = Rollout(
        [tiny.user("q")] * 3,
        [[{"role": "assistant", "content": text}] for text in batch.completions],
        [len(text) for text in batch.completions],
        batch.completions,
        batch.feedback,
        torch.tensor(batch.scores),
        torch.tensor(batch.scores)[:, None],
    )
    reprompter = Reprompter(Renderer(TOKENIZER), config.templates(), True, "middle")
    context = teacher_context(
        rollout,
        config,
        reprompter,
        has_loss=batch.has_loss,
        group_size=3,
        context_length=150,
        rank=0,
        seed=0,
        gather=list,
    )
    sizes = [len(ids) for ids in context.prompts.ids]
    assert sizes[0] == 0
    assert sizes[1] <= 150 - 1
    assert sizes[2] <= 150 - 40
    assert context.prompts.truncated == [False, True, True]
    assert context.metrics["self_distillation/truncated_reprompt_fraction"] == pytest.approx(2 / 3)

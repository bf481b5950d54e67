"""Two ranks have the losses, gradients and teacher of one, under DDP and under FSDP2.

The ranks run in fresh processes (see rank_driver.py); the tests read what these saw. That one rank does what
the paper says is shown in test_trainer_step.py.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_driver as driver
import tiny
import torch
from filelock import FileLock

from sdpo_rl.teacher.shards import check_strategy, check_zero3_options
from sdpo_rl.teacher.store import TeacherStore

TOLERANCE = 1e-5
BOTH = [*(("ddp", name) for name in driver.RUNS), *(("fsdp2", name) for name in driver.SHARDED_RUNS)]

Observed = dict[str, Any]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all ranks; parallel test workers share one launch."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            driver.launch(shared, "torch")
    return shared


@pytest.fixture(scope="session")
def one(folder: Path) -> Observed:
    return torch.load(folder / "1-0.pt", weights_only=False)


@pytest.fixture(scope="session")
def two(folder: Path) -> list[Observed]:
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(2)]


def gradient_gap(ours: list[Observed], theirs: list[Observed]) -> float:
    """Relative to the norm over all parameters, the largest over the steps."""
    largest = 0.0
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.keys() == reference.keys()
        norm = torch.stack([g.norm() for g in reference.values()]).norm()
        gap = torch.stack([(g - mine[name]).norm() for name, g in reference.items()]).norm()
        largest = max(largest, (gap / norm.clamp(min=1e-30)).item() if gap else 0.0)
    return largest


def column(seen: Observed, name: str) -> list[float]:
    return [entry[name] for entry in seen["log"] if name in entry]


# --- two ranks against one --------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "name"), BOTH, ids=[f"{s}: {n}" for s, n in BOTH])
def test_two_ranks_train_as_one_does(one: Observed, two: list[Observed], strategy: str, name: str) -> None:
    expected = one["ddp", name]
    for rank in two:
        seen = rank[strategy, name]
        assert gradient_gap(seen["gradients"], expected["gradients"]) < TOLERANCE
        for metric in ("loss", "self_distillation/divergence", "self_distillation/teacher_distance"):
            assert column(seen, metric) == pytest.approx(column(expected, metric), rel=TOLERANCE)
        for shown, wanted in zip(seen["teacher"], expected["teacher"], strict=True):
            torch.testing.assert_close(shown, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(seen["student"], expected["student"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("strategy", "name"), [each for each in BOTH if "credit_rows" in driver.RUNS[each[1]].config]
)
def test_the_rows_of_a_report_are_the_main_process_s(
    one: Observed, two: list[Observed], strategy: str, name: str
) -> None:
    assert two[1][strategy, name]["credit"] is None
    alone = {(row["step"], row["row"]): row for row in one["ddp", name]["credit"]}
    rows = [row for row in two[0][strategy, name]["credit"] if row["divergence"] is not None]
    common = [(row, alone[row["step"], row["row"]]) for row in rows if (row["step"], row["row"]) in alone]
    assert bool(common) == (name != "nobody has anything to learn")
    for row, wanted in common:
        for key in ("tokens", "prompt", "teacher_prompt", "feedback", "score", "demonstrations"):
            assert row[key] == wanted[key]
        assert row["log_ratio"] == pytest.approx(wanted["log_ratio"], abs=1e-3)
        assert row["token_divergence"] == pytest.approx(wanted["token_divergence"], abs=1e-3)


@pytest.mark.parametrize(("strategy", "name"), BOTH, ids=[f"{s}: {n}" for s, n in BOTH])
def test_ranks_agree_bit_for_bit_and_the_student_is_restored(
    two: list[Observed], strategy: str, name: str
) -> None:
    first, second = (rank[strategy, name] for rank in two)
    assert all(torch.equal(a, b) for a, b in zip(first["teacher"], second["teacher"], strict=True))
    assert torch.equal(first["student"], second["student"])
    assert first["student came back"]
    assert second["student came back"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_evaluate_as_one_does(one: Observed, two: list[Observed], strategy: str) -> None:
    expected = one["evaluation", "ddp"]
    assert expected["eval_loss"] > 0
    for rank in two:
        seen = rank["evaluation", strategy]
        for name in (
            "eval_loss",
            "eval_self_distillation/divergence",
            "eval_self_distillation/reprompt_sample_fraction",
        ):
            assert seen[name] == pytest.approx(expected[name], rel=TOLERANCE)


@pytest.mark.parametrize("name", driver.EXPERTS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_balance_experts_as_two_micro_batches_do(
    one: Observed, two: list[Observed], strategy: str, name: str
) -> None:
    expected = one["experts", "ddp", name]
    router = column(expected, "aux_loss")
    assert len(router) == driver.STEPS
    assert min(router) > 0
    for rank in two:
        seen = rank["experts", strategy, name]
        assert gradient_gap(seen["gradients"], expected["gradients"]) < TOLERANCE
        for metric in ("loss", "aux_loss", "self_distillation/divergence", "entropy_coef"):
            assert column(seen, metric) == pytest.approx(column(expected, metric), rel=TOLERANCE)
        torch.testing.assert_close(seen["student"], expected["student"], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_runs_differ(one: Observed) -> None:
    """Equality above would mean little if runs did nothing, or all the same."""
    runs = {name: one["ddp", name] for name in driver.RUNS}
    silent = "nobody has anything to learn"
    for name, run in runs.items():
        assert len(run["gradients"]) == driver.STEPS
        learned = gradient_gap(
            run["gradients"], [{n: torch.zeros_like(g) for n, g in s.items()} for s in run["gradients"]]
        )
        assert (learned > 0) == (name != silent), name
    between = runs["steps without signal around one with"]
    assert [loss > 0 for loss in column(between, "loss")] == [False, True, False]
    base = runs["tied"]
    for name in (
        "micro-batches",
        "a step over two generation batches",
        "sequence mean",
        "a GRPO part",
        "a GRPO part with masks and ratios of rows",
        "weights of rows and of some tokens",
        "evidence in a changing GRPO part",
        "a gate",
        "clipped entries",
        "credit of a sequence",
        "routing, and a rank without a distilled row",
        "trust region",
        "live",
    ):
        assert gradient_gap(runs[name]["gradients"], base["gradients"]) > 100 * TOLERANCE, name
    assert column(runs[silent], "loss") == [0.0] * driver.STEPS


def unchanged(before: Observed, after: Observed) -> bool:
    """Whether a step left every weight, moment and teacher shard of this rank as it was, bit for bit."""
    return before["ticks"] == after["ticks"] and all(
        torch.equal(one, other)
        for part in ("own", "averaged", "moments")
        for one, other in zip(values(before[part]), values(after[part]), strict=True)
    )


def values(part: Any) -> list[torch.Tensor]:
    return list(part.values()) if isinstance(part, dict) else part


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_without_signal_on_any_rank_changes_nothing_on_all(two: list[Observed], strategy: str) -> None:
    """AdamW with weight decay; the second of three steps has a signal, on the first rank alone."""
    for rank in two:
        seen = rank[strategy, "steps without signal around one with"]
        first, second, third = seen["steps"]
        assert len(first["moments"]) == 0 < len(second["moments"])
        assert any(not torch.equal(first["own"][name], shard) for name, shard in second["own"].items())
        assert second["ticks"] == 1
        assert unchanged(second, third)
        assert not unchanged(second, {**third, "ticks": 2})
        assert column(seen, "self_distillation/step_without_signal") == [1.0, 0.0, 1.0]


def test_ddp_waits_for_no_parameter_that_text_does_not_reach(two: list[Observed]) -> None:
    for name in ("a multimodal model", "a multimodal model, lora"):
        trained = {name for step in two[0]["ddp", name]["gradients"] for name in step}
        assert any("language_model" in name for name in trained)
        assert not any("visual" in name for name in trained)
    for rank in two:  # the counter-example
        assert rank["unfrozen, with a search"] == ""
        assert "Expected to have finished reduction in the prior iteration" in rank["unfrozen"]


def test_a_mean_per_rank_is_another_number(two: list[Observed], one: Observed) -> None:
    """The counter-example: where one rank has fewer tokens, the mean of the ranks' means is another number."""
    name = "the second rank has nothing to learn"
    (loss, *_), (expected, *_) = column(two[0]["ddp", name], "loss"), column(one["ddp", name], "loss")
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert loss / 2 != pytest.approx(expected, rel=0.1)


def test_unsupported_strategies_are_refused() -> None:
    def accelerator(kind: str, fsdp_version: int | None = None) -> Any:
        plugin = None if fsdp_version is None else SimpleNamespace(fsdp_version=fsdp_version)
        return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=kind)

    check_strategy(accelerator("FSDP", 2), generate_every=2, accumulation_steps=4)
    check_strategy(accelerator("MULTI_GPU"), generate_every=2, accumulation_steps=4)
    check_strategy(accelerator("DEEPSPEED"), generate_every=4, accumulation_steps=2)
    with pytest.raises(ValueError, match=r"FSDP version 1 .*fsdp_version: 2"):
        check_strategy(accelerator("FSDP", 1), generate_every=1, accumulation_steps=1)
    with pytest.raises(ValueError, match=r"DeepSpeed .*\(2\) must be a multiple of .*\(4\)"):
        check_strategy(accelerator("DEEPSPEED"), generate_every=2, accumulation_steps=4)


def with_options(options: dict[str, Any], stage: int = 3) -> Any:
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": options})
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_hpz_partition_size": 2}, r"zero_hpz_partition_size: expected 1, got 2; .*'live'"),
        ({"zero_hpz_partition_size": "2"}, r"zero_hpz_partition_size: expected 1, got '2'; .*'live'"),
        ({"offload_param": {"device": "nvme"}}, r"offload_param: expected .* got 'nvme'; .*'live'"),
        ({"offload_param": {"device": "cpu"}}, r"offload_param: expected .* got 'cpu'; .*'live'"),
    ],
)
def test_weights_that_are_gathered_from_elsewhere_are_refused(options: dict[str, Any], words: str) -> None:
    """DeepSpeed would compute the teacher's forward with the student's weights."""
    with pytest.raises(ValueError, match=words):
        check_zero3_options(with_options(options))
    check_zero3_options(with_options(options, stage=2))


@pytest.mark.parametrize("copies", [0, 1, "auto", None])
def test_weights_in_partitions_are_not_refused(copies: Any) -> None:
    check_zero3_options(with_options({}))
    check_zero3_options(
        with_options({"zero_hpz_partition_size": copies, "offload_param": {"device": "none"}})
    )
    check_zero3_options(with_options({"offload_param": None}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"teacher_mode": "live"}, 0),
        ({"teacher_mode": "live", "anchor_weight": 0.5, "loss_backend": "auto"}, 1),
        ({"teacher_mode": "ema"}, 1),
    ],
)
def test_only_a_run_that_replaces_weights_needs_them(
    settings: dict[str, Any], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's, or those of the start for `anchor_weight`."""
    checked: list[Any] = []
    monkeypatch.setattr("sdpo_rl.teacher.shards.check_zero3_options", checked.append)
    tiny.trainer(tmp_path, sdpo_config=tiny.config(**settings))
    assert len(checked) == expected


def test_a_teacher_follows_its_model_to_another_device() -> None:
    """FSDP and DeepSpeed move the model when training begins; `meta` stands for the other device."""
    model = tiny.model(tie_word_embeddings=False)
    store = TeacherStore(model, tiny.config(), seed=0)
    store.on_train_begin(model)
    model.to("meta")
    store.tick(model)
    (params,) = store.forwards(model, training=True)
    assert params is not None
    assert {tensor.device.type for tensor in params.values()} == {"meta"}
    distance = store.distance(model)
    assert distance is not None
    assert distance.device.type == "meta"


def test_an_offloaded_teacher_stays_on_the_cpu() -> None:
    model = tiny.model(tie_word_embeddings=False)
    store = TeacherStore(model, tiny.config(teacher_offload="cpu"), seed=0)
    store.on_train_begin(model)
    store.forwards(model.to("meta"), training=True)
    assert {tensor.device.type for tensor in store.state.params.values()} == {"cpu"}


# --- rows across ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_demonstrations_cross_ranks(two: list[Observed], strategy: str) -> None:
    """One group of eight rows, four on each rank; its only success is row 6, on the second rank."""
    demonstration = driver.completion(6, 0, True)
    question = "say 0"
    shown = f"{question}\nCorrect solution:\n\n{demonstration}\n\nCorrectly solve the original question."
    remarks = [
        f"{question}\nThe following is feedback from your unsuccessful earlier attempt:\n\n{tiny.remark(text)}\n\n"
        "Correctly solve the original question."
        for text in (driver.completion(row, 0, row == 6) for row in range(8))
    ]
    first, second = (rank[strategy, "a group on both ranks"]["prompts"][0] for rank in two)
    questions = {text.split("\n")[0] for text in (*first, *second) if text}
    assert len(questions) == 1  # one group, whichever question was drawn
    drawn = questions.pop()
    shown, remarks = shown.replace(question, drawn), [text.replace(question, drawn) for text in remarks]
    assert first == [shown] * 4
    assert second == [shown, shown, "", shown]  # row 6 has no other success to read, and failed in nothing


def test_feedback_stays_with_its_row_on_its_rank(two: list[Observed], one: Observed) -> None:
    for name in ("tied", "trust region", "a step over two generation batches", "a group on both ranks"):
        for batch, everything in enumerate(one["ddp", name]["prompts"]):
            assert [*chain(*(rank["ddp", name]["prompts"][batch] for rank in two))] == everything
    remark = tiny.remark(driver.completion(5, 0, False))  # the second group has no success
    assert f"unsuccessful earlier attempt:\n\n{remark}\n\n" in two[1]["ddp", "tied"]["prompts"][0][1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, lora"])
def test_ranks_draw_different_rollouts_and_wait_for_the_longest(two: list[Observed], strategy: str) -> None:
    """One prompt on both ranks, which may write 3 and 9 tokens."""
    first, second = (rank["sampling"][strategy]["completions"] for rank in two)
    assert max(map(len, first)) <= 3
    assert 3 < max(map(len, second)) <= 9
    assert {tuple(row[:3]) for row in first}.isdisjoint(tuple(row[:3]) for row in second)


def test_a_rank_waits_while_another_calls_tools(two: list[Observed]) -> None:
    """Two rows of the first rank take two more turns; the second rank generates one row at each."""
    assert [rank["turns"]["turns"] for rank in two] == [[4, 2, 2], [4, 1, 1]]
    assert two[0]["turns"]["loss"] == two[1]["turns"]["loss"] > 0


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["", "lora"], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_within_a_generation_batch(two: list[Observed], strategy: str, adapter: str) -> None:
    for rank in two:
        whole, resumed = (rank["resume", strategy, adapter][part] for part in ("whole", "resumed"))
        assert len(whole["gradients"]) == 5
        assert len(resumed["gradients"]) == 2
        assert gradient_gap(resumed["gradients"], whole["gradients"][3:]) == 0.0
        for part in ("student", "teacher", "optimizer"):
            assert all(torch.equal(a, b) for a, b in zip(resumed[part], whole[part], strict=True))
        assert len(whole["optimizer"]) > 0
        assert not torch.equal(resumed["student"][:, :-1], resumed["teacher"][0])
        for metric in ("loss", "self_distillation/teacher_distance", "reward"):
            assert column(resumed, metric) == column(whole, metric)


def test_two_ranks_resume_what_one_rank_saved(one: Observed, two: list[Observed]) -> None:
    whole = one["more ranks"]
    for rank in two:
        resumed = rank["more ranks"]
        assert gradient_gap(resumed["gradients"], whole["gradients"][2:]) < TOLERANCE
        torch.testing.assert_close(resumed["teacher"], whole["teacher"], rtol=TOLERANCE, atol=TOLERANCE)


# --- other weights in a sharded model ---------------------------------------------------------------------


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_replaced_parameter_is_used_and_restored(two: list[Observed], head: str) -> None:
    names = {name for name, _ in tiny.model(tie_word_embeddings=head == "tied").named_parameters()}
    for rank in two:
        seen = rank["exchange"][head]
        assert seen["errors"].keys() == names
        assert max(seen["errors"].values()) < 1e-4
        assert min(seen["unseen"].values()) > 1e-2  # the replaced parameter would have been missed
        assert max(seen["gaps"].values()) < 1e-6
        assert seen["round trip"]


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_replacement_without_resharding_is_detected(two: list[Observed], head: str) -> None:
    """The counter-example: units that stay gathered after a forward have their old values."""
    stale = two[0]["exchange"][head]["stale"]
    assert {name for name, error in stale.items() if error > 1e-2} >= {"model.norm.weight"}

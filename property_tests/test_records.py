"""Every figure of the README and docs/ equals the record it comes from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any
from xml.etree import ElementTree

import pytest

from sdpo_rl import _validate

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "examples" / "benchmarks" / "records"
DEMO = json.loads((ROOT / "examples" / "demo" / "record.json").read_text())
PICTURE = (ROOT / "docs" / "images" / "demo.svg").read_text()
README = (ROOT / "README.md").read_text()
DEBT = (ROOT / "DEBT.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
LOSSES = (ROOT / "docs" / "losses.md").read_text()
UNSLOTH = (ROOT / "docs" / "unsloth.md").read_text()
LORA = (ROOT / "docs" / "lora.md").read_text()
NUMERICS = (ROOT / "docs" / "numerics.md").read_text()
RECIPES = ROOT / "examples" / "recipes"
LEVELS = ("flat", "ordinary", "peaked")


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def demo_runs(arm: str) -> list[dict[int, float]]:
    """The held-out probability by samples, one curve per seed."""
    runs = [run for run in DEMO["runs"] if run["arm"] == arm]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    return [dict(zip(run["samples"], run["probability"], strict=True)) for run in runs]


def demo_mean(arm: str) -> dict[int, float]:
    runs = demo_runs(arm)
    return {samples: fmean(run[samples] for run in runs) for samples in runs[0]}


def loss(shape: int) -> dict[str, dict[str, float]]:
    """Results by name; `over` is the time over that of the matrix products alone."""
    rows = {row["name"]: row for row in record("loss-h100")["shapes"][shape]["results"] if "ms" in row}
    return {name: row | {"over": row["ms"] / rows["floor"]["ms"]} for name, row in rows.items()}


def weighed() -> Iterator[str]:
    """The fused loss with weights that depend on the row, over the same loss without."""
    ratios: dict[str, list[str]] = {}
    for shape in record("loss-weights-h200")["shapes"]:
        ms = {row["name"]: row["ms"] for row in shape["results"]}
        for name in ("fused, half of the tokens", "fused, confidence weights"):
            ratios.setdefault(name, []).append(f"{ms[name] / ms['fused']:.2f}")
    half, confidence = (" and ".join(ratio) for ratio in ratios.values())
    yield f"`token_fraction=0.5` takes {half} of the time"
    yield f'`token_weights="confidence"` {confidence}'


def prompts_once() -> Iterator[str]:
    """A step with packed rows, every prompt once, beside other layouts: of GRPO's time."""
    for name in ("7b-prompts", "7b-ragged", "0.5b-ragged", "7b-full"):
        known = record(f"step-{name}-h200")
        batch, ratios = known["batch"], known["ratios"]
        layouts = {"7b-full": ["auto", "", "padded"], "0.5b-ragged": ["packed", "", ""]}.get(
            name, ["packed", "packed,each", ""]
        )
        times = [f"{ratios[f'time sdpo[{layout}]/grpo']:.2f} " if layout else "" for layout in layouts]
        cells = f"{batch['tokens']}, {batch['tokens_prompts_once']} | {times[0]}| {times[1]}| {times[2]}|"
        yield f"(../examples/benchmarks/records/step-{name}-h200.json)) | {cells}"


def exponent(number: float) -> str:
    mantissa, power = f"{number:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def bound(number: float) -> str:
    """Rounded up, never down."""
    rounded = exponent(number)
    return rounded if float(rounded) >= number else exponent(number + 10.0 ** math.floor(math.log10(number)))


def readme_demo() -> Iterator[str]:
    def shown(arm: str, samples: int) -> str:
        return f"{demo_mean(arm)[samples]:.2f}".lstrip("0")

    arms = ("SDPO", "GRPO", "SDPO, peers only", "SDPO, shuffled feedback")
    assert set(arms) == set(DEMO["arms"])
    last = max(demo_mean("SDPO"))
    sdpo, grpo, peers, shuffled = (shown(arm, last) for arm in arms)
    *first, third = (f"{run[last]:.2f}" for run in demo_runs(arms[-1]))
    said = f"{', '.join(first)} and {third}"
    text = " ".join((ROOT / "examples/demo/report.py").read_text().split())
    assert f"the three of the recorded run end at {said}.</li>" in text
    each = said.replace("0.", ".")
    yield (
        f"After {last} samples the right answer has a probability of {sdpo} with SDPO, {grpo} with GRPO, "
        f"{peers} with peers' solutions only, and {shuffled} with the feedback shuffled between rows ({each}); "
        f"at the start it is {shown('SDPO', 0)} (means of three seeds"
    )
    yield f"three seeds, `make demo SEEDS={len(demo_runs('SDPO'))}`"


def readme_private_api() -> Iterator[str]:
    folder = ROOT / "examples" / "private_api" / "records"

    def ends(name: str, samples: int = 9600) -> list[float]:
        """Accuracy of greedy answers at the end, as the judge found it, by seed."""
        paths = sorted(folder.glob(f"{name}-[0-9].json"))
        assert [int(path.stem[-1]) for path in paths] == [0, 1, 2]
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        assert {(run["accuracy"], run["points"][-1][0]) for run in runs} == {("judged", samples)}
        return [run["points"][-1][2] for run in runs]

    def listed(values: list[float]) -> str:
        *others, last = (f"{value:.2f}" for value in values)
        return f"{', '.join(others)} and {last}"

    chosen = "SDPO-chosen-settings"
    (grpo,) = {
        end
        for arm in ("GRPO", "SDPO-shuffled-feedback", f"{chosen}-shuffled-feedback")
        for end in ends(f"kit-learns-{arm}")
    }
    yield (
        f"SDPO {listed(ends('kit-learns-SDPO'))} with α=0.5, and {listed(ends(f'kit-learns-{chosen}'))} with "
        "settings chosen among seventeen"
    )
    yield f"GRPO ends at {grpo:.2f}, and so does SDPO with the feedback shuffled between rows."
    long = listed(ends(f"kit-lasting-{chosen}", samples=48000))
    yield f"In runs five times as long these settings end at {long}"
    assert ends("kit-lasting-fast-teacher", samples=48000) == [0, 0, 0]
    yield "α=0 with the faster teacher alone loses [everything on all seeds](docs/results.md#does-it-last)"
    one = listed(ends("kit-lasting-fast-teacher-hybrid-λ=0.5-to-1", samples=48000))
    yield f"a share of GRPO that grows from half to all of the loss, runs end at {one}, but on two of these seeds"
    faster = [
        json.loads(path.read_text(encoding="utf-8"))["points"][-1][2]
        for path in sorted(folder.glob("kit-lasting-settings-SDPO-chosen-settings-λ=0.5-to-1-*.json"))
    ]
    yield f"with twice the learning rate two other seeds end at {listed(faster)}."
    lasts = listed(ends("kit-lasting-default-rate-hybrid-λ=0.5-to-1-decay", samples=48000))
    yield (
        f"chosen among seven on other seeds) each seed ends at its highest accuracy, {lasts}, and at most a tenth"
    )
    reached = ends(f"house_style-learns-{chosen}")
    (alone,) = {*ends("house_style-learns-GRPO"), *ends("house_style-learns-SDPO")}
    yield (
        f"the chosen settings end at {listed(reached)}, after a best of 1.00 each, on functions that training "
        "never asks for, GRPO and "
        f"α=0.5 at {alone:.2f}"
    )


def small_paths() -> str:
    """What three paths save together of a ragged step of a small model."""
    saved = 1 - record("step-0.5b-ragged-h200")["ratios"]["time sdpo[packed]/sdpo-plain[packed]"]
    return f"with the fused LoRA forward and the toggle {saved * 100:.0f} % of a [ragged 0.5B step]"


def small_step() -> str:
    """A ragged step of a small model, where the GPU waits for the host."""
    known = record("step-0.5b-ragged-h200")
    ratios, share = known["ratios"], known["batch"]["fill_prompts_once"]
    ours, plain = (f"time sdpo{kind}[packed]" for kind in ("", "-plain"))
    times = [ratios[f"{ours}/grpo"], ratios[f"{ours}/trl-sdpo"], ratios[f"{plain}/trl-sdpo"]]
    return (
        f"takes {times[0]:.2f} of GRPO and {times[1]:.2f} of TRL's SDPO, with "
        f"{share * 100:.0f} % of the tokens of its padded batch "
        "([record](../examples/benchmarks/records/step-0.5b-ragged-h200.json)). Without the fused LoRA forward, "
        "the faster way to disable gradient checkpointing and reentrant checkpointing it takes "
        f"{times[2]:.2f} of TRL's SDPO"
    )


def readme_loss() -> Iterator[str]:
    rows = loss(1)
    labels = {
        "**`sdpo.fused_distillation_loss`**": "fused",
        "TRL's SDPO, top-K": "TRL SDPO",
        "log-softmax, top-K": "log-softmax, top-K",
        "TRL's chunked divergence (full vocabulary)": "TRL chunked divergence",
    }
    for label, name in labels.items():
        bold = "**" if name == "fused" else ""
        over, memory = f"{rows[name]['over']:.2f}", f"{rows[name]['beside_gradients_gib']:.1f} GiB"
        yield f"| {label} | {bold}{over}{bold} | {bold}{memory}{bold} |"


def trainable_head() -> Iterator[str]:
    wide, narrow = loss(2)["fused"], loss(3)["fused"]
    yield f"{wide['over']:.2f} and {wide['beside_gradients_gib']:.1f} GiB at 8192 × 3584 × 152064"
    yield f"{narrow['over']:.2f} and {narrow['beside_gradients_gib']:.1f} GiB at 4096 × 896 × 151936"


def readme_step() -> Iterator[str]:
    for name, label in {"7b": "Qwen2.5-7B", "0.5b": "Qwen2.5-0.5B"}.items():
        known = record(f"step-{name}-h100")
        ratios, rows = known["ratios"], known["options"]["rows"]
        yield (
            f"| {label}, {rows} | {ratios['time sdpo/trl-sdpo']:.2f} | {ratios['memory sdpo/trl-sdpo']:.2f} | "
            f"{ratios['time sdpo/grpo']:.2f} | {1 / ratios['time sdpo/sdpo-half']:.2f} of the time |"
        )
    peer, grpo = without_special_paths("7b")
    yield f"a 7B step of the table takes {peer} of the time of TRL's SDPO and {grpo} of that of GRPO"
    once = record("step-7b-prompts-h200")["ratios"]
    time, memory = (once[f"{measure} sdpo[packed]/grpo"] for measure in ("time", "memory"))
    yield f"takes {time:.2f} of the time and {memory:.2f} of the memory above the weights of GRPO"
    few = record("step-7b-ragged-h200")["ratios"]
    grpo, peer = (few[f"time sdpo[packed]/{name}"] for name in ("grpo", "trl-sdpo"))
    yield f"prompts of 135 tokens it takes {grpo:.2f} of the time of GRPO and {peer:.2f} of that of TRL's SDPO"


def without_special_paths(name: str) -> list[str]:
    """The time of a step over that of TRL's SDPO and of GRPO, without what these could have as well."""
    ratios = record(f"step-{name}-h100")["ratios"]
    return [f"{ratios[f'time sdpo-plain/{peer}']:.2f}" for peer in ("trl-sdpo", "grpo")]


def beside_peers() -> Iterator[str]:
    for name, label in {"7b": "Qwen2.5-7B", "0.5b": "Qwen2.5-0.5B"}.items():
        peer, grpo = without_special_paths(name)
        yield f"{peer} of TRL's SDPO and {grpo} of GRPO ({label})"
    hybrid = 1 / record("step-7b-h100")["ratios"]["time sdpo/sdpo-hybrid"]
    yield f"(`grpo_weight=0.1`) the 7B step of that table takes {hybrid:.2f} of its time without"


def ragged() -> Iterator[str]:
    packed, padded = record("step-7b-ragged-h200"), record("step-7b-ragged-h100")

    def cells(ratios: dict[str, float], layout: str) -> str:
        names = (
            f"{measure} sdpo[{layout}]/{peer}"
            for peer in ("grpo", "trl-sdpo")
            for measure in ("time", "memory")
        )
        return " | ".join(f"{ratios[name]:.2f}" for name in names)

    once = record("step-7b-prompts-h200")["ratios"]
    time, memory = (once[f"{measure} sdpo[packed]/grpo"] for measure in ("time", "memory"))
    yield f"step-7b-prompts-h200.json)) | {time:.2f} | {memory:.2f} | – | – |"
    yield f"step-7b-ragged-h200.json)) | {cells(packed['ratios'], 'packed')} |"
    yield f"a prompt read with every completion | {cells(packed['ratios'], 'packed,each')} |"
    assert packed["batch"]["tokens"] == padded["batch"]["tokens"]
    fill, link = (
        f"{padded['batch']['fill'] * 100:.0f} %",
        "../examples/benchmarks/records/step-7b-ragged-h100.json",
    )
    yield (
        f"padded: tokens fill {fill} of the batch ([record]({link}) of one H100) | "
        f"{cells(padded['ratios'], 'padded')} |"
    )


def accuracy() -> Iterator[str]:
    known = record("loss-accuracy-h100")
    ours = [known[level]["errors"]["fused"] for level in LEVELS]
    peers = [
        known[level]["errors"][name]
        for level in LEVELS
        for name in ("logsumexp, top-K, gather", "log-softmax, top-K")
    ]

    def among(rows: list[dict[str, float]], key: str) -> tuple[str, str]:
        return exponent(min(row[key] for row in rows)), exponent(max(row[key] for row in rows))

    least, most = among(ours, "value_median")
    yield f"{least} to {most} (median), {bound(max(row['value_max'] for row in ours))} at worst"
    yield f"norm of the hidden gradient by {bound(max(row['gradient_norm'] for row in ours))} at most"
    least, most = among(peers, "value_median")
    norm = among(peers, "gradient_norm")[1]
    yield f"medians are {least} to {most}, and the gradient's norm is off by up to {norm}"


def readme_recipe() -> Iterator[str]:
    cases = record("recipe-h200")["cases"]
    yield f"trains with at most {cases['Unsloth 4-bit SDPO']['peak_gib']:.2f} GiB allocated"
    yield f"Unsloth's GRPO with {cases['Unsloth 4-bit GRPO']['peak_gib']:.2f} GiB"


def numerics_accuracy() -> Iterator[str]:
    least_and_worst, _, medians = accuracy()
    yield least_and_worst.replace(" (median), ", " (median), and ")
    yield medians.partition(", and the gradient")[0]


def recipe_gib(name: str) -> str:
    return f"{record('recipe-h200')['cases'][name]['peak_gib']:.1f} GiB"


def guide() -> Iterator[str]:
    known = record("recipe-h200")
    cases = known["cases"]
    labels = {
        "Unsloth 4-bit, SDPO: the recipe": "Unsloth 4-bit SDPO",
        "the same, completions of 2048 tokens, reprompts of 4096": "Unsloth 4-bit SDPO, 2048 + 4096",
        "Unsloth 4-bit, GRPO": "Unsloth 4-bit GRPO",
        "Unsloth 4-bit, SDPO, four rows a micro-batch": "Unsloth 4-bit SDPO, 4 rows",
        "Unsloth 4-bit, GRPO, four rows": "Unsloth 4-bit GRPO, 4 rows",
        "Unsloth 4-bit, `sdpo-rl` 0.0.3, four rows": "sdpo-rl 0.0.3, Unsloth 4-bit, 4 rows",
        "Unsloth bf16, SDPO": "Unsloth bf16 SDPO",
        "TRL 4-bit, SDPO": "TRL 4-bit SDPO",
        "TRL 4-bit, GRPO": "TRL 4-bit GRPO",
        "TRL bf16, SDPO": "TRL bf16 SDPO",
        "TRL bf16, GRPO": "TRL bf16 GRPO",
    }
    assert set(labels.values()) == set(cases)
    for label, name in labels.items():
        case = cases[name]
        teacher = f"{case['teacher_mib']:.0f} MiB" if case["teacher_mib"] else "–"
        yield f"| {label} | {case['loaded_gib']:.2f} | {case['peak_gib']:.2f} | {teacher} |"

    def seconds(name: str, key: str) -> str:
        later = sorted(cases[name][key][1:])
        return f"{sum(later) / 2:.1f} s" if len(later) == 2 else f"{later[len(later) // 2]:.1f} s"

    sdpo, grpo = "Unsloth 4-bit SDPO", "Unsloth 4-bit GRPO"
    yield f"{seconds(sdpo, 'step_seconds')} with SDPO, {seconds(grpo, 'step_seconds')} with Unsloth's GRPO"
    generating = seconds(sdpo, "generation_seconds").removesuffix(" s")
    yield f"of which {generating} and {seconds(grpo, 'generation_seconds')} are generation"
    yield f"{seconds('TRL 4-bit SDPO', 'step_seconds')} with SDPO over plain TRL"
    fast, plain = cases[sdpo], cases["TRL 4-bit SDPO"]
    yield f"takes Unsloth {fast['load_seconds']:.1f} s and plain transformers {plain['load_seconds']:.1f} s"
    yield f"on top of {fast['import_seconds']:.0f} s and {plain['import_seconds']:.1f} s for the imports"


def ablation() -> Iterator[str]:
    """What each special path pays: of a step, the faster of two runs; of the loss, the median of three."""
    known = record("ablation-h200")
    steps = {
        shape: {arm: [run["seconds"] for run in runs] for arm, runs in arms.items()}
        for shape, arms in known["step"].items()
    }

    def saved(shape: str, arm: str) -> float:
        return 1 - min(steps[shape]["on"]) / min(steps[shape][arm])

    def spread(shape: str) -> float:
        return max(steps[shape]["on"]) / min(steps[shape]["on"]) - 1

    seven = {arm: f"{saved('7b', arm):.0%}".replace("%", " %") for arm in steps["7b"]}
    half = f"{saved('0.5b', 'no_lora'):.0%}".replace("%", " %")
    yield f"| fused LoRA forward | {seven['no_lora']} of the time of a 7B step, {half} of a 0.5B step |"
    yield f"| – its autograd function alone | {seven['lora_simple']} of a 7B step |"
    yield f"| – its base product last | {seven['lora_base_first']} of a 7B step |"
    yield f"| checkpointing toggle | {seven['no_checkpointing_aside']} of a 7B step |"
    noise = [f"{spread(shape):.0%}".replace("%", " %") for shape in ("7b", "0.5b")]
    yield f"differs by {noise[0]} (7B) and {noise[1]} (0.5B)"
    assert abs(saved("0.5b", "no_checkpointing_aside")) < spread("0.5b")
    assert saved("7b", "no_layout_no_all_modules") < spread("7b")
    assert all(
        saved("7b", arm) > spread("7b") for arm in ("no_lora", "lora_simple", "no_checkpointing_aside")
    )

    worst = {
        arm: max(known["accuracy"][level][arm]["value_max"] for level in LEVELS)
        for arm in known["accuracy"]["flat"]
    }
    without = [worst[arm] for arm in ("no_correction", "no_exact_logits")]
    flat = known["accuracy"]["flat"]["no_correction"]["value_max"]
    yield f"error is {bound(worst['on'])} at most, without them {bound(flat)} to {bound(max(without))}"

    losses = known["loss"].values()
    gains = [1 - median(loss["ms"]["on"]) / median(loss["ms"]["no_shared_buffer"]) for loss in losses]
    yield f"{min(gains) * 100:.0f} to {max(gains) * 100:.0f} % of the time of the loss alone"
    wide = known["loss"]["(8192, 3584, 152064, False)"]
    of_step = (
        (median(wide["ms"]["no_shared_buffer"]) - median(wide["ms"]["on"])) / 1e3 / min(steps["7b"]["on"])
    )
    more = wide["gib"]["on"] / wide["gib"]["no_shared_buffer"] - 1
    yield f"which is {of_step * 100:.1f} % of a 7B step, for {more * 100:.0f} % more memory of the loss"


PAGES = [
    *(
        (README, line)
        for part in (
            readme_demo,
            readme_private_api,
            readme_loss,
            readme_step,
            numerics_accuracy,
            readme_recipe,
        )
        for line in part()
    ),
    *(
        (PERFORMANCE, line)
        for part in (ablation, prompts_once, beside_peers, ragged, trainable_head, accuracy)
        for line in part()
    ),
    (PERFORMANCE, small_step()),
    (PERFORMANCE, small_paths()),
    *((LOSSES, line) for line in weighed()),
    *((UNSLOTH, line) for line in guide()),
    *((NUMERICS, line) for line in numerics_accuracy()),
    (LORA, f"{recipe_gib('Unsloth 4-bit SDPO')} with SDPO in 4 bits"),
    (LORA, f"{recipe_gib('TRL bf16 SDPO')} in bfloat16 without Unsloth"),
    ((RECIPES / "lora_24gb.yaml").read_text(), f"{recipe_gib('TRL bf16 SDPO')} at the peak in the record"),
    (
        (RECIPES / "unsloth_4bit.yaml").read_text(),
        f"{recipe_gib('Unsloth 4-bit SDPO')} allocated at the peak (record",
    ),
]


@pytest.mark.parametrize(("page", "line"), PAGES, ids=[line for _, line in PAGES])
def test_a_figure_equals_its_record(page: str, line: str) -> None:
    assert " ".join(line.split()) in " ".join(page.split())


def test_a_wrong_figure_is_noticed() -> None:
    page, line = next(readme for readme in PAGES if "fused" in readme[1])
    assert line.replace("1.", "2.") not in page


def check_picture(picture: str) -> None:
    """Every mean, band and last value, in the scale of the ticks; coordinates have one decimal."""
    svg = ElementTree.fromstring(picture)
    texts = {(t.get("text-anchor"), t.text): t for t in svg.findall("{*}text")}
    left, right = (float(texts["middle", tick].get("x", "")) for tick in ("0", "5000"))
    bottom, top = (float(texts["end", tick].get("y", "")) for tick in ("0", "1"))

    def points(shape: ElementTree.Element, curve: list[tuple[int, float]]) -> None:
        found = [tuple(map(float, point.split(","))) for point in shape.get("points", "").split()]
        expected = [
            (left + samples / 5000 * (right - left), bottom + probability * (top - bottom))
            for samples, probability in curve
        ]
        assert found == [pytest.approx(point, abs=0.11) for point in expected]

    names = svg.findall("{*}text")[-len(DEMO["arms"]) :]  # of the legend
    values = {text.get("class"): text.text for text in svg.findall("{*}text") if text.get("class")}
    shapes = zip(svg.findall("{*}polyline"), svg.findall("{*}polygon"), strict=True)
    for name, arm, (line, band) in zip(names, DEMO["arms"], shapes, strict=True):
        assert name.text == arm
        color = line.get("class", "").split()[-1]
        assert values[f"value {color}"] == f"{demo_mean(arm)[5120]:.2f}"
        points(line, list(demo_mean(arm).items()))
        seeds = [(at, [run[at] for run in demo_runs(arm)]) for at in demo_mean(arm)]
        points(band, [(at, max(of)) for at, of in seeds] + [(at, min(of)) for at, of in reversed(seeds)])


def test_the_picture_shows_the_record() -> None:
    check_picture(PICTURE)
    svg = ElementTree.fromstring(PICTURE)
    lines = [svg.findall(f"{{*}}{shape}")[0].get("points", "") for shape in ("polyline", "polygon")]
    wrong = [(line, line[:-1] + str((int(line[-1]) + 5) % 10)) for line in lines]
    for right, other in [*wrong, (">0.94<", ">0.95<"), (">SDPO<", ">GRPO<")]:
        assert right in PICTURE
        with pytest.raises((AssertionError, KeyError)):
            check_picture(PICTURE.replace(right, other))


def test_statements_of_the_readme_on_the_demo_hold() -> None:
    seconds = [sum(run["seconds"] for run in DEMO["runs"] if run["seed"] == seed) for seed in range(3)]
    assert max(seconds) < 120
    sdpo, peers, grpo = (demo_mean(arm) for arm in ("SDPO", "SDPO, peers only", "GRPO"))
    assert all(sdpo[samples] > max(peers[samples], grpo[samples]) for samples in sdpo if samples)
    assert peers[5120] == pytest.approx(grpo[5120], abs=0.01)
    for right, shuffled in zip(demo_runs("SDPO"), demo_runs("SDPO, shuffled feedback"), strict=True):
        assert shuffled[1024] - shuffled[0] < (right[1024] - right[0]) / 2


def test_the_page_of_the_trainer_names_the_options_that_are_refused() -> None:
    named = re.search(r"is refused \(([^)]*)\)", (ROOT / "docs" / "trainer.md").read_text())
    assert named
    assert set(re.findall(r"`(\w+)`", named[1])) == set(_validate._OF_POLICY)


def test_records_contain_no_paths() -> None:
    demo = ROOT / "examples" / "demo"
    for path in (*RECORDS.glob("*.json"), *demo.glob("*record.json"), *demo.glob("records/*.json")):
        assert not re.search(r"[\"' =]/\w", path.read_text()), path

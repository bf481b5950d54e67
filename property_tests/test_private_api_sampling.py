"""Sampling with CUDA graphs: the step without a graph against `generate`, on a GPU the graph against the step."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from private_api_cases import HERE, save_model
from test_device_reads import Reads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(HERE))

import arms
import sampling
import train

VOCABULARY, PAD, EOS = 40, 0, 1


def make_model(seed: int = 0, device: str = "cpu", **changes: Any) -> Any:
    """A random model whose tokens depend on its context: the weights are larger than at initialization."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **changes,
    )
    model = Qwen2ForCausalLM(config).to(device)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


def call(lengths: list[int], *, seed: int = 0, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """Arguments of `generate`, as the trainer gives them, for prompts of some lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    given = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": PAD, "bos_token_id": None}
    given |= {"eos_token_id": [EOS], "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
    given |= {"repetition_penalty": 1.0, "cache_implementation": None, "disable_compile": True}
    return {
        "input_ids": ids.masked_fill(~mask, PAD).to(device),
        "attention_mask": mask.long().to(device),
        "generation_config": GenerationConfig(**{**given, **options}),
    }


def own(
    model: Any, autocast: torch.dtype | None = None
) -> tuple[Callable[..., Tensor], list[dict[str, Any]]]:
    """The replaced `generate`, and the calls that went on to the model's own."""
    passed: list[dict[str, Any]] = []

    def original(**kwargs: Any) -> Tensor:
        passed.append(kwargs)
        return type(model).generate(model, **kwargs)

    model.generate = original
    sampling.sample_with_graphs(model, autocast)
    return model.generate, passed


def same(generate: Callable[..., Tensor], model: Any, arguments: dict[str, Any], seed: int = 0) -> bool:
    torch.manual_seed(seed)
    ours = generate(**arguments)
    torch.manual_seed(seed)
    theirs = type(model).generate(model, **arguments)
    return torch.equal(ours, theirs)


# Rows, prompt lengths around the multiple they are padded to, and completions of different lengths.
SHAPES = ([5, 3, 9], [64, 1], [65, 2, 30, 64], [5, 9, 1], [7])


@pytest.mark.parametrize("eos", [[EOS], [EOS, 5, 6, 7, 8], list(range(1, VOCABULARY, 2))], ids=len)
def test_samples_are_those_of_generate(eos: list[int]) -> None:
    model = make_model()
    generate, passed = own(model)
    widths = set()
    for seed, lengths in enumerate(SHAPES):
        for tokens in (20, 8, 1):
            arguments = call(lengths, seed=seed, eos_token_id=eos, max_new_tokens=tokens)
            assert same(generate, model, arguments, seed)
            widths.add(generate(**arguments).shape[1] - max(lengths))
    assert not passed
    assert len(widths) > 3 or eos == [EOS]


def test_padding_that_is_the_end() -> None:
    model = make_model()
    generate, passed = own(model)
    assert all(same(generate, model, call(lengths, pad_token_id=7, eos_token_id=7)) for lengths in SHAPES)
    assert not passed


def test_greedy_tokens_are_those_of_generate() -> None:
    for seed in range(3):
        model = make_model(seed)
        generate, passed = own(model)
        for lengths in SHAPES:
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            assert same(generate, model, call(lengths, seed=seed, eos_token_id=[EOS, 3, 4, 5], **greedy))
            assert same(generate, model, call(lengths, seed=seed))
        assert not passed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_modes_of_torch_and_of_the_model(training: bool, inference: bool) -> None:
    model = make_model().train(training)
    generate, passed = own(model)
    with torch.inference_mode(inference):
        assert same(generate, model, call([4, 6]))
    assert same(generate, model, call([5, 2]))
    assert not passed


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_autocast_of_the_forward(tied: bool) -> None:
    models = [make_model(tie_word_embeddings=tied) for _ in range(2)]
    drawn = []
    for model, cast in zip(models, (None, torch.bfloat16), strict=True):
        drawn.append(own(model, cast))
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    for change in (0.0, 0.3):
        for model in models:
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight), alpha=change)
        for seed, lengths in enumerate(SHAPES):
            samples = []
            for generate, _ in drawn:
                torch.manual_seed(seed)
                samples.append(generate(**call(lengths, seed=seed)))
            assert torch.equal(*samples)
    assert not any(passed for _, passed in drawn)


def test_a_prompt_of_several_rows_is_read_once() -> None:
    model = make_model()
    generate, passed = own(model)
    arguments = call([5, 3, 3, 9])
    for name in ("input_ids", "attention_mask"):
        arguments[name] = arguments[name].repeat_interleave(torch.tensor([3, 1, 2, 1]), dim=0)
    read = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    torch.manual_seed(0)
    generate(**arguments)
    assert read[:2] == [(4, sampling.PROMPT_MULTIPLE), (7, 1)]
    assert same(generate, model, arguments)
    assert not passed


def test_adapters() -> None:
    model = make_model()
    _, passed = own(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    arguments = call([5, 3, 9])
    torch.manual_seed(0)
    ours = adapted.generate(**arguments)
    assert not passed
    torch.manual_seed(0)
    assert torch.equal(ours, type(model).generate(model, **arguments))
    with adapted.disable_adapter():
        torch.manual_seed(0)
        assert not torch.equal(ours, type(model).generate(model, **arguments))


def test_samples_follow_weights_that_change_in_place() -> None:
    model = make_model()
    generate, _ = own(model)
    arguments = call([5, 3, 9])
    assert same(generate, model, arguments)
    torch.manual_seed(0)
    before = generate(**arguments)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    assert same(generate, model, arguments)
    torch.manual_seed(0)
    assert not torch.equal(generate(**arguments), before)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    logits[3] = -torch.inf
    count = 200_000
    found = torch.bincount(sampling.draw(logits.expand(count, -1)), minlength=12) / count
    expected = logits.softmax(-1)
    assert found[3] == 0
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": None},  # 50, then
        {"do_sample": None},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"bad_words_ids": [[4]]},
        {"min_new_tokens": 3},
    ],
    ids=str,
)
def test_other_options_are_left_to_generate(options: dict[str, Any]) -> None:
    model = make_model()
    generate, passed = own(model)
    assert same(generate, model, call([5, 3], **options))
    assert len(passed) == 1


def test_other_calls_are_left_to_generate() -> None:
    model = make_model()
    generate, passed = own(model)
    arguments = call([5, 3])
    generate(**arguments, max_new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        generate(**arguments)
    model.generation_config.top_k = 3
    generate(**{**arguments, "generation_config": GenerationConfig(do_sample=True, max_new_tokens=2)})
    assert len(passed) == 3


def test_a_model_is_copied_without_its_graphs() -> None:
    model = make_model()
    generate, _ = own(model)
    generate(**call([5, 3]))
    assert copy.deepcopy(model).generate is generate


def skip_positions(sampler: Any) -> None:
    logits = sampler._logits
    sampler._logits = lambda ids, attended, positions, cache: logits(
        ids, attended, positions + (sampler._slot if ids.shape[1] == 1 else 0), cache
    )


def attend_to_padding(sampler: Any) -> None:
    logits = sampler._logits
    sampler._logits = lambda ids, attended, *others: logits(ids, torch.ones_like(attended), *others)


def keep_cache(sampler: Any) -> None:
    append = sampler._append

    def forget(logits: Tensor) -> None:
        append(logits)
        for layer in sampler._cache.layers:
            layer.cumulative_length.sub_(1)

    sampler._append = forget


@pytest.mark.parametrize("change", [skip_positions, attend_to_padding, keep_cache])
def test_a_wrong_step_is_found(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(sampling.Sampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            change(self)

    monkeypatch.setattr(sampling, "Sampler", Wrong)
    model = make_model()
    generate, passed = own(model)
    assert not all(same(generate, model, call(lengths)) for lengths in SHAPES)
    assert not passed


def sampler(model: Any, arguments: dict[str, Any]) -> sampling.Sampler:
    ids = arguments["input_ids"]
    return sampling.Sampler(model, len(ids), 64, arguments["generation_config"])


class NoReads(TorchDispatchMode):
    """Refuses operations whose result the host needs, also where torch's own code asks for them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refused = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "multinomial")
        assert function.overloadpacket.__name__ not in refused, function
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_and_moves_nothing() -> None:
    """What a graph needs: no value goes to the host, and what it reads and writes stays where it is."""
    arguments = call([5, 3])
    used = sampler(make_model(), arguments)
    with torch.no_grad():
        used.start(arguments["input_ids"], arguments["attention_mask"])
        tensors = {name: value for name, value in vars(used).items() if isinstance(value, Tensor)}
        for index, layer in enumerate(used._cache.layers):
            tensors |= {f"{index} {name}": value for name, value in vars(layer).items()}
        places = {name: value.data_ptr() for name, value in tensors.items() if isinstance(value, Tensor)}
        with Reads() as reads, NoReads():
            used.step()
        assert not reads.counts
        used.start(arguments["input_ids"], arguments["attention_mask"])
    after = {name: value for name, value in vars(used).items() if isinstance(value, Tensor)}
    for index, layer in enumerate(used._cache.layers):
        after |= {f"{index} {name}": value for name, value in vars(layer).items()}
    assert places == {name: value.data_ptr() for name, value in after.items() if isinstance(value, Tensor)}
    assert len(places) > 10


def test_a_run_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the step without a graph draws what `generate` draws, so that the runs are the same."""
    folder = save_model(tmp_path / "model")
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    records = []
    used = []
    start = sampling.Sampler.start
    monkeypatch.setattr(sampling.Sampler, "start", lambda self, *args: used.append(1) or start(self, *args))
    for given in ((), ("--sampling", "graph")):
        target = tmp_path / "record.json"
        command = ["--arm", "SDPO", "--samples", "128", "--points", "2", "--output", str(target), *given]
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(folder), *command])
        train.main()
        records.append(json.loads(target.read_text()))
        # Two steps, three evaluations, and the replies before and after.
        assert len(used) == (7 if given else 0)
    plain, graph = records
    assert plain["command"].replace("--output", "--sampling graph --output") == graph["command"]
    assert graph["complete"]
    assert [point[0] for point in graph["points"]] == [0, 64, 128]
    for name in ("points", "after"):
        assert plain[name] == graph[name]


def test_runs_pass_the_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not imported by its name, which the demo's program has too.
    spec = importlib.util.spec_from_file_location("private_api_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    chosen = [(("--sampling", name), name) for name in arms.SAMPLING]
    for given, expected in (((), "generate"), *chosen):
        monkeypatch.setattr(sys, "argv", ["run.py", "--model", "x", "--arms", "SDPO", *given])
        (job,) = run.jobs(run.arguments())
        assert job.arguments[job.arguments.index("--sampling") + 1] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_draws_what_its_step_draws(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(device="cuda")
    generate, passed = own(model, torch.bfloat16 if autocast else None)
    if autocast:
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)

    def eager(arguments: dict[str, Any]) -> Tensor:
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(sampling.Sampler, "_capture", lambda *_: None)
            ids = arguments["input_ids"]
            width = -(-ids.shape[1] // sampling.PROMPT_MULTIPLE) * sampling.PROMPT_MULTIPLE
            fresh = sampling.Sampler(model, len(ids), width, arguments["generation_config"])
            return fresh(ids, arguments["attention_mask"])

    for turn in range(3):
        for seed, lengths in enumerate(SHAPES):
            arguments = call(lengths, seed=seed + turn, device="cuda", eos_token_id=[EOS, 3])
            torch.manual_seed(seed)
            replayed = generate(**arguments)
            torch.manual_seed(seed)
            assert torch.equal(replayed, eager(arguments))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    assert not passed

"""The numbered examples run on a CPU without a network, and what they print is true."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from programs import EXAMPLES, launch, run

LEARNS = re.compile(r"probability of the right answer (\S+) -> (\S+)")


def example(folder: Path, name: str, *arguments: str) -> str:
    return run(folder, str(EXAMPLES / name), *arguments)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example as a module: its name begins with a digit."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_number_is_listed_once_with_its_command() -> None:
    page = (EXAMPLES / "README.md").read_text()
    programs = sorted(path.name for path in EXAMPLES.glob("0*.py"))
    assert [name[:2] for name in programs] == [f"{i:02d}" for i in range(1, len(programs) + 1)]
    assert re.findall(r"^\| \[(0\w+\.py)\]", page, re.MULTILINE) == programs
    for name in programs:
        assert f"examples/{name}" in (EXAMPLES / name).read_text().split('"""')[1]


def test_the_pure_loss_has_the_numbers_of_float64(tmp_path: Path) -> None:
    """Divergences of the two distributions, from their definition in float64."""
    import math

    student, teacher = (2.0, 1.0, 0.5, 0.0, -1.0, -2.0), (0.5, 2.0, 0.0, 1.0, -1.5, -3.0)

    def softmax(logits: tuple[float, ...]) -> list[float]:
        total = sum(map(math.exp, logits))
        return [math.exp(z) / total for z in logits]

    p, q = softmax(student), softmax(teacher)
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    wanted = [kl(q, p), (kl(p, mean) + kl(q, mean)) / 2, kl(p, q)]
    printed = example(tmp_path, "01_pure_loss.py")
    row = re.search(r"full vocabulary +(\S+) +(\S+) +(\S+)", printed)
    assert row is not None
    assert list(map(float, row.groups())) == pytest.approx(wanted, abs=6e-5)
    assert "= (p − q) / 2: True" in printed
    fused = re.search(r"from hidden states (\S+), from logits (\S+)", printed)
    assert fused is not None
    assert fused[1] == fused[2]


@pytest.mark.parametrize("share", ["0", "0.1"])
def test_own_loop_learns(tmp_path: Path, share: str) -> None:
    printed = example(tmp_path, "02_own_loop.py", "--steps", "10", "--policy-weight", share)
    before, after = map(float, re.findall(r"probability of the right answer (\S+)", printed))
    assert 0 < before < after <= 1


def test_one_script_runs_grpo_and_sdpo(tmp_path: Path) -> None:
    results = {}
    for method in ("grpo", "sdpo"):
        printed = example(
            tmp_path, "03_grpo_to_sdpo.py", "--method", method, "--steps", "8", "--output", "out"
        )
        match = LEARNS.search(printed)
        assert match is not None
        results[method] = tuple(map(float, match.groups()))
        assert ("self_distillation/divergence" in printed) == (method == "sdpo")
    assert results["grpo"][0] == results["sdpo"][0]  # the same start
    assert results["sdpo"][1] > results["grpo"][1]
    assert results["sdpo"][1] > 2 * results["sdpo"][0]


def test_code_feedback_is_the_first_failed_test(tmp_path: Path) -> None:
    printed = example(tmp_path, "04_code_feedback.py", "--output", "out")
    right, wrong, refused = printed.splitlines()[:3]
    assert right == "1  None"
    assert wrong == "0  AssertionError: clamp(5, 0, 3) returned 5, expected 3"
    assert refused.startswith("0  SyntaxError: the reply is not one function")
    assert printed.strip().endswith("rows that learned from feedback 1.00")


def test_code_is_taken_out_of_its_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("04_code_feedback", monkeypatch)
    code = "def initials(name):\n    return '.'.join(w[0].upper() for w in name.split()) + '.'"
    fenced = f"Here it is:\n```python\n{code}\n```\nDone."
    assert module.source_of(fenced) == module.source_of(code) == code
    assert module.judge([[{"content": fenced}]], ["initials"]) == [(1.0, None)]


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server: it passes what contains a "1"; `replies` has others, by answer."""

    seen: ClassVar[list[dict]] = []
    replies: ClassVar[dict[str, list[tuple[int, str]]]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        answer = body["messages"][0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
        text = "PASS" if "1" in answer else "FAIL\nThere is no one in it."
        status, content = self.replies[answer].pop(0) if self.replies.get(answer) else (200, text)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Judge.seen, Judge.replies = [], {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


def rows(*answers: str) -> dict[str, list]:
    turns = [[{"role": "assistant", "content": answer}] for answer in answers]
    return {"prompts": [[{"role": "user", "content": "q"}]] * len(answers), "completions": turns}


def test_the_judge_is_asked_over_the_network(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    printed = example(
        tmp_path,
        "05_llm_judge.py",
        "--judge-url",
        server,
        "--judge-model",
        "j",
        "--steps",
        "1",
        "--output",
        "o",
    )
    assert re.search(r"^step 1: reward \d\.\d\d, rows that read a remark [01]\.\d\d", printed, re.MULTILINE)
    assert len(Judge.seen) == 8
    assert {(call["path"], call["model"], call["key"]) for call in Judge.seen} == {
        ("/v1/chat/completions", "j", "Bearer k")
    }


def test_a_row_that_the_judge_fails_on_has_neither_score_nor_feedback(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = load("05_llm_judge", monkeypatch)

    async def nothing(seconds: float) -> None:
        """No pause between tries."""

    monkeypatch.setattr(module.asyncio, "sleep", nothing)
    judge = module.make_judge(module.ask_server(server, "j", tries=2, concurrency=1))
    # One failure is repeated; two are too many; a reply of another form is not repeated, and not guessed at.
    Judge.replies = {"a 1": [(500, "")], "b 1": [(500, ""), (429, "")], "c 1": [(200, "I like it.")]}
    verdicts = asyncio.run(judge(**rows("a 1", "b 1", "c 1", "d 1", "none")))
    assert verdicts == [
        (1.0, None),
        (None, None),
        (None, None),
        (1.0, None),
        (0.0, "There is no one in it."),
    ]
    assert len(Judge.seen) == 7
    assert "gave no verdict on 2 of 5" in caplog.text
    assert Judge.seen[0]["key"] is None


def test_a_judge_that_is_not_there_trains_nothing(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as httpd:
        port = httpd.server_port  # nobody listens on it afterwards
    printed = example(
        tmp_path,
        "05_llm_judge.py",
        "--judge-url",
        f"http://127.0.0.1:{port}/v1",
        "--steps",
        "1",
        "--output",
        "o",
    )
    assert "step 1: reward none, rows that read a remark 0.00" in printed
    assert "'self_distillation/step_without_signal': '1'" in printed


def test_tools_are_called_more_often(tmp_path: Path) -> None:
    printed = example(tmp_path, "06_tools.py", "--pretrain", "100", "--steps", "2", "--output", "out")
    assert re.search(r"^right answers: \S+ in the first step, \S+ in the last$", printed, re.MULTILINE)
    calls = re.search(r"^calls per row: (\S+) in the first step, (\S+) in the last$", printed, re.MULTILINE)
    assert calls is not None
    assert 0 < float(calls[1]) < float(calls[2])


def test_other_codebases_get_the_gradient_of_the_divergence(tmp_path: Path) -> None:
    printed = example(tmp_path, "07_other_codebases.py")
    errors = list(map(float, re.findall(r"by (\S+) of its norm", printed)))
    assert len(errors) == 3
    assert max(errors[:2]) < 0.02  # sampled: 1/√200000 of some units
    assert errors[2] < 0.05  # the bucket hides what is outside the top 16
    # The counter-example: the advantage with the wrong sign.
    source = (EXAMPLES / "07_other_codebases.py").read_text()
    wrong = source.replace("teacher_log_probs - old_log_probs", "old_log_probs - teacher_log_probs")
    assert wrong != source
    (tmp_path / "wrong.py").write_text(wrong)
    assert float(re.findall(r"by (\S+) of its norm", run(tmp_path, "wrong.py"))[0]) > 1


def losses_on(folder: Path, processes: int, name: str) -> list[str]:
    printed = launch(folder, processes, str(folder / name), "--steps", "3")
    return re.findall(r"step \d: loss (\S+)", printed)


def test_the_loss_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    source = (EXAMPLES / "08_data_parallel_loop.py").read_text()
    (tmp_path / "right.py").write_text(source)
    # The counter-example: each process divides by its own count, as a mean of means.
    wrong = source.replace("(loss.total / count * processes).backward()", "loss.mean().backward()")
    assert wrong != source
    (tmp_path / "wrong.py").write_text(wrong)
    one = losses_on(tmp_path, 1, "right.py")
    assert len(set(one)) == 3
    assert losses_on(tmp_path, 2, "right.py") == one
    assert losses_on(tmp_path, 2, "wrong.py") != one


def test_the_tiny_model_is_loaded_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    example(tmp_path, "tiny_model.py", "tiny")
    module = load("tiny_model", monkeypatch)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    text = "What is 1 + 1?\nEnd."
    assert loaded(text).input_ids == module.tiny_tokenizer()(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    turn = [{"role": "user", "content": text}]
    assert loaded.apply_chat_template(turn, tokenize=False) == f"<user>{text}\n"

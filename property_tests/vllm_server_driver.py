"""Three steps of the tests' model with completions of `trl vllm-serve`, and which weights the server samples with.

    CUDA_VISIBLE_DEVICES=0 python property_tests/vllm_server_driver.py lora FILE 1

The last argument is the GPU of the server: NCCL takes no two processes on one card. The server starts from other
weights than the trainer. Written to FILE, for each step: the mean and largest difference of a token's
log-probability between trainer and server; the same with the weights that the trainer had before its last update,
and with those that the server started from; and the time of the weight sync. If every sync arrived, the first is
small (vLLM computes in bfloat16), the last is large, and so is the other from the second step on. Loss and gradient
are compared with the reference of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import test_vllm as tests
import tiny
import torch
import transformers
import trl
from peft import LoraConfig
from reference_step import Method, compare
from transformers import AutoModelForCausalLM

Result = dict[str, Any]
START_SECONDS = 150


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(model: Path, port: int, gpu: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", "from trl.cli.main import main; main()"]
    command += ["vllm-serve", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--gpu_memory_utilization", "0.2", "--max_model_len", "64", "--enforce_eager", "true"]
    # A group of processes of its own: vLLM's engine is a child of the server.
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"no server, its return code is {server.poll()}\n{log.read_text()[-4000:]}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, and vLLM's engine, which may outlive it."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)


def summary(gaps: list[list[float]]) -> Result:
    flat = torch.tensor([gap for row in gaps for gap in row]).abs()
    return {"mean": flat.mean().item(), "max": flat.max().item(), "tokens": len(flat)}


def train(folder: Path, port: int, lora: bool) -> Result:
    """The steps of a run with the server on this port; `folder` has its model."""
    tiny.model(**tests.SHAPE).save_pretrained(folder / "own")
    trainer = tiny.trainer(
        folder / "run",
        start=AutoModelForCausalLM.from_pretrained(folder / "own", dtype=torch.float32),
        sdpo_config=tiny.config(rollout_is_clip=1.5),
        peft_config=LoraConfig(**tests.LORA) if lora else None,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=f"http://127.0.0.1:{port}",
        vllm_server_timeout=30.0,
        vllm_importance_sampling_mode="token_truncate",
        max_steps=3,
        use_cpu=not tests.ON_GPU,
    )
    engine, sampled, seconds = trainer.vllm_generation, {}, []
    sync, generate = engine.sync_weights, engine.generate

    def timed_sync() -> None:
        began = time.perf_counter()
        sync()
        seconds.append(time.perf_counter() - began)

    def watched(**arguments: Any) -> Any:
        answer = generate(**arguments)
        _, sampled["completions"], log_probs, _ = answer
        sampled["log_probs"] = [[first for first, *_ in row] for row in log_probs]
        return answer

    engine.sync_weights, engine.generate = timed_sync, watched
    start_model = AutoModelForCausalLM.from_pretrained(folder / "server", dtype=torch.float32)
    steps: list[Result] = []

    def weights() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}

    @torch.no_grad()
    def load(values: dict[str, torch.Tensor]) -> None:
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(values[name])

    @torch.no_grad()
    def gaps(model: Any, batch: list[Any]) -> list[list[float]]:
        found = []
        for row, theirs in zip(batch, sampled["log_probs"], strict=True):
            ids = torch.tensor([row.prompt_ids + row.completion], device=next(model.parameters()).device)
            logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float().cpu()
            tokens = torch.tensor(row.completion)[:, None]
            ours = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
            found.append((ours - torch.tensor(theirs)).tolist())
        return found

    before = weights()

    def record_step(_: Any, batch: list[Any]) -> None:
        nonlocal before
        for row, completion in zip(batch, sampled["completions"], strict=True):
            assert row.completion == list(completion)
        now, current = gaps(trainer.model, batch), weights()
        for row, gap in zip(batch, now, strict=True):
            row.engine_gap = gap
        load(before)
        earlier = gaps(trainer.model, batch)
        load(current)
        steps.append(
            {
                "gap": summary(now),
                "gap to the server's start": summary(gaps(start_model, batch)),
                "gap before the last update": summary(earlier),
                "sync_seconds": seconds[-1],
            }
        )
        before = current

    difference = compare(trainer, tests.blank(lora), Method(engine_clip=1.5), alter=record_step)
    return {
        "steps": steps,
        "difference": {name: float(getattr(difference, name)) for name in ("gradient", "loss")},
        "logged": [
            {name: value for name, value in entry.items() if name.startswith("sampling/")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "versions": {
            module.__name__: module.__version__ for module in (torch, transformers, trl, tests.vllm)
        },
        "gpu": torch.cuda.get_device_name(0) if tests.ON_GPU else None,
    }


def main(mode: str, file: Path, gpu: str) -> None:
    # The server has a session of its own: it ends only where this process ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.model(seed=7, **tests.SHAPE).save_pretrained(folder / "server")
        tiny.tokenizer().save_pretrained(folder / "server")
        server = start_server(folder / "server", port, gpu, folder / "server.log")
        try:
            wait_for(server, port, folder / "server.log")
            result = train(folder, port, lora=mode == "lora")
        finally:
            stop(server)
    file.write_text(json.dumps({"mode": mode, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

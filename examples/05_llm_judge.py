"""Feedback from a language model that judges: over the network, asynchronously, and what a failure means.

    python examples/05_llm_judge.py                                                    # a stand-in, no network
    python examples/05_llm_judge.py --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen3-32B

The URL is that of any server with OpenAI's chat completions: vLLM, SGLang, llama.cpp, a provider. A key is read
from the environment variable OPENAI_API_KEY if it is set.

**When the judge fails** (no connection, a time-out, a status of 429 or 500) the request is repeated, and then the
row is given up: it has neither score nor feedback from the judge, so it has no signal unless a peer succeeded. So
has a row whose verdict is not of the form that was asked for. Nothing is invented: a score of 0 would say that the
answer is wrong. A step in which no row has a signal changes nothing, so a server that is down for a while costs
generated text, not the model. The number of rows that were given up is logged.

**What the judge is told.** It sees question and answer as data between marks, and is asked for a verdict and a
remark that does not contain the solution: the remark is what the teacher reads.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import torch
from datasets import Dataset
from tiny_model import tiny_model, tiny_tokenizer
from trl import GRPOConfig

from sdpo_rl import SDPOConfig, SDPOTrainer

# From a request in words to a reply in words. It raises `JudgeError` if it cannot.
Ask = Callable[[str], Awaitable[str]]

REQUEST = """\
Judge an answer. Reply with PASS or FAIL on the first line. After FAIL write one more line: what is wrong with the
answer, so that its author can do better, without giving the solution.

<question>
{question}
</question>
<answer>
{answer}
</answer>"""
QUESTIONS = [
    "Explain in one sentence why the sky is blue.",
    "Name one advantage of unit tests.",
    "What is a mutex for? One sentence.",
    "Why do leaves turn red in autumn? One sentence.",
]
logger = logging.getLogger(__name__)


class JudgeError(Exception):
    """The judge did not reply, or not in the form that was asked for."""


def ask_server(url: str, model: str, *, timeout: float = 60.0, tries: int = 3, concurrency: int = 16) -> Ask:
    """A judge behind an OpenAI-compatible URL.

    Args:
        url: the base, such as http://localhost:8000/v1.
        model: the name that the server knows.
        timeout: seconds for one request.
        tries: requests before the row is given up.
        concurrency: requests at the same time.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if tries < 1:
        raise ValueError(
            f"tries: expected at least 1, got {tries}; pass the number of requests before giving up"
        )

    limit = asyncio.Semaphore(concurrency)

    async def ask(request: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": request}], "temperature": 0.0}
        for attempt in range(tries):
            try:
                async with limit, httpx.AsyncClient(timeout=timeout, headers=headers) as client:
                    response = await client.post(f"{url.rstrip('/')}/chat/completions", json=body)
                response.raise_for_status()
                return str(response.json()["choices"][0]["message"]["content"])
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
                await asyncio.sleep(0.2 * 2.0**attempt)
        raise JudgeError(problem)

    return ask


async def ask_stand_in(request: str) -> str:
    """A judge without a model: it passes answers with at least two spaces."""
    answer = request.split("<answer>\n")[1].split("\n</answer>")[0]
    return "PASS" if answer.count(" ") >= 2 else "FAIL\nThe answer is not a sentence."


def make_judge(ask: Ask) -> Callable[..., Awaitable[list[tuple[float | None, str | None]]]]:
    """A reward function of a judge; the trainer awaits it."""

    async def judge(
        prompts: list[Any], completions: list[Any], **_: Any
    ) -> list[tuple[float | None, str | None]]:
        requests = [
            REQUEST.format(question=turns[-1]["content"], answer=reply[0]["content"])
            for turns, reply in zip(prompts, completions, strict=True)
        ]
        results = await asyncio.gather(*(verdict(ask, request) for request in requests))
        if lost := sum(score is None for score, _ in results):
            logger.warning("The judge gave no verdict on %d of %d completions.", lost, len(results))
        return results

    return judge


async def verdict(ask: Ask, request: str) -> tuple[float | None, str | None]:
    """Score and remark; `(None, None)` if the judge failed."""
    try:
        first, _, remark = (await ask(request)).strip().partition("\n")
    except JudgeError as error:
        logger.info("The judge failed: %s", error)
        return None, None
    if first.strip().upper() == "PASS":
        return 1.0, None
    if first.strip().upper() == "FAIL" and remark.strip():
        return 0.0, remark.strip()
    logger.info("The judge's reply is not of the form that was asked for: %.80r", first)
    return None, None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="hub id or folder of the model that is trained; default: random weights"
    )
    parser.add_argument("--judge-url", help="base of an OpenAI-compatible server; default: a stand-in")
    parser.add_argument("--judge-model", default="judge", help="the judge's name on that server")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", default="output/05")
    options = parser.parse_args()
    ask = ask_server(options.judge_url, options.judge_model) if options.judge_url else ask_stand_in

    on_gpu = torch.cuda.is_available()
    trainer = SDPOTrainer(
        model=options.model or tiny_model(),
        reward_funcs=make_judge(ask),
        args=GRPOConfig(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=8,
            num_generations=4, max_completion_length=128 if options.model else 16, learning_rate=1e-5,
            use_cpu=not on_gpu, bf16=on_gpu, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS]),
        processing_class=None if options.model else tiny_tokenizer(),
        sdpo_config=SDPOConfig(k=20),
    )  # fmt: skip
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            used = entry["self_distillation/feedback_used_fraction"]
            # No row of the step has a reward if the judge failed on all of them.
            reward = "none" if entry["reward"] is None else f"{entry['reward']:.2f}"
            print(f"step {entry['step']}: reward {reward}, rows that read a remark {used:.2f}")


if __name__ == "__main__":
    main()

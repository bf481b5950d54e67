"""The reward function of llm_judge.yaml: a model behind JUDGE_URL; `05_llm_judge.py` says what failures mean.

export JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL=Qwen/Qwen3-32B
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
example = importlib.import_module("05_llm_judge")

if "JUDGE_URL" not in os.environ:
    raise ValueError(
        "JUDGE_URL: expected the base of an OpenAI-compatible server, got nothing; export JUDGE_URL=..."
    )
judge = example.make_judge(
    example.ask_server(os.environ["JUDGE_URL"], os.environ.get("JUDGE_MODEL", "judge"))
)

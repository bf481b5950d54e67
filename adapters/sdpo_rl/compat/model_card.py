"""SDPO in the model card that TRL writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What TRL's card says about the method, by the names of its class attributes.
PAPER = {
    "title": "Reinforcement Learning via Self-Distillation",
    "id": "2601.20802",
    "citation": "\n".join(
        (
            "@misc{hubotter2026sdpo,",
            "    title         = {{Reinforcement Learning via Self-Distillation}},",
            '    author        = {H{\\"u}botter, Jonas and L{\\"u}beck, Frederike and Behric, Lejs and '
            "Baumann, Anton and Bagatella, Marco and Marta, Daniel and Hakimi, Ido and Shenfeld, Idan and "
            "Kleine Buening, Thomas and Guestrin, Carlos and Krause, Andreas},",
            "    year          = {2026},",
            "    eprint        = {2601.20802},",
            "    archivePrefix = {arXiv},",
            "}",
        )
    ),
}


def add_options(card: Path, options: Mapping[str, Any], *, version: str) -> None:
    """Append a section with the options and the version of this library.

    Args:
        card: the file that TRL wrote.
        options: by name; a value that JSON does not have is written as its representation.
        version: of this library.
    """
    listed = json.dumps(dict(options), indent=2, default=repr)
    trained = f"Trained with SDPO-RL {version} and these options:"
    section = f"\n\n## SDPO options\n\n{trained}\n\n```json\n{listed}\n```\n"
    card.write_text(card.read_text(encoding="utf-8").rstrip() + section, encoding="utf-8")

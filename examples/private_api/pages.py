"""Pages and figures that are made from records: filled in, written, and compared with the files.

A module of `figures.py` and of the embedded demo's `results.py`; nothing to run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

Files = Mapping[Path, str | None]  # what each file holds by the records; `None`: there is to be none


def place(kind: str) -> re.Pattern[str]:
    """What finds the places of generated texts: `<!-- KIND: NAME -->`, the text, `<!-- end -->`.

    Examples:
        >>> place("generated").findall("<!-- generated: setup --> <!-- end -->")
        []
        >>> place("generated").search("<!-- generated: setup -->\\n<!-- end -->")[2]
        'setup'
    """
    return re.compile(rf"(<!-- {kind}: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, texts: Mapping[str, str], places: re.Pattern[str]) -> str:
    """A page with each text at its place.

    Args:
        page: Markdown.
        texts: by the name of their place.
        places: of `place`.

    Raises:
        ValueError: the page has a place for a text that there is not.
    """

    def fill(match: re.Match[str]) -> str:
        if match[2] not in texts:
            raise ValueError(f"page: expected places of {', '.join(texts)}, got {match[2]!r}; remove it")
        text = texts[match[2]]
        return match[1] + (f"\n{text}\n\n" if text else "") + match[3]

    return places.sub(fill, page)


def differences(root: Path, files: Files) -> list[str]:
    """The files that do not hold what they should, by their path from `root`."""
    return [
        str(path.relative_to(root))
        for path, text in files.items()
        if (path.read_text(encoding="utf-8") if path.exists() else None) != text
    ]


def write(files: Files) -> None:
    """Write the files, and remove those that there are not to be."""
    for path, text in files.items():
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")


def main(description: str, script: str, root: Path, files: Callable[[], Files]) -> int:
    """The command line of a script that makes the files: it writes them, or compares with `--check`.

    Args:
        description: what the script makes.
        script: its path from `root`.
        root: of the repository.
        files: makes them.

    Returns:
        1 if a file differs with `--check`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    if not parser.parse_args().check:
        write(files())
        return 0
    found = differences(root, files())
    for name in found:
        print(f"{name} is not what the records say; run {script}")
    return 1 if found else 0

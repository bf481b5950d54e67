"""Reports and figures in light and dark, on a phone and on a wide page: contrast, sizes, what scrolls."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from programs import EXAMPLES, ROOT

sys.path.insert(0, str(EXAMPLES / "demo"))
sys.path.append(str(EXAMPLES / "private_api"))

import drawing
import figures
import report as demo_report
import style
import tables

CSS = ROOT / "adapters" / "sdpo_rl" / "credit" / "page"
PALETTE = (CSS / "palette.css").read_text()
IMAGES = ROOT / "docs" / "images"
MARGIN, PHONE = 16, 360  # px, of a page on a phone
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


# --- colors ---------------------------------------------------------------------------------------------------


def schemes(css: str) -> list[dict[str, str]]:
    """The colors of the light and of the dark scheme, by name."""
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def unreadable(css: str) -> list[str]:
    """Texts whose contrast is below 4.5."""
    lines = [f"c{number}" for number in range(style.LINES)]
    pairs = [
        (text, back)
        for text in ("ink", "soft", "focus", "warn", "good", "bad", *lines)
        for back in ("page", "card")
    ]
    pairs += [("ink", "hover"), ("warn", "warn-back"), ("ink", "warn-back"), ("page", "warn")]
    return [
        f"{name}: {text} on {back}"
        for name, scheme in zip(("light", "dark"), schemes(css), strict=True)
        for text, back in pairs
        if contrast(scheme[text], scheme[back]) < 4.5
    ]


def test_contrast_has_the_values_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#777777") == pytest.approx(4.48, abs=0.005)


def test_texts_are_readable_in_light_and_in_dark() -> None:
    assert unreadable(PALETTE) == []
    (light, dark) = schemes(PALETTE)
    assert set(light) == set(dark)
    assert unreadable(PALETTE.replace(light["c1"], "#c8600c")) == ["light: c1 on page", "light: c1 on card"]
    assert "dark: soft on page" in unreadable(PALETTE.replace(dark["soft"], light["soft"]))


def test_the_diagram_of_a_step_is_readable_in_light_and_in_dark() -> None:
    blocks = re.findall(r"svg \{ (--.*?) \}", (IMAGES / "step.svg").read_text())
    for block in blocks:
        colors = {name: long(color) for name, color in re.findall(r"--([\w-]+): (#[0-9a-f]+);", block)}
        for back in ("page", "plain", "student", "teacher"):
            assert contrast(colors["soft"], colors[back]) >= 4.5
            assert contrast(colors["ink"], colors[back]) >= 4.5
    assert len(blocks) == 2


def long(color: str) -> str:
    """A color with six digits."""
    return color if len(color) == 7 else "#" + "".join(2 * digit for digit in color[1:])


def test_every_color_is_one_of_the_palette() -> None:
    page = (CSS / "report.css").read_text()
    for css in (page, demo_report.STYLE, style.PAGE, style.FIGURE):
        own = css.replace(PALETTE, "")
        used = set(re.findall(r"var\(--([\w-]+)\)", own))
        assert used
        assert used <= set(re.findall(r"--([\w-]+):", PALETTE))
        assert not re.search(r"#[0-9a-f]{3,8}\b|(?:fill|stroke|color): (?:white|black|gr[ae]y)", own)


# --- figures --------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Where a text of a figure is on a phone."""

    text: str
    left: float
    right: float
    middle: float


def texts(svg: ElementTree.Element, size: float) -> list[Text]:
    found = []
    for element in svg.findall("{*}text"):
        text = element.text or ""
        wide = 0.57 * size * len(text)
        x, y = float(element.get("x", "")), float(element.get("y", ""))
        left = x - wide * {None: 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor")]
        found.append(Text(text, left, left + wide, y))
    return found


def faults(picture: str) -> list[str]:
    """What a phone cannot show of a figure: no scale, small text, text outside or on other text."""
    svg = ElementTree.fromstring(picture)
    found = [f"fixed {name}" for name in ("width", "height", "style") if svg.get(name) is not None]
    _, _, width, height = map(float, svg.get("viewBox", "0 0 inf inf").split())
    css = svg.findtext("{*}style", "")
    if "prefers-color-scheme: dark" not in css:
        found.append("no dark colors")
    back = svg.find("{*}rect")
    if back is None or (back.get("width"), back.get("height")) != (f"{width:g}", f"{height:g}"):
        found.append("no background")
    (size,) = map(float, re.findall(r"max-width: \d+px\) \{\s*\.figure \{ font-size: (\d+)px", css) or ["0"])
    if size * (PHONE - 2 * MARGIN) / width < 10:
        found.append("small text")
    placed = texts(svg, size)
    found += [
        f"{text.text} is outside"
        for text in placed
        if not (text.left >= 0 and text.right <= width and size / 2 <= text.middle <= height - size / 2)
    ]
    found += [
        f"{one.text} on {other.text}"
        for one, other in combinations(placed, 2)
        if abs(one.middle - other.middle) < 0.75 * size and one.left < other.right and other.left < one.right
    ]
    return found


def figure(names: int = 3, panels: int = 1, length: int = 20) -> str:
    """A made-up figure whose lines end at the same place."""
    band = drawing.Band([0, 12800], [0.1, 0.9], [0.0, 0.8], [0.2, 1.0])
    lines = {f"{number} {'x' * (length - 2)}": band for number in range(names)}
    headings = [f"panel {number}" for number in range(panels)] if panels > 1 else [""]
    return drawing.draw(dict.fromkeys(headings, lines), "held-out accuracy", columns=min(panels, 2))


@pytest.mark.parametrize(
    "name",
    [
        "step",
        "demo",
        "embedded-learns",
        "embedded-alpha",
        "embedded-cures",
        "embedded-lasting",
        "embedded-rate",
        "embedded-support",
    ],
)
def test_a_figure_of_the_documentation_fits_a_phone(name: str) -> None:
    assert faults((IMAGES / f"{name}.svg").read_text()) == []


@pytest.mark.parametrize("question", figures.QUESTIONS)
def test_a_figure_of_the_private_api_fits_a_phone(question: str) -> None:
    if by_arm := tables.of_question(tables.load(figures.RECORDS), question):
        assert faults(figures.figure(question, by_arm)) == []


@pytest.mark.parametrize(("names", "panels", "length"), [(1, 1, 4), (9, 1, 40), (3, 5, 12), (5, 2, 18)])
def test_any_figure_fits_a_phone(names: int, panels: int, length: int) -> None:
    picture = figure(names, panels, length)
    assert faults(picture) == []
    assert len(set(re.findall(r'<polyline class="([^>]*?)" points="[^"]*"([^>]*)/>', picture))) == names


def test_a_fault_of_a_figure_is_found() -> None:
    picture = figure()
    assert faults(picture) == []
    assert faults(picture.replace("viewBox", 'width="640" viewBox')) == ["fixed width"]
    assert faults(picture.replace(f"font-size: {style.PHONE_FONT}px", "font-size: 13px")) == ["small text"]
    assert faults(picture.replace("prefers-color-scheme: dark", "print")) == ["no dark colors"]
    assert faults(picture.replace("<rect", "<path")) == ["no background"]
    assert faults(picture.replace(">0 xxx", f">{'y' * 50}xxx"))[0].endswith("is outside")
    assert faults(picture.replace(">0.75<", ">0.75 of all<"))
    assert "0 on 0.25" in faults(re.sub(r'y="\d+\.\d" (dy=".35em" text-anchor="end")', r'y="90" \1', picture))


# --- pages ----------------------------------------------------------------------------------------------------


class Boxes(HTMLParser):
    """Tables outside of a box that scrolls, and elements with a size of their own."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tables, self.loose, self.sized = 0, 0, 0
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        known = dict(attributes)
        if tag == "table":
            self.tables += 1
            self.loose += ("div", "scroll") not in self.open
        self.sized += tag not in ("rect", "meta") and bool({"width", "style"} & set(known))
        self.open.append((tag, known.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass


def too_wide(page: str) -> list[str]:
    """What could make a page wider than a phone."""
    boxes = Boxes(page)
    found = ["a table does not scroll"] * boxes.loose + ["an element has a size"] * boxes.sized
    if 'name="viewport" content="width=device-width, initial-scale=1"' not in page:
        found.append("no viewport")
    css = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    if ".scroll { overflow-x: auto;" not in css or ".figure { display: block; width: 100%;" not in css:
        found.append("nothing scrolls or scales")
    widths = re.findall(r"[;{ ](?:min-)?width: (\d+)px(?!\))", css)
    return found + [f"{width} px" for width in widths if int(width) > PHONE - 2 * MARGIN]


def pages(folder: Path) -> dict[str, str]:
    """Both reports, from records."""
    # Not imported by its name, which the demo's report has too.
    spec = importlib.util.spec_from_file_location(
        "private_api_report", EXAMPLES / "private_api" / "report.py"
    )
    assert spec is not None
    assert spec.loader is not None
    private_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(private_api)
    runs = [run for run in tables.load(figures.RECORDS) if run["question"] == "learns"]
    return {
        "demo": demo_report.page(json.loads((EXAMPLES / "demo" / "record.json").read_text())),
        "private_api": private_api.write_report(runs, folder).read_text(),
    }


@pytest.mark.parametrize("name", ["demo", "private_api"])
def test_a_page_is_not_wider_than_a_phone(name: str, tmp_path: Path) -> None:
    page = pages(tmp_path)[name]
    assert PALETTE in page
    assert Boxes(page).tables >= 2
    assert too_wide(page) == []
    for old, new in (
        ('<div class="scroll"', "<div"),
        ("initial-scale=1", ""),
        ("<svg", '<svg width="860"'),
        ("overflow-x: auto", ""),
        ("min-width: 204px", "min-width: 400px"),
    ):
        assert too_wide(page.replace(old, new)), old


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_scrolls_no_page_sideways(tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe id="{name}" style="width: {PHONE}px" srcdoc="{escape(page)}"></iframe>'
        for name, page in {**pages(tmp_path), "wrong": "<!doctype html><p style='width: 400px'>wide"}.items()
    )
    script = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')].map(f => "
        "f.id + ' ' + f.contentDocument.documentElement.scrollWidth).join(', ') }"
    )
    file = tmp_path / "frames.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{frames}<script>{script}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [str(CHROMIUM), *options, "--virtual-time-budget=2000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout
    widths = dict(re.findall(r"(\w+) (\d+)", re.findall(r"<title>(.*?)</title>", shown)[-1]))
    assert int(widths.pop("wrong")) > PHONE
    assert set(widths) == {"demo", "private_api"}
    assert all(int(width) <= PHONE for width in widths.values()), widths

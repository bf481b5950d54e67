"""The style of figures and of the examples' reports: light and dark, from a phone to a wide page.

A module of `drawing.py` and of the reports, also of the embedded demo's; nothing to run.
"""

from __future__ import annotations

from importlib import resources

PALETTE = (resources.files("sdpo_rl") / "credit" / "page" / "palette.css").read_text(encoding="utf-8")
LINES = 8  # colors of lines: --c0 to --c7 of the palette

# A figure is scaled to the available width, so a narrow figure needs larger text, in units of the figure.
PHONE = 540  # px, the widest narrow figure
FONT, PHONE_FONT = 13, 21

FIGURE = f"""\
.figure {{ font: {FONT}px system-ui, sans-serif; fill: var(--soft); }}
.figure .card {{ fill: var(--card); }}
.figure .heading {{ fill: var(--ink); font-weight: 600; }}
.figure .grid {{ stroke: var(--faint); }}
.figure .line {{ fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round; }}
.figure .band {{ fill: currentColor; opacity: .15; }}
.figure .link {{ stroke: currentColor; opacity: .5; }}
.figure .value {{ fill: currentColor; font-weight: 600; }}
{"".join(f".figure .c{i} {{ color: var(--c{i}); }}" + chr(10) for i in range(LINES))}\
@media (max-width: {PHONE}px) {{
  .figure {{ font-size: {PHONE_FONT}px; }}
  .figure .line {{ stroke-width: 4; }}
}}
"""

# A shadow at each side of a box that scrolls. At the end of the content a gradient that moves with it covers the
# shadow.
SHADOWS = ", ".join(
    f"linear-gradient({angle}, {color}, transparent) {side} / {width} 100% no-repeat {moves}"
    for color, width, moves in (("var(--page) 50%", "40px", "local"), ("var(--faint)", "14px", "scroll"))
    for angle, side in (("90deg", "0 0"), ("270deg", "100% 0"))
)

PAGE = f"""{PALETTE}\
* {{ box-sizing: border-box; }}
body {{ max-width: 780px; margin: 0 auto; padding: 40px 20px; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 0 0 8px; }} h2 {{ font-size: 20px; margin: 40px 0 8px; }}
.lead {{ font-size: 18px; color: var(--soft); }}
.figure {{ display: block; width: 100%; height: auto; margin: 16px 0; }}
.scroll {{ overflow-x: auto; margin: 12px 0 24px; background: {SHADOWS}; }}
.scroll:focus-visible {{ outline: 2px solid var(--focus); }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ padding: 6px 8px; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top;
         font-variant-numeric: tabular-nums; }}
th {{ color: var(--soft); font-weight: 600; }}
th:first-child, td:first-child, .text th, .text td {{ text-align: left; }} .text td {{ min-width: 96px; }}
pre, code {{ font: 13.5px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
pre {{ margin: 0; }} td code {{ display: inline-block; min-width: 204px; }}
small, footer {{ color: var(--soft); font-size: 13px; }} footer {{ margin: 40px 0 0; }}
.right {{ color: var(--good); }} .wrong {{ color: var(--bad); }}
@media (max-width: {PHONE}px) {{
  body {{ padding: 24px 16px; }} h1 {{ font-size: 24px; }} .lead {{ font-size: 17px; }}
}}
"""

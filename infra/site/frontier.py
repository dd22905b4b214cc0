"""Draw docs/frontier.svg, the picture of the README: bytes and loss of the recipes in benchmarks/RESULTS.md.

python -m infra.site.frontier
"""

import html
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SVG = ROOT / "docs" / "frontier.svg"
NAMED = {
    "NAEE, 6 of 8": "NAEE, 6 of 8 experts",
    "GPTQ": "GPTQ, 4 bits",
    "AWQ": "AWQ, 4 bits",
    "NAEE, 6 of 8, then GPTQ, 2 bits": "NAEE, then GPTQ, 2 bits",
    "low rank, whitened, a quarter": "low rank, a quarter",
    "low rank, a tenth, then GPTQ, 8 bits": "low rank, then GPTQ, 8 bits",
    "low rank, three tenths, then GPTQ": "low rank, then GPTQ, 4 bits",
    "low rank, two fifths, then GPTQ, 3 bits": "low rank, then GPTQ, 3 bits",
    "L2/6": "two of six MoE blocks dropped",
}
"""The recipes that are named in the picture; all others are dots."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 70, 20, 20, 50
LOW, HIGH = 5e-5, 0.3  # nats a token
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.ours{fill:#0b6e4f}.other{fill:#b0482f}.line{stroke:#8886}"
    ".paper{fill:#fff}@media(prefers-color-scheme:dark){.paper{fill:#1e2129}text{fill:#ddd}.ours{fill:#4cc79a}.other{fill:#ee8a6c}}"
)


def points() -> dict[str, tuple[float, float]]:
    """Of each recipe the per cent of the bytes, and the mean KL to the original in nats a token."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    part = text.partition("\n## unified\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part.splitlines()
        if re.match(r"\| [^|]+ \| [\d.]+% \|", line)
    ]
    return {row[0]: (float(row[1].rstrip("%")), float(row[10])) for row in rows}


def svg() -> str:
    drawn = [
        f'<line class="line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(v):.1f}" y2="{_y(v):.1f}"/>' for v in (1e-4, 1e-3, 1e-2, 1e-1)
    ]
    drawn += [f'<text x="{LEFT - 8}" y="{_y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in (1e-4, 1e-3, 1e-2, 1e-1)]
    drawn += [f'<text x="{_x(v):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{v} %</text>' for v in (20, 40, 60, 80, 100)]
    for name, (part, loss) in points().items():
        kind = "ours" if name.startswith("low rank") else "other"
        x, y, size = _x(part), _y(max(loss, LOW)), 5 if name in NAMED else 2.5
        drawn.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"><title>{html.escape(name)}</title></circle>')
        if name in NAMED:
            end = part > 65
            at = f'x="{x + (-9 if end else 9):.1f}" y="{y + 4:.1f}"' + (' text-anchor="end"' if end else "")
            drawn.append(f"<text {at}>{html.escape(NAMED[name])}</text>")
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">bytes, of the original</text>')
    drawn.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">KL to the original, nats a token</text>'
    )
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="bytes and loss">\n'
        f'<style>{STYLE}</style>\n<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>\n{body}\n</svg>\n'
    )


def _x(part: float) -> float:
    return LEFT + (part - 10) / 95 * (WIDTH - LEFT - RIGHT)


def _y(loss: float) -> float:
    return TOP + (math.log10(HIGH) - math.log10(loss)) / (math.log10(HIGH) - math.log10(LOW)) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    SVG.write_text(svg())

"""Plots of a bench as SVG, without a library: panels of lines beside each other, with one vertical axis."""

import math
from collections.abc import Iterator, Sequence
from html import escape

Line = tuple[str, str, Sequence[tuple[float, float]]]  # label, kind, points
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 380, 250, 62, 24, 46, 24
COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df")
TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="#57606a"'


def plot(panels: Sequence[tuple[str, Sequence[Line]]], title: str) -> str:
    """Return an SVG of panels (label of the horizontal axis, lines); lines of kind 'predicted' are dashed."""
    values = [y for _, lines in panels for _, _, points in lines for _, y in points]
    top = _rounded_up(max(values))
    legend = 18 * max(len(lines) for _, lines in panels)
    width, height = len(panels) * (LEFT + WIDTH + GAP), TOP + HEIGHT + BOTTOM + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="15" {TEXT}>{escape(title)}</text>',
    ]
    for number, (label, lines) in enumerate(panels):
        parts.append(f'<g transform="translate({number * (LEFT + WIDTH + GAP) + LEFT} {TOP})">')
        parts += _panel(label, lines, top)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(label: str, lines: Sequence[Line], top: float) -> Iterator[str]:
    right = _rounded_up(max(x for _, _, points in lines for x, _ in points))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = HEIGHT * (1 - share)
        yield f'<line x1="0" y1="{y:g}" x2="{WIDTH}" y2="{y:g}" stroke="#d0d7de"/>'
        yield f'<text x="-6" y="{y + 4:g}" text-anchor="end" {TEXT}>{top * share:,.0f}</text>'
        x = WIDTH * share
        yield f'<text x="{x:g}" y="{HEIGHT + 16}" text-anchor="middle" {TEXT}>{right * share:,.0f}</text>'
    yield f'<text x="{WIDTH / 2:g}" y="{HEIGHT + 33}" text-anchor="middle" {TEXT}>{escape(label)}</text>'
    for place, (name, kind, points) in enumerate(lines):
        style = f'stroke="{COLOURS[place // 2 % len(COLOURS)]}" stroke-width="2"'
        style += ' stroke-dasharray="5 4"' if kind == "predicted" else ""
        drawn = [(WIDTH * x / right, HEIGHT * (1 - y / top)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        yield f'<polyline points="{path}" fill="none" {style}/>'
        if kind != "predicted":
            fill = COLOURS[place // 2 % len(COLOURS)]
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}"/>' for x, y in drawn)
        y = HEIGHT + BOTTOM + 18 * place + 4
        yield f'<line x1="0" y1="{y}" x2="28" y2="{y}" {style}/>'
        yield f'<text x="36" y="{y + 4}" {TEXT}>{escape(name)}</text>'


def _rounded_up(value: float) -> float:
    """Return the next of 1, 1.2, 1.6, 2, 3, 4, 6, 8, 10 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if step * power >= value)

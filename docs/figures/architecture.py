"""Draw ``docs/_static/architecture.svg``, the picture of the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).parents[1] / "_static" / "architecture.svg"
WIDTH, HEIGHT = 860, 400
TEXT, LINE = "#1f2933", "#7b8794"


class Box(NamedTuple):
    """A box of the picture: position, size, title, lines and color."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...]
    color: str


SETTINGS = Box(20, 20, 180, 90, "Settings", ("conf/ and key=value", "or Python"), "#e6e9ed")
SCENARIO = Box(20, 140, 180, 90, "Scenario", ("data of each client", "model, partition"), "#d9eaf7")
STRATEGY = Box(
    20, 260, 180, 120, "Strategy", ("select, local, stages", "aggregate, server", "privacy guarantee"), "#dcefdc"
)
LOOP = Box(
    260, 140, 180, 120, "Training loop", ("one Round at a time", "charges the ledger", "steps the server"), "#fdf0d0"
)
ENGINE = Box(500, 140, 150, 120, "Engine", ("serial, vector", "ray", "deployed nodes"), "#f7dede")
CLIENTS = Box(700, 140, 140, 120, "Clients", ("PyTorch or JAX", "client transforms", "data stay here"), "#eadff5")
CALLBACKS = Box(260, 300, 180, 80, "Callbacks", ("console, run files", "checkpoints, report"), "#e6e9ed")
BOXES = (SETTINGS, SCENARIO, STRATEGY, LOOP, ENGINE, CLIENTS, CALLBACKS)


def right(box: Box, dy: int = 0) -> tuple[int, int]:
    """Return the middle of the right side."""
    return box.x + box.width, box.y + box.height // 2 + dy


def left(box: Box, dy: int = 0) -> tuple[int, int]:
    """Return the middle of the left side."""
    return box.x, box.y + box.height // 2 + dy


def text(x: int, y: int, content: str, size: int, weight: str = "normal") -> str:
    """Return a line of text, centered at x."""
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="middle" fill="{TEXT}"'
    return f'<text x="{x}" y="{y}" {style}>{content}</text>'


def arrow(start: tuple[int, int], end: tuple[int, int], label: str = "", below: bool = False) -> str:
    """Return an arrow with a label at its middle."""
    x, y = (start[0] + end[0]) // 2, (start[1] + end[1]) // 2 + (16 if below else -7)
    line = f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{LINE}" marker-end="url(#tip)"/>'
    return line + (text(x, y, label, 12) if label else "")


def drawn(box: Box) -> str:
    """Return a box with its title and lines."""
    middle = box.x + box.width // 2
    frame = f'x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="8"'
    parts = [f'<rect {frame} fill="{box.color}" stroke="{LINE}"/>', text(middle, box.y + 26, box.title, 16, "bold")]
    for number, line in enumerate(box.lines):
        y = box.y + 50 + 20 * number
        parts.append(text(middle, y, line, 13))
    return "\n".join(parts)


def picture() -> str:
    """Return the picture as SVG."""
    arrows = [
        arrow((110, 110), (110, 140)),
        arrow(right(SCENARIO), (260, 185)),
        arrow(right(STRATEGY), (260, 240)),
        arrow(right(LOOP, -15), left(ENGINE, -15), "Request"),
        arrow(left(ENGINE, 20), right(LOOP, 20), "Updates", below=True),
        arrow(right(ENGINE, -15), left(CLIENTS, -15)),
        arrow(left(CLIENTS, 20), right(ENGINE, 20)),
        arrow((350, 260), (350, 300), ""),
    ]
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M 0 0 L 10 5 L 0 10 z" fill="{LINE}"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    title = (
        "<title>Settings give a scenario and a strategy. The loop sends requests through an engine to clients.</title>"
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, title, tip, background, *map(drawn, BOXES), *arrows, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture())

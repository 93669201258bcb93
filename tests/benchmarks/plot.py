"""The plot: deliveries per CPU-second by server and rate, and latency beside them, as an SVG written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import log10
from typing import Final

from report import Results, count
from rows import LOOP, OURS, ROWS

_COLOURS: Final = {
    OURS: "#0f766e",
    "nginx+nchan": "#b45309",
    LOOP: "#94a3b8",
    "sse-starlette": "#7c3aed",
    "fastapi.sse": "#db2777",
}
_NAMES: Final = {OURS: "opencode-sse-plugin", LOOP: "bare write() loop in C"}
_PANELS: Final = ("20", "100", "1000", "5000")
_WIDTH, _BAR, _GAP, _LEFT = 920, 20, 6, 190
_SCALE: Final = 520
_STYLE: Final = """\
  text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1e293b; }
  .title { font-size: 18px; font-weight: 600; } .sub, .tick { fill: #64748b; font-size: 12px; }
  .row { font-size: 14px; font-weight: 600; } .ours { font-weight: 600; } .grid { stroke: #e2e8f0; }
  .page { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e2e8f0; } .sub, .tick { fill: #94a3b8; } .grid { stroke: #334155; } .page { fill: #0f172a; }
  }"""


def plot(results: Results, about: str) -> str:
    """The whole SVG; servers and rows without a measurement are left out."""
    rows = [row for row in ROWS if row.name in _PANELS and row.name in results.found]
    figures = [
        results.median(row.name, server, "per_cpu_second") or 1
        for row in rows
        for server in _servers(row.name, results)
    ]
    low, high = 10 ** int(log10(min(figures, default=1e4))), max(figures, default=1e6)
    body, y = [], 84.0
    for row in rows:
        body.append(f'<text class="row" x="24" y="{y:.0f}">{escape(row.title)}</text>')
        y += 12
        for server in _servers(row.name, results):
            body.extend(_bar(row.name, server, results, y, low, high))
            y += _BAR + _GAP
        y += 28
    ticks = list(_ticks(low, high, y - 34))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 8:.0f}" role="img">',
            "<title>Deliveries per CPU-second of the server</title>",
            f"<style>\n{_STYLE}\n</style>",
            '<rect class="page" width="100%" height="100%"/>',
            '<text class="title" x="24" y="32">Deliveries per CPU-second of the server (logarithmic)</text>',
            f'<text class="sub" x="24" y="52">{escape(about)}</text>',
            *ticks,
            *body,
            "</svg>",
            "",
        ]
    )


def _servers(row: str, results: Results) -> list[str]:
    found = [server for server in _COLOURS if results.found.get(row, {}).get(server)]
    return sorted(found, key=lambda server: -(results.median(row, server, "per_cpu_second") or 0))


def _x(value: float, low: float, high: float) -> float:
    return _SCALE * log10(max(value, low) / low) / log10(max(high / low, 10))


def _bar(row: str, server: str, results: Results, y: float, low: float, high: float) -> Iterator[str]:
    value = results.median(row, server, "per_cpu_second") or low
    arrived = results.median(row, server, "delivered") or 0
    kind = ' class="ours"' if server == OURS else ""
    middle = y + _BAR / 2 + 4.5
    said = f"{count(value)} · p50 {results.median(row, server, 'p50_ms') or 0:.1f} ms"
    if arrived < 0.995:
        said += f" · {arrived * 100:.0f} % arrived"
    width = max(_x(value, low, high), 2)
    faded = ' fill-opacity="0.55"' if arrived < 0.995 else ""
    yield f'<text{kind} x="{_LEFT - 10}" y="{middle:.1f}" text-anchor="end">{escape(_NAMES.get(server, server))}</text>'
    yield f'<rect x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="3" fill="{_COLOURS[server]}"{faded}/>'
    yield f'<text{kind} x="{_LEFT + width + 8:.1f}" y="{middle:.1f}">{escape(said)}</text>'


def _ticks(low: float, high: float, bottom: float) -> Iterator[str]:
    value = low
    while value <= high:
        x = _LEFT + _x(value, low, high)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="66" y2="{bottom:.0f}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18:.0f}" text-anchor="middle">{_short(value)}</text>'
        value *= 10


def _short(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"

"""A layer before and after as two small drawings, in SVG, as wide as a phone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fx_fusion.patterns.qk_norm_rope_cache.reading import Reading, of_report
from fx_fusion.report import LayerReport

WIDTH = 360
_LANE = {"q": 62, "k": 180, "v": 298}
_BOX = 104
_HEIGHT = 40


def figures(layer: LayerReport) -> str:
    """Two figures; nothing for a fusion whose parts are not those of the built-in one."""
    reading = of_report(layer)
    if reading is None:
        return ""
    after = _after(layer, reading) if layer.state == "rewritten" else ""
    caption = "after" if after else ""
    drawings = [("before", _before(reading))] + ([(caption, after)] if after else [])
    body = "".join(f"<figure><figcaption>{words}</figcaption>{svg}</figure>" for words, svg in drawings)
    return f'<div class="flows">{body}</div>'


def _before(reading: Reading) -> str:
    packed = reading.projection != "separate"
    norm = reading.norm or {"q_eps": None, "k_eps": None}
    heads = {"q": reading.num_heads, "k": reading.num_kv_heads, "v": reading.num_kv_heads}
    shapes: list[str] = []
    if packed:
        shapes += [_box(WIDTH / 2, 4, "data", f"{reading.projection} projection", "", WIDTH - 20)]
    else:
        shapes += [_box(x, 4, "data", f"{lane} projection", "", _BOX) for lane, x in _LANE.items()]
    for lane, x in _LANE.items():
        shapes += [_arrow(x, 44, 70), _box(x, 70, "split", f"split {lane}", f"{heads[lane]} × {reading.head_dim}")]
    for lane in "qk":
        eps, x = norm[f"{lane}_eps"], _LANE[lane]
        words = "none" if eps is None else f"eps {eps:g}"
        shapes += [_arrow(x, 110, 136), _box(x, 136, "norm", "RMSNorm", words)]
        shapes += [
            _arrow(x, 176, 202),
            _box(x, 202, "rope", "mRoPE" if reading.mrope_section else "RoPE", _rope(reading)),
        ]
        shapes += [_arrow(x, 242, 268)]
    shapes += [_arrow(_LANE["v"], 110, 268)]
    shapes += [_box(_LANE["q"], 268, "data", "attention", "")]
    shapes += [_box(_LANE[lane], 268, "store", f"store {lane}", reading.addressed_by.split(" in ")[0]) for lane in "kv"]
    return _svg(shapes, 312)


def _rope(reading: Reading) -> str:
    return f"{reading.rope} {reading.rotary_dim}"


def _after(layer: LayerReport, reading: Reading) -> str:
    angles = "table + positions" if reading.angles == "table" else "cos, sin rows"
    shapes = [_box(WIDTH / 2, 4, "data", "q, k, v as views of the projection", "no copy", WIDTH - 20)]
    shapes += [_box(WIDTH / 2, 56, "operand", f"weights, {angles}, slots", "", WIDTH - 20)]
    shapes += [_arrow(x, 96, 136) for x in _LANE.values()]
    shapes += [_box(WIDTH / 2, 136, "call", "qk_norm_rope_cache", f"one call, {layer.kernel}", WIDTH - 20, 84)]
    shapes += [_arrow(x, 220, 268) for x in _LANE.values()]
    shapes += [_box(_LANE["q"], 268, "data", "attention", "")]
    shapes += [_box(_LANE[lane], 268, "store", f"{lane} cache", "in place") for lane in "kv"]
    return _svg(shapes, 312)


def _box(x: float, y: float, role: str, title: str, sub: str, width: float = _BOX, height: float = _HEIGHT) -> str:
    middle = y + height / 2
    rect = (
        f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'style="stroke:var(--{role})"/>'
    )
    words = _text(x, middle + (4 if not sub else -2), title)
    return rect + words + (_text(x, middle + 13, sub, "sub") if sub else "")


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _arrow(x: float, top: float, bottom: float) -> str:
    return f'<path d="M{x:g} {top:g}V{bottom - 6:g}" marker-end="url(#tip)"/>'


def _svg(shapes: Iterable[str], height: int) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8Z"/></marker></defs>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{tip}{"".join(shapes)}</svg>'

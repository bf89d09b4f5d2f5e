"""What changed between two reports: did a fusion stop firing?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fx_fusion.report import FusionReport, LayerReport


@dataclass(frozen=True)
class Change:
    """One layer that differs.

    Attributes:
        layer: its module, or its number.
        kind: ``lost``, ``gained``, ``moved`` (another state, as good as before), ``reading`` or ``reason``.
        before, after: in words.
    """

    layer: str
    kind: str
    before: str
    after: str

    @property
    def lost(self) -> bool:
        return self.kind == "lost"


def compare(before: FusionReport, after: FusionReport) -> list[Change]:
    """Every layer that is not what it was. Layers are matched by the name of their module, else by number.

    A fusion is lost where a layer was rewritten and is not, was recognised and is declined, or is gone.
    """
    old, new = _by_name(before), _by_name(after)
    names = dict.fromkeys((*old, *new))
    return [change for name in names for change in _changes(name, old.get(name), new.get(name))]


def _by_name(report: FusionReport) -> Mapping[str, LayerReport]:
    """Several layers of one module are numbered."""
    found: dict[str, LayerReport] = {}
    for number, layer in enumerate(report.layers):
        name = layer.module or f"layer {number}"
        if name in found:
            name = next(f"{name} #{i}" for i in range(2, len(report.layers) + 2) if f"{name} #{i}" not in found)
        found[name] = layer
    return found


_RANK = {"declined": 0, "recognised": 1, "rewritten": 2}


def _changes(name: str, old: LayerReport | None, new: LayerReport | None) -> Iterator[Change]:
    ranks = [_RANK[layer.state] if layer else 0 for layer in (old, new)]
    if ranks[0] != ranks[1]:
        yield Change(name, "lost" if ranks[0] > ranks[1] else "gained", _words(old), _words(new))
    elif old is None or new is None:
        yield Change(name, "moved", _words(old), _words(new))
    elif old.state == "declined" and old.code != new.code:
        yield Change(name, "reason", _words(old), _words(new))
    elif old.reading != new.reading or old.kernel != new.kernel:
        yield Change(name, "reading", *_differing(old, new))


def _words(layer: LayerReport | None) -> str:
    if layer is None:
        return "not there"
    if layer.state == "declined":
        where = f" (at {layer.source})" if layer.source else ""
        return f"declined, {layer.code}: {layer.reason}{where}"
    return f"{layer.state} by {layer.kernel}" if layer.kernel else layer.state


def _differing(old: LayerReport, new: LayerReport) -> tuple[str, str]:
    readings = [{**layer.reading, "kernel": layer.kernel} for layer in (old, new)]
    names = [
        name for name in dict.fromkeys((*readings[0], *readings[1])) if readings[0].get(name) != readings[1].get(name)
    ]
    words = ["; ".join(f"{name} {each.get(name)}" for name in names) for each in readings]
    return words[0], words[1]

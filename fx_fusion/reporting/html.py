"""One self-contained HTML page of a report: nothing is loaded, so it can be mailed, archived, opened on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fx_fusion.report import FusionReport, LayerReport
from fx_fusion.reporting import flow
from fx_fusion.reporting.anatomy import Anatomy, LayerAnatomy, Quote, Step
from fx_fusion.reporting.findings import findings

#: What the colours mean.
LEGEND = {
    "split": "split", "norm": "RMSNorm", "rope": "rotation", "lookup": "angles looked up", "store": "cache store",
    "call": "fused call", "region": "declined", "offending": "node at fault",
}  # fmt: skip
_LANES = {"": "shared", "q": "query", "k": "key", "v": "value"}
_TONE = {"rewritten": "good", "recognised": "warn", "declined": "bad"}


def page(report: FusionReport, graphs: Sequence[Anatomy], title: str, notes: Sequence[str]) -> str:
    """The page.

    Args:
        report: of all graphs; layers are numbered as in it.
        graphs: what a :class:`fx_fusion.reporting.anatomy.Recorder` recorded.
        title: what was explained.
        notes: under what conditions, a line each.
    """
    parts = [
        _header(title, notes),
        _numbers(report, graphs),
        *(_strips(graph, i) for i, graph in enumerate(graphs)),
        *(_layer(report, layer, f"g{i}") for i, graph in enumerate(graphs) for layer in graph.layers),
    ]
    if not graphs:
        parts.append(_without_graphs(report))
    style = Path(__file__).with_suffix(".css").read_text()
    return _DOCUMENT.format(title=escape(title), style=style, body="\n".join(parts))


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fx_fusion: {title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _header(title: str, notes: Sequence[str]) -> str:
    lines = "<br>".join(map(escape, notes))
    return f'<header><h1>{escape(title)}</h1><p class="soft">{lines}</p></header>'


def _numbers(report: FusionReport, graphs: Sequence[Anatomy]) -> str:
    total = len(report.layers)
    tone = "good" if len(report.fused) == total else "bad" if report.declined else "warn"
    before, after = sum(g.nodes_before for g in graphs), sum(g.nodes_after for g in graphs)
    tiles = [
        (tone, f"{len(report.fused)} of {total}", "layers fused"),
        ("", str(len(report.recognised)), "recognised and proved"),
        ("bad" if report.declined else "", str(len(report.declined)), "declined"),
        ("", f"{before} → {after}" if graphs else str(report.nodes), "graph nodes"),
        ("", f"{report.seconds.get('total', 0.0):.1f} s", "spent in the pass"),
    ]
    cells = "".join(f'<div><b class="{tone}">{value}</b><span>{words}</span></div>' for tone, value, words in tiles)
    return f'<div class="numbers">{cells}</div>'


# --- the whole graph ------------------------------------------------------------------------------------------------


def _strips(graph: Anatomy, number: int) -> str:
    legend = "".join(
        f'<span><i style="background:var(--{role})"></i>{words}</span>'
        for role, words in LEGEND.items()
        if any(role == each for each, _ in (*graph.roles_before, *graph.roles_after))
    )
    name = "The whole graph" if number == 0 else f"Graph {number + 1}"
    return (
        f'<section class="card strip"><h2>{name}, node by node</h2>'
        f"<p>before, {graph.nodes_before} nodes</p>{_strip(graph.roles_before, graph.nodes_before)}"
        f"<p>after, {graph.nodes_after} nodes</p>{_strip(graph.roles_after, graph.nodes_before)}"
        f'<div class="legend">{legend}</div></section>'
    )


def _strip(runs: Iterable[tuple[str, int]], width: int) -> str:
    """Both strips have one scale, so the second one is as much shorter as the graph is."""
    at, rects = 0, []
    for role, count in runs:
        colour = f"var(--{role})" if role in LEGEND else "var(--line)"
        rects.append(f'<rect x="{at}" width="{count}" height="10" style="fill:{colour}"/>')
        at += count
    return f'<svg viewBox="0 0 {width} 10" preserveAspectRatio="none" role="img">{"".join(rects)}</svg>'


# --- a layer --------------------------------------------------------------------------------------------------------


def _layer(report: FusionReport, anatomy: LayerAnatomy, prefix: str) -> str:
    layer = report.layers[anatomy.layers[0]]
    prefix = f"{prefix}l{anatomy.layers[0]}"
    blocks = [_layer_head(report, anatomy.layers, layer)]
    if layer.state == "declined":
        blocks.append(_reason(layer, anatomy.quote))
    else:
        blocks += [flow.figures(layer), _findings(layer)]
        if layer.reason:
            blocks.append(f'<p class="warn"><b>{escape(str(layer.code))}</b>: {escape(layer.reason)}</p>')
    blocks.append(_graphs(anatomy, prefix, layer.state == "declined"))
    return f'<section class="card" id="{prefix}">{"".join(blocks)}</section>'


def _layer_head(report: FusionReport, numbers: Sequence[int], layer: LayerReport) -> str:
    name = f"Layer {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} layers alike: {_ranges(numbers)}"
    by = f" by {layer.kernel}" if layer.kernel else ""
    modules = [module for number in numbers if (module := report.layers[number].module)]
    where = f"<code>{escape(modules[0])}</code>" if modules else ""
    more = f" … <code>{escape(modules[-1])}</code>" if len(modules) > 1 else ""
    tag = f'<span class="tag {_TONE[layer.state]}">{layer.state}{by}</span>'
    return f'<div class="head"><h2>{name}</h2>{tag}</div><p class="soft">{where}{more}</p>'


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _reason(layer: LayerReport, quoted: Quote | None) -> str:
    where = f'<p class="soft">at <code>{escape(layer.source)}</code></p>' if layer.source else ""
    lines = _quote(quoted) if quoted else ""
    return f'<p><b class="bad">{escape(str(layer.code))}</b><br>{escape(layer.reason or "")}</p>{where}{lines}'


def _quote(quoted: Quote) -> str:
    rows: list[str] = []
    for number, line in enumerate(quoted.lines, start=quoted.first):
        tag = "b" if number == quoted.line else "span"
        rows.append(f"<{tag}>{number:>5}  {escape(line)}</{tag}>")
    return f"<pre>{''.join(rows)}</pre>"


def _findings(layer: LayerReport) -> str:
    rows = "".join(
        f'<dt><i style="background:var(--{each.role})"></i>{escape(each.reader)}</dt><dd>{escape(each.words)}</dd>'
        for each in findings(layer)
    )
    return f'<h3>What was found</h3><dl class="findings">{rows}</dl>' if rows else ""


def _graphs(anatomy: LayerAnatomy, prefix: str, is_open: bool) -> str:
    if not anatomy.before:
        return ""
    before = _lanes(anatomy.before, anatomy.labels, f"{prefix}b", f"before: {len(anatomy.before)} nodes")
    title = f"after: {len(anatomy.after)} nodes"
    after = _lanes(anatomy.after, anatomy.labels, f"{prefix}a", title) if anatomy.after else ""
    attribute = " open" if is_open else ""
    return f"<details{attribute}><summary>The nodes</summary>{before}{after}</details>"


def _lanes(steps: Sequence[Step], labels: Mapping[str, str], prefix: str, title: str) -> str:
    known = {step.name for step in steps}
    lanes: list[str] = []
    for branch, words in _LANES.items():
        mine = [step for step in steps if step.branch == branch]
        if not mine:
            continue
        items = "".join(_item(step, prefix, known, labels) for step in mine)
        wide = " wide" if not branch else ""
        lanes.append(f'<div class="lane{wide}"><h4>{words}</h4><ol>{items}</ol></div>')
    return f'<h3>{title}</h3><div class="lanes">{"".join(lanes)}</div>'


def _item(step: Step, prefix: str, known: set[str], labels: Mapping[str, str]) -> str:
    def link(name: str) -> str:
        words = escape(labels.get(name, name))
        return f'<a href="#{prefix}-{name}">{words}</a>' if name in known else words

    finding = (
        f'<span class="finding" style="color:var(--{step.role})">{escape(step.finding)}</span>' if step.finding else ""
    )
    inputs = f'<span class="from">← {", ".join(map(link, step.inputs))}</span>' if step.inputs else ""
    title = escape(step.source or "", quote=True)
    name = escape(step.label or step.name)
    return (
        f'<li id="{prefix}-{step.name}" class="{step.role}" style="border-color:var(--{step.role})" title="{title}">'
        f'<span class="op">{escape(step.op)}</span> <span class="name">{name}</span> '
        f'<span class="value">{escape(step.value)}</span> {inputs}{finding}</li>'
    )


def _without_graphs(report: FusionReport) -> str:
    rows = "".join(f"<p>{escape(str(layer))}</p>" for layer in report.layers)
    return f'<section class="card"><h2>No layer could be looked at</h2>{rows}</section>'

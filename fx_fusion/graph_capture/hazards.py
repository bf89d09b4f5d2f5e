"""What in a model breaks a CUDA or HIP graph, or makes it replay old values: ``fx_fusion.capture_hazards(fn, *args)``.

A fused call is worth little in a graph that cannot be captured. So the whole graph is read, also where nothing fuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch.fx import Node

from fx_fusion.decline import first_source_line
from fx_fusion.graph_capture import graphs
from fx_fusion.graph_capture.hazard_rules import in_aten_graph, in_dynamo_graph

Severity = Literal["error", "warning", "note"]


class Meaning(NamedTuple):
    """Of a code: how bad it is, what happens, and what to do."""

    severity: Severity
    meaning: str
    fix: str


#: Every code of a hazard. ``docs/hazards.md`` is generated from this table.
HAZARDS: dict[str, Meaning] = {
    "capture.item": Meaning(
        "error",
        "A value is read back from the GPU (`item`, `tolist`, `int`, `bool`): the host waits, which no capture allows.",
        "keep the value in a tensor on the GPU",
    ),
    "capture.size_from_data": Meaning(
        "error",
        "A size depends on values (`nonzero`, a boolean index): the host waits for it, and a replay keeps the old one.",
        "keep the size fixed and mask: torch.where(mask, x, 0)",
    ),
    "capture.device_to_host": Meaning(
        "error",
        "A tensor is copied from the GPU to the CPU: the host waits.",
        "return the tensor and copy it after the replay",
    ),
    "capture.host_to_device": Meaning(
        "error",
        "A tensor is copied from the CPU to the GPU inside: from pageable memory the host waits.",
        "make it on the GPU (device=x.device); or keep a tensor there, and copy_ into it before the replay",
    ),
    "capture.host_input": Meaning(
        "error",
        "A tensor on the CPU is an operand of work on the GPU: a replay keeps the value that it had at the capture.",
        "move it to the GPU: register_buffer, or .to(device) before the call",
    ),
    "capture.host_compute": Meaning(
        "error",
        "Something is computed on the CPU, and cannot be moved: a replay does not compute it again.",
        "pass device=x.device where the tensor is made",
    ),
    "capture.host_random": Meaning(
        "error",
        "Random numbers are drawn on the CPU: every replay uses those of the capture.",
        "draw them on the GPU: torch.rand(…, device=x.device)",
    ),
    "capture.several_gpus": Meaning(
        "error",
        "Tensors lie on several GPUs: PyTorch captures a graph on one.",
        "compile the part of each GPU as a function of its own",
    ),
    "capture.unsafe_op": Meaning(
        "error",
        "PyTorch marks the operation as unsafe to capture: it waits, or allocates by data.",
        "replace the operation, or leave it outside of the compiled function",
    ),
    "capture.control_flow": Meaning(
        "error",
        "Which branch runs is decided on the host (torch.cond, while_loop).",
        "compute both branches and choose: torch.where",
    ),
    "capture.synchronize": Meaning(
        "error", "The host waits for the GPU.", "synchronize outside of the compiled function"
    ),
    "capture.pin_memory": Meaning(
        "error",
        "Host memory is pinned inside: an allocation that a capture may not make.",
        "pin it once, before the first call",
    ),
    "capture.rebound_input": Meaning(
        "error",
        "An input gets another storage (`set_`): a replay writes to the old one.",
        "copy_ into the storage that it has",
    ),
    "capture.untraced": Meaning(
        "error", "The trace ended here: nothing is known of what follows.", "make it traceable by torch.compile"
    ),
    "capture.devices_unknown": Meaning(
        "warning",
        "This build of PyTorch has no CUDA, and could not tell the CPU from the GPU here: copies between them, and "
        "inputs on the CPU, were not looked for.",
        "ask again with a build for CUDA or ROCm; no GPU is needed",
    ),
    "capture.mutated_input": Meaning(
        "warning",
        "An argument is written in place, and nothing says that its address is fixed: mode='reduce-overhead' refuses "
        "the whole graph ('mutated inputs').",
        "make it a buffer, or call torch._dynamo.mark_static_address(tensor) before the first call",
    ),
    "capture.graph_break": Meaning(
        "warning",
        "Dynamo ends the graph here: Python runs between two graphs, and a capture keeps only what it launches.",
        "compile with fullgraph=True, and remove what it names",
    ),
    "capture.dynamic_shape": Meaning(
        "warning",
        "A size is symbolic: a graph is captured anew for every size that occurs.",
        "pad to a few sizes, and compile with dynamic=False",
    ),
    "capture.collective": Meaning(
        "note",
        "A collective: its communicator must exist before the capture, and all ranks must capture and replay alike.",
        "run it once before the capture, on every rank: fx_fusion.warmup",
    ),
    "capture.random": Meaning(
        "note",
        "Random numbers on the GPU: every replay draws new ones, of the default generator only.",
        "register any other generator with CUDAGraph.register_generator_state",
    ),
    "capture.stream": Meaning(
        "note",
        "Another stream: it is captured only between waiting for the capturing stream and being waited for by it.",
        "end every use of a side stream with current_stream().wait_stream(side)",
    ),
}

_RANK: dict[str, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Hazard:
    """One place.

    Attributes:
        code: a key of :data:`HAZARDS`.
        severity: ``error``: a capture fails there, or a replay is wrong; ``warning``: PyTorch's own CUDA graphs refuse,
            or capture again and again; ``note``: right under the condition that it names.
        reason: what was found.
        fix: what to do.
        source: the user's ``file:line``, if the trace kept it.
        node: the FX node.
        count: how often it was found at that line.
    """

    code: str
    severity: Severity
    reason: str
    fix: str
    source: str | None = None
    node: str | None = None
    count: int = 1

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        place = f"\n      at {self.source}" if self.source else ""
        return f"  {self.severity:8} {self.code}: {self.reason}{times}{place}\n      fix: {self.fix}"


@dataclass(frozen=True)
class HazardReport(Sequence[Hazard]):
    """All hazards of a model, the worst first; empty if it can be captured as it is.

    Attributes:
        hazards: what was found.
        graphs: how many graphs ``torch.compile`` makes of it.
        nodes: how many nodes they have.
    """

    hazards: tuple[Hazard, ...]
    graphs: int
    nodes: int

    @property
    def errors(self) -> list[Hazard]:
        """Where a capture fails, or a replay is wrong."""
        return [hazard for hazard in self.hazards if hazard.severity == "error"]

    @property
    def codes(self) -> set[str]:
        return {hazard.code for hazard in self.hazards}

    @overload
    def __getitem__(self, index: int) -> Hazard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hazard]: ...
    def __getitem__(self, index: int | slice) -> Hazard | Sequence[Hazard]:
        return self.hazards[index]

    def __len__(self) -> int:
        return len(self.hazards)

    def __str__(self) -> str:
        counts = Counter(hazard.severity for hazard in self.hazards)
        found = ", ".join(_count(counts[severity], severity) for severity in _RANK if counts[severity])
        size = f"{_count(self.graphs, 'graph')}, {_count(self.nodes, 'node')}"
        head = f"fx_fusion: capture hazards: {found or 'none'} ({size})"
        return "\n".join([head, *map(str, self.hazards)])


def _line_of(node: Node) -> str | None:
    """Of an input, where it is used."""
    nodes = [node, *(node.users if node.op == "placeholder" else ())]
    return first_source_line(nodes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def capture_hazards(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> HazardReport:
    """Everything in ``fn(*args, **kwargs)`` that breaks a captured graph, or makes it replay old values.

    The function is traced on fake tensors; nothing is computed, and `fn` and its arguments are left untouched. Tensors
    are judged by where they are. If none of them is on a GPU, they all stand for tensors on one, as after
    ``model.to("cuda")``: parameters, buffers and arguments, but not the tensors that ``to`` would not move (plain
    attributes of modules).

    Args:
        fn: a module, a bound method of one, or a function, as one would give it to ``torch.compile``.
        args, kwargs: its arguments.

    Returns:
        The hazards, the worst first; it is empty, hence false, if there are none.
    """
    return report(graphs.trace(fn, args, kwargs))


def report(trace: graphs.Trace) -> HazardReport:
    """The hazards of traced graphs."""
    found: list[Hazard] = []
    for graph in trace.graphs:
        told = [*in_dynamo_graph(graph.dynamo), *in_aten_graph(graph.aten.graph, graph.static)]
        found += [_hazard(each.code, each.reason, each.node) for each in told]
        if graph.breaks is not None:
            found.append(_break(*graph.breaks))
    if trace.error is not None and not any(hazard.severity == "error" for hazard in found):
        found.append(_failure(trace.error))
    placed = {graph.breaks[0] for graph in trace.graphs if graph.breaks is not None}
    found += [_break(reason, None) for reason in trace.breaks if not any(_alike(reason, each) for each in placed)]
    if not trace.graphs and not found:
        found.append(_hazard("capture.untraced", "torch.compile makes no graph of it"))
    if not trace.devices_known:
        found.append(_hazard("capture.devices_unknown", "a list becomes a tensor on the GPU"))
    nodes = sum(len(graph.aten.graph.nodes) for graph in trace.graphs)
    return HazardReport(_summed(found), len(trace.graphs), nodes)


def _summed(found: Sequence[Hazard]) -> tuple[Hazard, ...]:
    """What recurs at one line is one hazard; what two rules say of one line is said by the first of them."""
    first: dict[tuple[str, str | None], Hazard] = {}
    counts: Counter[tuple[str, str | None]] = Counter()
    for hazard in found:
        key = (hazard.code, hazard.source or hazard.node)
        first.setdefault(key, hazard)
        counts[key] += 1
    hazards = [replace(hazard, count=counts[key]) for key, hazard in first.items()]
    return tuple(sorted(hazards, key=lambda hazard: _RANK[hazard.severity]))


def _hazard(code: str, reason: str, node: Node | None = None, source: str | None = None) -> Hazard:
    told = HAZARDS[code]
    place = source or (_line_of(node) if node is not None else None)
    return Hazard(code, told.severity, reason, told.fix, place, str(node) if node is not None else None)


def _break(reason: str, place: str | None) -> Hazard:
    told = _first_line(reason)
    if any(word in reason for word in ("generic_jump", "ata-dependent", ".item()", ".tolist()")):
        return _hazard("capture.item", "what Python does next depends on a value on the GPU", source=place)
    if "synchronize" in reason:
        return _hazard("capture.synchronize", "the host waits for the GPU", source=place)
    return _hazard("capture.graph_break", told, source=place)


def _alike(reason: str, other: str) -> bool:
    """Two words for one break: what Dynamo counts, and what it notes beside the graph."""
    a, b = _first_line(reason), _first_line(other)
    return a in other or b in reason


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "Dynamo gives no reason"


def _failure(error: Exception) -> Hazard:
    place = graphs.where_it_failed(error)
    text = str(error)
    if "pin_memory" in text:
        return _hazard("capture.pin_memory", "pin_memory is called inside", source=place)
    if "data-dependent" in text:
        return _hazard("capture.item", "what Python does next depends on a value on the GPU", source=place)
    explanation = next((line for line in text.splitlines() if "Explanation:" in line), "")
    found = explanation.split("Explanation:", 1)[-1].strip() or _first_line(text)
    if not torch.backends.cuda.is_built():
        found = re.sub(r"\bmeta\b", "cuda:0", found)
    return _hazard("capture.untraced", f"{type(error).__name__}: {found[:300]}", source=place)


def markdown() -> str:
    """``docs/hazards.md``."""
    lines = [
        "# Capture hazards",
        "",
        "What [`fx_fusion.capture_hazards`](capture.md) finds. `make docs` writes this table from the source.",
        "",
    ]
    lines += ["| code | severity | what happens | what to do |", "|---|---|---|---|"]
    lines += [f"| `{code}` | {told.severity} | {told.meaning} | {told.fix} |" for code, told in HAZARDS.items()]
    return "\n".join(lines) + "\n"

"""Why something was not rewritten: a stable code, one sentence, the node, the user's line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.fx import Node

#: Every code a report can carry, with what it means. ``docs/declines.md`` is generated from this table.
CODES: dict[str, str] = {
    "graph.training": "The graph saves values for a backward pass; fusions serve inference graphs only.",
    "graph.disabled": "FX_FUSION_DISABLE is set.",
    "graph.fuel": "FX_FUSION_FUEL allows no further rewrite.",
    "meaning.hidden": "An operation reads or writes what is not in the graph, so nobody can say what it computes.",
    "meaning.schema": "A declared meaning does not take the arguments that this version of the operation has.",
    "meaning.in_place": "An operation with a declared meaning writes in place; a functionalised graph is expected.",
    "meaning.views": "What an operation writes are views that overlap, or that are no rectangular part of a tensor.",
    "meaning.stays": "An operation stores keys and values and does more than that: it would stay and store again.",
    "meaning.raises": "A declared meaning raised, or cannot be traced.",
    "meaning.outputs": "A declared meaning gives other shapes or dtypes than the operation does.",
    "meaning.mismatch": "An operation and its declared meaning gave different results when both were run.",
    "store.missing": "The graph writes no KV cache in place (for example a DynamicCache, which concatenates).",
    "store.unknown_writer": "An input is mutated by an operation whose addresses cannot be read.",
    "store.other_cache": "A cache is overwritten with another input, or with what is stored into another input.",
    "store.repeated": "The whole of a cache is stored into more than once, for example by two layers.",
    "store.value_twice": "One value is stored into two caches.",
    "store.value_is_input": "What is stored is a graph input: it was computed elsewhere, as before a graph break.",
    "store.integer_cache": "The cache holds integers that are no bytes of a float8: a quantised cache.",
    "store.overlap": "Keys and values are stored into parts of one cache that overlap, or may do so.",
    "store.mask": "A masked store does not decide token by token.",
    "store.scale": "What is stored is scaled by other than a number or one float of at most 32 bits.",
    "store.scale_inverted": "What is stored is multiplied by its scale; the kernels divide, which rounds differently.",
    "store.conversion": "PyTorch converts to the cache's float8 otherwise than the kernels do.",
    "store.conversions_differ": "Keys and values are converted differently, to another float8 or beyond its range.",
    "store.unpaired": "A cache store has no partner: key and value stores are recognised in pairs.",
    "store.accumulates": "The store adds to the cache instead of overwriting it.",
    "store.index": "The cache is indexed in a way that is not one slot, or one block and offset, per token.",
    "store.order": "Between the stores of keys and of values, their common cache is stored into by others.",
    "store.cache_not_viewable": "The cache is written through a reshape that copies, or is put back elsewhere.",
    "store.value_broadcast": "The stored value is broadcast over the cache instead of written element by element.",
    "store.layout": "The stored value does not fill whole heads of the cache, one row per token.",
    "store.old_cache_read": "Something not ordered before the call reads the cache from before the store.",
    "store.slots_differ": "Key and value are stored at different slots.",
    "split.columns": "The columns read from the projection are not whole heads at a constant distance.",
    "split.heads": "The number of columns read is not a multiple of head_dim.",
    "split.layout": "The projection's output is not laid out one token per row.",
    "split.v_not_copied": "The stored value is not a plain copy of projected columns.",
    "norm.not_per_head": "The normalisation does not act on each head alone.",
    "norm.not_rms": "The value before the rotation is neither RMS-normalised nor linear in the projection.",
    "norm.eps": "The constant under the root could not be read as one positive number.",
    "norm.offset": "With zero input the result is not zero: something is added on the way from the projection.",
    "norm.eps_is_input": "The epsilon is a graph input; its value must not be read.",
    "norm.differs": "Query and key are normalised differently (one by weight, the other by 1 + weight).",
    "norm.weight": "The norm's weight is not one value per lane of the head.",
    "rope.missing": "No rotation was found between the projection and the store.",
    "rope.not_a_rotation": "The lanes of a head are not coupled in pairs as a rotary embedding couples them.",
    "rope.rows": "Cosine and sine are not one row per token, shared by all heads.",
    "rope.differs": "Query and key are rotated by different angles, or in different styles.",
    "rope.query_missing": "No query is rotated by the angles that rotate the key.",
    "rope.query_escapes": "The rotated query is consumed in pieces: no single value holds it.",
    "rope.output_dtype": "A rotated head leaves in another dtype than its projection.",
    "region.escapes": "A value inside the region is also used outside it.",
    "region.not_convex": "A result of the call would feed one of its own operands.",
    "region.evaluation": "The region could not be evaluated on the CPU.",
    "region.too_large": "The region is too large to evaluate within the memory bound.",
    "region.strides": "What takes a result may see its strides, and the replacement's cannot be made the same.",
    "region.sizes": "A size that must be a number is a symbol, or depends on data.",
    "proof.not_analytic": "A step on the data path is not analytic, so samples cannot prove what it computes.",
    "proof.sampled": "A step has no meaning in a finite field: samples agree, and fx_fusion.trust asks for a proof.",
    "proof.degree": "The region computes a polynomial of too high a degree to be compared exactly.",
    "proof.rounding": "A step rounds more coarsely (or computes more finely) than the fused kernel does.",
    "proof.mismatch": "The region and the fused operation differ.",
    "contract.kernel": "No kernel can serve this call.",
    "fusion.absent": "A rare step of a user's pattern occurs nowhere in the graph.",
    "fusion.no_match": "Nothing in the graph computes a user's pattern; the report tells what comes nearest.",
    "fusion.replacement_differs": "The replacement of a user's pattern computes something else than the pattern.",
    "fusion.replacement_fails": "The replacement of a user's pattern raises where the pattern runs.",
    "fusion.unverified": "A user's pattern cannot run where it stands, so its replacement cannot be compared with it.",
    "fusion.check": "The check that a user's pattern was registered with refuses the match.",
    "placement.device": "Operands lie on different GPUs.",
    "placement.on_host": "An operand is on the CPU, where the kernel cannot read it.",
    "placement.scale_on_host": "A scale is a tensor on the CPU, where the kernel cannot read it.",
    "placement.transfer": "An operand is copied between CPU and GPU inside the graph, which breaks a capture.",
    "placement.waits": "An operand depends on a value or a size that the host reads back, which breaks a capture.",
    "placement.cache": "The cache is a temporary: it has no stable address.",
    "placement.shared_storage": "Two caches are views of one tensor at a distance that only a run knows.",
    "report.missing": "The compile cache supplied a graph whose report file is gone.",
    "internal.error": "A reader raised an unexpected exception.",
}

#: Codes of a graph as a whole, in which nothing was looked for, or in which there is nothing to fuse.
IDLE = frozenset({"graph.training", "graph.disabled", "store.missing", "fusion.absent", "report.missing"})

#: Codes that tell no more than that an operation is opaque: left out where it is told why that one is.
OPAQUE = frozenset({"store.unknown_writer"})

#: How far a region got, in order; of several attempts the report shows the one that got furthest.
STAGES = (
    "graph",
    "meaning",
    "store",
    "fusion",
    "region",
    "split",
    "norm",
    "rope",
    "proof",
    "contract",
    "placement",
    "report",
    "internal",
)


class Decline(Exception):
    """A reason not to rewrite. Raised by readers, collected by the pass, never seen by the user's program.

    Args:
        code: a key of :data:`CODES`.
        found: one sentence: what was expected and what was measured.
        nodes: the FX nodes concerned, the most telling first.
        reached: how far the pass had come (``key, norm``); :func:`reaching` fills it in.
    """

    def __init__(self, code: str, found: str, nodes: Iterable[Node] = (), reached: str = "") -> None:
        if code not in CODES:
            raise ValueError(f"unknown decline code {code!r}")
        super().__init__(f"{code}: {found}")
        self.code = code
        self.found = found
        self.nodes = tuple(nodes)
        self.reached = reached

    @property
    def stage(self) -> int:
        return STAGES.index(self.code.split(".")[0])


@contextlib.contextmanager
def reaching(stage: str) -> Generator[None]:
    """What is declined inside is said to have reached `stage`; nested stages are named the outer one first."""
    try:
        yield
    except Decline as decline:
        decline.reached = f"{stage}, {decline.reached}" if decline.reached else stage
        raise


_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')


class Frame(NamedTuple):
    """A line of a user's function."""

    file: str
    line: int
    function: str


def frames(node: Node) -> list[Frame]:
    """The frames outside torch that made `node`, the innermost last; none if the trace kept none."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    return [Frame(file, int(line), function) for file, line, function in found if not file.startswith(_TORCH)]


def source_line(node: Node) -> str | None:
    """``file:line`` of the innermost frame outside torch that made `node`, or None if the trace kept none."""
    found = frames(node)
    return f"{found[-1].file}:{found[-1].line}" if found else None


def first_source_line(nodes: Iterable[Node]) -> str | None:
    return next((line for node in nodes if (line := source_line(node))), None)


def module_path(node: Node) -> str | None:
    """The module whose forward made `node`, as ``layers.0.self_attn``, or None for the outermost one."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    # A decorated forward may have been entered with the module among its positional arguments.
    return re.sub(r"^L\['\w+'\](\[\d+\])?\.?", "", str(path)) or None


def markdown() -> str:
    """``docs/declines.md``."""
    lines = [
        "# Declines",
        "",
        "Why a layer stayed unfused. The codes are stable; `make docs` writes this table from the source.",
        "",
    ]
    lines += ["| code | meaning |", "|---|---|"]
    lines += [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]
    return "\n".join(lines) + "\n"

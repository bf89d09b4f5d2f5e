"""A fusion from plain PyTorch functions: a pattern to find, a replacement to put there.

Before::

    y = x * rsqrt(mean(x²) + eps) * weight          # however it is spelled

After::

    y = replacement(x, weight, eps)                 # the same tensors of the graph, and its numbers
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.equivalence import SCALES, Comparison, coarsest
from fx_fusion.function_fusions.parameters import check_replacement
from fx_fusion.function_fusions.pattern import Pattern
from fx_fusion.function_fusions.replacement import compare_replacement
from fx_fusion.function_fusions.samples import Sampler
from fx_fusion.function_fusions.search import Place, Search, Tracer, compare
from fx_fusion.fusion import Assessment, Fusion
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.paths import Branch, branch_key, is_moved_from, strip_aliases
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional, NotTraceable, trace
from fx_fusion.kernels.target import Target
from fx_fusion.placement import check_convex, check_devices
from fx_fusion.proof.evaluate import Arithmetic, schedule
from fx_fusion.proof.floats import NATIVE_TOLERANCE
from fx_fusion.proof.region_function import TOLERANCE

log = logging.getLogger(__name__)

#: Key in ``meta`` of a node that a rewrite replaced: by which node.
_REPLACED = "fx_fusion_replaced_by"

PLATFORMS = ("cpu", "cuda", "hip")

Check = Callable[["Found"], "bool | str | None"]


@dataclass(frozen=True)
class Found:
    """A proved match, as a user's ``check`` sees it.

    Attributes:
        tensors: for each tensor parameter its fake value in the graph (shape, dtype, strides, device); sizes may be
            symbolic. None for an optional part that is absent.
        numbers: the value of each captured ``int`` and ``float``.
        choices: the value of each ``bool`` and ``Literal``.
    """

    tensors: Mapping[str, torch.Tensor | None]
    numbers: Mapping[str, int | float]
    choices: Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    place: Place
    nodes: tuple[Node, ...]
    error: float
    verified: float


class FunctionFusion(Fusion[Place, Match]):
    """What :func:`fx_fusion.register_fusion` makes of functions. For the arguments see there."""

    def __init__(
        self,
        pattern: Callable[..., Any] | Sequence[Callable[..., Any]],
        replacement: Callable[..., Any],
        *,
        check: Check | None = None,
        name: str | None = None,
        example: Mapping[str, Any] | Sequence[Any] | None = None,
        platforms: Sequence[str] = PLATFORMS,
    ) -> None:
        functions = [pattern] if callable(pattern) else list(pattern)
        if not functions:
            raise TypeError("register_fusion: pattern must be a function, or a list of functions, got an empty list")
        unknown = [platform for platform in platforms if platform not in PLATFORMS]
        if unknown or isinstance(platforms, str):
            raise ValueError(f"register_fusion: platforms must be some of {PLATFORMS}, got {platforms!r}")
        self.name = name or getattr(functions[0], "__name__", "fusion")
        self.replacement = replacement
        self.user_check = check
        self.platforms = tuple(platforms)
        self.functions = tuple(functions)
        self._patterns = tuple(Pattern.of(fn, example) for fn in functions)
        if len({pattern.parameters for pattern in self._patterns}) > 1:
            raise TypeError("register_fusion: the patterns must have the same parameters")
        check_replacement(self._patterns[0].parameters, replacement, "replacement")
        for each in self._patterns:
            self._try_on_example(each)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.name, self.functions, self.replacement, self.user_check, self.platforms)

    def _try_on_example(self, pattern: Pattern) -> None:
        for variant in pattern.variants:
            example = pattern.example(variant)
            others = {**variant, **example.numbers}
            try:
                compare_replacement(pattern.fn, self.replacement, example.tensors, others, torch.device("cpu"))
            except Decline as decline:
                if decline.code == "fusion.replacement_differs":
                    raise ValueError(f"register_fusion: {self.name}: {decline.found}") from None
                log.info("fx_fusion: %s is compared with its pattern at its first match: %s", self.name, decline.found)

    def find(self, analysis: GraphAnalysis) -> tuple[list[Place], list[Decline]]:
        tracer, covered = Tracer(), set[Node]()
        places: list[Place] = []
        nearest: list[tuple[Node, Decline]] = []
        for pattern in self._patterns:
            search = Search(analysis, pattern, tracer)
            places.extend(search.places(covered))
            nearest.extend(search.nearest)
        places.sort(key=lambda place: analysis.order[place.anchor])
        return places, self._misses(places, nearest, covered)

    def _misses(
        self, places: Sequence[Place], nearest: Sequence[tuple[Node, Decline]], covered: set[Node]
    ) -> list[Decline]:
        """What came near and is no match: of each place the furthest attempt, where something was compared at all."""
        by_anchor: dict[Node, Decline] = {}
        for anchor, decline in nearest:
            known = by_anchor.get(anchor)
            if anchor not in covered and (known is None or decline.stage > known.stage):
                by_anchor[anchor] = decline
        compared = [decline for decline in by_anchor.values() if decline.code != "fusion.no_match"]
        if places or compared or not by_anchor:
            return compared
        furthest = next(iter(by_anchor.values()))
        found = (
            f"{len(by_anchor)} places of the graph could be {self.name}, and none is; at the first, {furthest.found}"
        )
        return [Decline("fusion.no_match", found, furthest.nodes)]

    def read(self, analysis: GraphAnalysis, candidate: Place, memo: dict[object, Any]) -> Match:
        inputs = Search(analysis, candidate.pattern, Tracer()).inputs(candidate.tensors)
        nodes = schedule(candidate.results, inputs)
        leaves = list(candidate.tensors.values())
        keys = [branch_key(Branch(leaves[0], leaves[0], node, (), ()), leaves[1:]) for node in candidate.results]
        key = (self.name, id(candidate.pattern), repr(candidate.others), tuple(candidate.tensors), tuple(keys))
        if key not in memo:
            try:
                memo[key] = (self._prove(analysis, candidate, inputs, nodes), self._verify(analysis, candidate))
            except Decline as decline:
                memo[key] = decline
        if isinstance(memo[key], Decline):
            raise Decline(memo[key].code, memo[key].found, candidate.results)
        error, verified = memo[key]
        self._ask(candidate)
        return Match(candidate, tuple(nodes), error, verified)

    def _prove(self, analysis: GraphAnalysis, place: Place, inputs: Mapping[Node, str], nodes: Sequence[Node]) -> float:
        worst = 0.0
        for sizes in analysis.sizes:
            pattern = self._traced(place, sizes)
            comparison = compare(inputs, place.results, pattern, pattern.results, sizes, nodes)
            worst = max(worst, prove(comparison, Sampler(pattern, seed=4), coarsest([*inputs, *place.results])))
        return worst

    def _traced(self, place: Place, sizes: Sizes) -> Functional:
        values = {name: node.meta["val"] for name, node in place.tensors.items()}
        shapes = {name: (sizes.shape(value), value.dtype) for name, value in values.items()}
        try:
            return Tracer().trace(place.pattern, shapes, place.others)
        except NotTraceable as error:
            raise Decline("fusion.no_match", f"the pattern does not take these tensors: {error}") from error

    def _verify(self, analysis: GraphAnalysis, place: Place) -> float:
        """The replacement beside the pattern, at the sizes, dtypes and strides of the match, where it would run."""
        worst = 0.0
        for sizes in analysis.sizes:
            values = {name: node.meta["val"] for name, node in place.tensors.items()}
            shapes = {name: _meta_like(value, sizes) for name, value in values.items()}
            device = next(iter(values.values())).device
            found = compare_replacement(place.pattern.fn, self.replacement, shapes, place.others, device)
            worst = max(worst, found)
        return worst

    def _ask(self, place: Place) -> None:
        if self.user_check is None:
            return
        absent = {
            p.name: None for p in place.pattern.parameters if p.kind.value == "tensor" and p.name in place.variant
        }
        tensors = {**{name: node.meta["val"] for name, node in place.tensors.items()}, **absent}
        choices = {name: value for name, value in place.variant.items() if name not in absent}
        answer = self.user_check(Found(tensors, place.numbers, choices))
        if answer is False or isinstance(answer, str):
            reason = answer or "check returned False"
            raise Decline("fusion.check", f"the fusion's own check says: {reason}", place.results)

    def assess(self, match: Match) -> Assessment:
        place = match.place
        shapes = {name: _layout(node) for name, node in place.tensors.items()}
        data = {"tensors": shapes, "numbers": dict(place.numbers), "choices": dict(place.variant)}
        words = [f"{name} {layout}" for name, layout in shapes.items()]
        words += [f"{name} {value!r}" for name, value in place.others.items()]
        return Assessment(f"{self.name}: {', '.join(words)}", data, match.error)

    def choose(self, match: Match, kernel: str, target: Target) -> str:
        if target.platform not in self.platforms:
            found = f"the replacement is for {', '.join(self.platforms)}, the target is {target.name}"
            raise Decline("contract.kernel", found)
        return "replacement"

    def check(self, analysis: GraphAnalysis, match: Match) -> None:
        place = match.place
        operands = list(place.tensors.values())
        check_devices(operands)
        check_convex(analysis, operands, place.results)
        _check_escapes(analysis, match)
        traced = self._traced(place, analysis.sizes[0])
        for name in traced.mutated:
            _check_overwritten(analysis, place, place.tensors[name], match.nodes)

    def rewrite(self, graph: Graph, match: Match, kernel: str) -> None:
        insert(graph, match.place, self.replacement)


def prove(comparison: Comparison, sampler: Sampler, dtype: torch.dtype) -> float:
    """The largest relative difference in float64 between region and pattern, over all scales of input.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the scale, ``proof.not_analytic``.
    """
    scales = [scale for scale in SCALES if scale <= 100 or not _turns(comparison)]
    worst = 0.0
    mixed = tuple(scale for scale in scales if 0 < scale < 1e10)
    for scale in [*scales, None, None, None, None]:
        values = sampler.values(scale, mixed=mixed if scale is None else ())
        difference, where = comparison.difference(values, sampler.generator)
        ordinary = scale is not None and scale <= 1
        if difference < TOLERANCE or (difference == float("inf") and not ordinary):
            worst = max(worst, difference if difference < TOLERANCE else 0.0)
            continue
        spread = f"of scale {scale:g}" if scale is not None else "of mixed scales"
        raise Decline(
            "proof.mismatch", f"in float64 {where} and the pattern differ by {difference:.1e} on input {spread}"
        )
    values = sampler.values(1.0, Arithmetic.NATIVE)
    difference, where = comparison.difference(values, sampler.generator, Arithmetic.NATIVE)
    rounds = 1 + len(comparison.region.nodes) // 8
    if not difference < rounds * NATIVE_TOLERANCE[dtype]:
        raise Decline("proof.mismatch", f"in {dtype} {where} and the pattern differ by {difference:.1e}")
    return worst


def _turns(comparison: Comparison) -> bool:
    """Is there a sine or cosine? Of large numbers it is noise."""
    return any(
        operations.row(node).rare == "trigonometric"
        for side in (comparison.region, comparison.pattern)
        for node in side.nodes
    )


def insert(graph: Graph, place: Place, replacement: Callable[..., Any]) -> None:
    """Call `replacement` in the place of the region. The graph is left unsorted: see ``tidy.finish``."""
    tensors = {name: _current(node) for name, node in place.tensors.items()}
    traced = trace(replacement, {name: node.meta["val"] for name, node in tensors.items()}, place.others)
    last = place.results[-1]
    with graph.inserting_before(last):
        emit = Emitter(graph, place.anchor)
        copied: dict[Node, Any] = {traced.inputs[name]: node for name, node in tensors.items()}
        for node in traced.nodes:
            copied[node] = _copy(emit, node, copied)
    for old, new in _corresponding(place, traced):
        node = copied[new]
        old.replace_all_uses_with(node)
        old.meta[_REPLACED] = node


def _corresponding(place: Place, replacement: Functional) -> list[tuple[Node, Node]]:
    """Each result of the region, and what the replacement gives for it."""
    pattern = place.pattern.example(place.variant).traced
    pairs = list(zip(pattern.returned, replacement.returned, strict=True))
    pairs += [(pattern.mutated[name], replacement.mutated[name]) for name in pattern.mutated]
    return [(place.results[theirs], replacement.results[ours]) for theirs, ours in pairs]


def _copy(emit: Emitter, node: Node, copied: Mapping[Node, Any]) -> Node:
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: copied[a] if isinstance(a, Node) else a)
    target = aten.reshape.default if node.target in operations.RESHAPE else node.target
    new = emit.call_with_value(node.meta["val"], target, *args, **kwargs)
    if operations.is_opaque(node):
        # A custom operation or a kernel launch gets its tensors with the strides that they have here.
        new.meta["eager_input_vals"] = map_aggregate((tuple(args), dict(kwargs)), value_of)
    return new


def _current(node: Node) -> Node:
    while _REPLACED in node.meta:
        node = node.meta[_REPLACED]
    return node


def _check_escapes(analysis: GraphAnalysis, match: Match) -> None:
    """A value that only the replaced computation made must not be needed elsewhere."""
    inside, place = set(match.nodes), match.place
    operands = set(place.tensors.values())
    for node in match.nodes:
        if node in place.results or operations.is_symbolic(node) or operations.is_literal(node):
            continue
        if any(is_moved_from(node, operand) for operand in operands):
            continue
        outside = [user for user in analysis.users(node) if user not in inside]
        if outside:
            found = f"{node} lies inside the region and {outside[0]} uses it too"
            raise Decline("region.escapes", found, [node, outside[0]])


def _check_overwritten(analysis: GraphAnalysis, place: Place, operand: Node, nodes: Sequence[Node]) -> None:
    """Whoever reads what the replacement overwrites must be ordered before it, or the whole would be copied."""
    inside = set(nodes)
    operands = list(place.tensors.values())
    stack, seen = [strip_aliases(operand)], set[Node]()
    while stack:
        node = stack.pop()
        for user in analysis.users(node):
            if user in inside or user in seen or user.target is aten.copy_.default:
                continue
            seen.add(user)
            if user.target in operations.VIEW:
                stack.append(user)
            elif not any(analysis.between(user, [each]) for each in operands):
                found = f"{user} reads {operand} as it was before the replacement changes it"
                raise Decline("store.old_cache_read", found, [user])


def _meta_like(value: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    stride = tuple(sizes.concrete(step) for step in value.stride())
    return torch.empty_strided(sizes.shape(value), stride, dtype=value.dtype, device="meta")


def _layout(node: Node) -> str:
    value = node.meta["val"]
    return f"[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"

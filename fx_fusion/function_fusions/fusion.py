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

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.agreement import same
from fx_fusion.function_fusions.insertion import Traces, corresponding, insert
from fx_fusion.function_fusions.layout import check_layout
from fx_fusion.function_fusions.misses import misses, relocated
from fx_fusion.function_fusions.numbers import literals_of
from fx_fusion.function_fusions.operations_named import is_missing, missing_operations
from fx_fusion.function_fusions.order import in_order
from fx_fusion.function_fusions.parameters import check_replacement
from fx_fusion.function_fusions.pattern import Pattern
from fx_fusion.function_fusions.place import Place
from fx_fusion.function_fusions.proof import prove
from fx_fusion.function_fusions.reference import Reference
from fx_fusion.function_fusions.replacement import ReplacementFails, compare_replacement
from fx_fusion.function_fusions.search import Search
from fx_fusion.function_fusions.symbols import all_sizes, check_sizes
from fx_fusion.function_fusions.tracer import Tracer
from fx_fusion.fusion import Assessment, Fusion
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.graph.paths import is_moved_from, strip_aliases
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional, NotTraceable, fakes_like, trace
from fx_fusion.kernels.target import Target
from fx_fusion.placement import check_convex, check_devices, check_draws

log = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "hip")

_CPU = torch.device("cpu")

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
    """
    Attributes:
        error: the largest difference to the pattern, in float64.
        verified: the largest difference between the replacement and the graph, in the dtypes of the graph.
        traces: replacements traced on tensors like these.
    """

    place: Place
    error: float
    verified: float
    traces: Traces


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
        missing = missing_operations(replacement)
        if missing:
            raise ValueError(f"register_fusion: {self.name}: the replacement calls {missing[0]}, which does not exist")
        for each in self._patterns:
            self._try_on_example(each)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.name, self.functions, self.replacement, self.user_check, self.platforms)

    def _try_on_example(self, pattern: Pattern) -> None:
        for variant in pattern.variants:
            example = pattern.example(variant)
            others = {**variant, **example.numbers}
            reference, literals = Reference.of_pattern(example.traced), literals_of(example.traced.nodes)
            try:
                compare_replacement(reference, self.replacement, example.tensors, others, _CPU, literals)
            except Decline as decline:
                wrong = decline.code == "fusion.replacement_differs"
                if wrong or (isinstance(decline, ReplacementFails) and is_missing(decline.error)):
                    raise ValueError(f"register_fusion: {self.name}: {decline.found}") from None
                log.info("fx_fusion: %s is compared with the graph at its first match: %s", self.name, decline.found)

    def find(self, analysis: GraphAnalysis) -> tuple[list[Place], list[Decline]]:
        tracer, covered = Tracer(), set[Node]()
        searches = [Search(analysis, pattern, tracer) for pattern in self._patterns]
        places = [place for search in searches for place in search.places(covered)]
        places.sort(key=lambda place: analysis.order[place.anchor])
        kept, circular = in_order(analysis, places)
        return kept, [*circular, *misses(self.name, searches, covered, found=bool(places))]

    def read(self, analysis: GraphAnalysis, candidate: Place, memo: dict[object, Any]) -> Match:
        traces: Traces = memo.setdefault((self.name, "traces"), Traces())
        key = (self.name, candidate.key(analysis))
        if key not in memo:
            try:
                memo[key] = (candidate, self._prove(analysis, candidate), self._verify(analysis, candidate))
            except Decline as decline:
                memo[key] = (candidate, decline, 0.0)
        first, error, verified = memo[key]
        if isinstance(error, Decline):
            raise relocated(error, dict(zip(first.nodes, candidate.nodes, strict=True)))
        self._ask(candidate)
        return Match(candidate, error, verified, traces)

    def _prove(self, analysis: GraphAnalysis, place: Place) -> float:
        check_sizes(place.nodes)
        worst = 0.0
        for sizes in all_sizes(analysis, place.nodes):
            worst = max(worst, prove(analysis, place, self._traced(place, sizes), sizes))
        return worst

    def _traced(self, place: Place, sizes: Sizes) -> Functional:
        values = {name: node.meta["val"] for name, node in place.tensors.items()}
        shapes = {name: (sizes.shape(value), value.dtype) for name, value in values.items()}
        try:
            return trace(place.pattern.fn, fakes_like(shapes), place.others)
        except NotTraceable as error:
            raise Decline("fusion.no_match", f"the pattern does not take these tensors: {error}") from error

    def _verify(self, analysis: GraphAnalysis, place: Place) -> float:
        """The replacement beside the region, at the sizes, dtypes and strides of the match, where it would run."""
        worst = 0.0
        values = {name: node.meta["val"] for name, node in place.tensors.items()}
        device, literals = next(iter(values.values())).device, literals_of(place.nodes)
        for sizes in all_sizes(analysis, place.nodes):
            likes = {name: _meta_like(value, sizes) for name, value in values.items()}
            reference = Reference.of_place(analysis, place, sizes)
            found = compare_replacement(
                reference, self.replacement, likes, place.others, device, literals, same(place.tensors)
            )
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
        check_draws(analysis, operands, place.results)
        _check_escapes(analysis, match)
        mutated = place.pattern.example(place.variant).traced.mutated
        for name in mutated:
            _check_changed_once(place, name)
            _check_overwritten(analysis, place, place.tensors[name], place.nodes)
        traced = match.traces.of(place, self.replacement)
        for old, new in corresponding(place, traced):
            check_layout(analysis, old, new.meta["val"])

    def rewrite(self, graph: Graph, match: Match, kernel: str) -> None:
        self.insert(graph, match, self.replacement)

    def insert(self, graph: Graph, match: Match, function: Callable[..., Any]) -> None:
        """Call `function`, which takes and returns what the replacement does, in the place of the match."""
        insert(graph, match.place, match.traces.of(match.place, function))


def _check_escapes(analysis: GraphAnalysis, match: Match) -> None:
    """A value that only the replaced computation made must not be needed elsewhere."""
    inside, place = set(match.place.nodes), match.place
    operands = set(place.tensors.values())
    for node in place.nodes:
        if node in place.results or operations.is_symbolic(node) or operations.is_literal(node):
            continue
        outside = [user for user in analysis.users(node) if user not in inside]
        if outside and not any(is_moved_from(node, operand) for operand in operands):
            found = f"{node} lies inside the region and {outside[0]} uses it too"
            raise Decline("region.escapes", found, [node, outside[0]])


def _check_changed_once(place: Place, name: str) -> None:
    """What is changed is nothing else that the replacement takes."""
    others = [other for other, node in place.tensors.items() if other != name and node is place.tensors[name]]
    if others:
        found = f"{name} is changed, and is the same tensor as {others[0]}"
        raise Decline("store.old_cache_read", found, [place.tensors[name]])


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

"""A branch as a function: put data and operands in, read the result, in float64 or in native dtypes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.paths import Branch, strip, strip_views
from fx_fusion.graph.sizes import Sizes
from fx_fusion.proof.evaluate import Arithmetic, evaluate

#: Two float64 evaluations of the same analytic function differ by less, relative to the largest value.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Probe:
    """`branch` at `sizes`, as a function of its data and of `leaves`, the tensors that feed it from outside."""

    branch: Branch
    leaves: tuple[Node, ...]
    sizes: Sizes

    @property
    def data_shape(self) -> tuple[int, ...]:
        return self.sizes.shape(self.branch.data.meta["val"])

    @property
    def tokens(self) -> int:
        return self.branch.tokens(self.sizes)

    @property
    def columns(self) -> int:
        """Values that the data holds of one token."""
        return torch.Size(self.data_shape).numel() // self.tokens

    def leaf_shape(self, leaf: Node) -> tuple[int, ...]:
        """Of the real numbers in `leaf`: a complex one holds two."""
        shape = self.sizes.shape(leaf.meta["val"])
        return (*shape, 2) if operations.is_complex_tensor(leaf) else shape

    def random_leaves(self, generator: torch.Generator) -> dict[Node, torch.Tensor]:
        """Values in [0.5, 1.5) for every leaf: no zero, no symmetry, and within a leaf no two close to each other."""
        return {leaf: _apart(self.leaf_shape(leaf), generator) for leaf in self.leaves}

    def run(
        self,
        data: torch.Tensor,
        leaves: Mapping[Node, torch.Tensor],
        arithmetic: Arithmetic = Arithmetic.FLOAT64,
        at: Callable[[Node], None] | None = None,
    ) -> torch.Tensor:
        """The branch's result for `data`, given as [tokens, columns] or in its own shape. `at` is told of each step."""
        given = {n: torch.view_as_complex(v) if operations.is_complex_tensor(n) else v for n, v in leaves.items()}
        inputs = {**given, self.branch.data: data.reshape(self.data_shape)}
        return evaluate([self.branch.out], inputs, self.sizes, arithmetic, at)[0]


def _apart(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    count = torch.Size(shape).numel()
    jitter = torch.rand(count, generator=generator, dtype=torch.float64) / 2
    return ((torch.randperm(count, generator=generator) + jitter) / count + 0.5).reshape(shape)


class Frontier(enum.Enum):
    """How the tensors that feed a branch are taken; tried in this order."""

    ROOTS = "roots"
    """Views, negations, widenings and ``1 + weight`` outside the branch are looked through."""
    NEGATED_PARTS = "negated parts"
    """Concatenations too in which a part is negated: ``cat([-sin, sin])`` is made of sin."""
    PARTS = "parts"
    """All concatenations."""
    AS_IS = "as is"
    """Nothing is looked through."""


def find_leaves(branch: Branch) -> dict[Frontier, tuple[Node, ...]]:
    """The float (or complex) tensors that feed `branch` from outside, in order of use, for each way of taking them.

    Looking through views makes the cosine that q sees unsqueezed one way and k another one leaf. Constants that the
    graph computes from literals alone are no leaves.

    Raises:
        Decline: ``norm.eps_is_input`` for a scalar leaf, ``proof.not_analytic`` for an index or a mask that depends on
            a graph input.
    """
    floats: list[Node] = []
    for node in branch.frontier:
        if operations.is_symbolic(node) or operations.is_literal(node):
            continue
        if not (operations.is_float_tensor(node) or operations.is_complex_tensor(node)):
            found = f"{node} selects values on the data path and depends on a graph input"
            raise Decline("proof.not_analytic", found, [node])
        if node.meta["val"].dim() == 0:
            raise Decline("norm.eps_is_input", _scalar_input(node), [node, *_users(branch, node)])
        floats.append(node)
    return {
        frontier: tuple(dict.fromkeys(origin for node in floats for origin in _origins(node, frontier)))
        for frontier in Frontier
    }


def _users(branch: Branch, node: Node) -> list[Node]:
    return [user for user in branch.nodes if node in user.all_input_nodes]


def _scalar_input(node: Node) -> str:
    source = next((p for p in (node, *node.all_input_nodes) if p.op == "placeholder"), node)
    return (
        f"the scalar {node} comes from the graph input {source}, whose value must not be read; expected a literal. "
        "Under dynamic=True every Python float becomes an input: compile with dynamic=None, and name the sizes that "
        "vary with torch._dynamo.mark_dynamic; a buffer has to become a Python float"
    )


def _origins(node: Node, frontier: Frontier) -> list[Node]:
    if frontier is Frontier.AS_IS:
        return [node]
    root = strip(node, keep_order=True)
    if root.target is operations.aten.complex.default:
        return [strip(part, keep_order=True) for part in root.all_input_nodes]
    if _is_one_plus(root):
        return [strip(root.args[0], keep_order=True)]  # type: ignore[arg-type]
    if _is_split(root, frontier):
        return [strip(part, keep_order=True) for part in root.all_input_nodes]
    return [root]


def _is_split(node: Node, frontier: Frontier) -> bool:
    if frontier is Frontier.ROOTS or node.target not in (operations.aten.cat.default, operations.aten.stack.default):
        return False
    return frontier is Frontier.PARTS or any(_is_negated(part) for part in node.all_input_nodes)


def _is_negated(node: Node) -> bool:
    return strip_views(node).target is operations.aten.neg.default


def _is_one_plus(node: Node) -> bool:
    if node.target not in (operations.aten.add.Tensor, operations.aten.add.Scalar) or node.kwargs:
        return False
    return isinstance(node.args[1], (int, float)) and node.args[1] == 1


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN or infinity anywhere counts as infinite."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")

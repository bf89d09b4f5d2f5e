"""RMSNorm: does one head's result depend on that head alone, is it invariant to scale, with which eps and weight?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads, expected_columns
from fx_fusion.proof.region_function import TOLERANCE, Probe, relative_difference

#: Far above any eps (its share of the mean square is below 1e-16), and far below: the norm is linear there.
LARGE = 1e6
TINY = 1e-12


@dataclass(frozen=True)
class Norm:
    """``x * rsqrt(mean(x²) + eps) * weight``, or ``* (1 + weight)`` with `gemma`; no norm at all if `eps` is None."""

    eps: float | None
    weight: Node | None
    gemma: bool


Leaves = Mapping[Node, torch.Tensor]


def is_normalised(probe: Probe, leaves: Leaves, generator: torch.Generator) -> bool:
    """True if doubling large data changes nothing, False if it doubles the result."""
    data = LARGE * torch.randn(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
    once, twice = probe.run(data, leaves), probe.run(2 * data, leaves)
    if relative_difference(twice, once) < TOLERANCE:
        return True
    if relative_difference(twice, 2 * once) < TOLERANCE:
        return False
    found = "doubling large input neither leaves the result alone (a norm) nor doubles it (no norm)"
    raise Decline("norm.not_rms", found, _norm_nodes(probe))


def read_owners(
    probe: Probe, heads: Heads, leaves: Leaves, normalised: bool, generator: torch.Generator
) -> torch.Tensor:
    """For each element of the flattened result, ``token * num_heads + head`` of the head that it depends on.

    Each head gets a magnitude of its own, far below eps, where the norm is linear: the ratio to a run with equal
    magnitudes names the head, whatever the rotation does to its lanes.
    """
    blocks = probe.tokens * heads.num_heads
    magnitude = torch.logspace(0, 1, blocks, dtype=torch.float64)[torch.randperm(blocks, generator=generator)]
    lanes = torch.rand(heads.head_dim, generator=generator, dtype=torch.float64) + 0.5
    rest = torch.rand(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
    equal = place_heads(rest, heads, lanes.expand(probe.tokens, heads.num_heads, -1))
    scaled = place_heads(rest, heads, magnitude.reshape(probe.tokens, heads.num_heads, 1) * lanes)
    ratio = (probe.run(TINY * scaled, leaves) / probe.run(TINY * equal, leaves)).reshape(-1)
    ranked = ratio.sort()
    if ratio.numel() != blocks * heads.head_dim:
        found = f"{ratio.numel()} values result from {blocks} heads of {heads.head_dim} lanes"
        raise Decline("split.heads", found, _norm_nodes(probe))
    measured = ranked.values.reshape(blocks, heads.head_dim)
    expected = magnitude.sort()
    if not bool(((measured - expected.values[:, None]).abs() < 1e-7 * expected.values[:, None]).all()):
        raise _not_linear_near_zero(probe, leaves, TINY * equal, normalised)
    owners = torch.empty(ratio.numel(), dtype=torch.long)
    owners[ranked.indices] = expected.indices.repeat_interleave(heads.head_dim)
    return owners


def _norm_nodes(probe: Probe) -> list[Node]:
    """What to point at: the root, and the branch's result."""
    nodes, out = probe.branch.nodes, probe.branch.out
    root = next((node for node in nodes if node.target in operations.ROOTS and node.args[1:] != (2,)), out)
    return [root, out]


def _not_linear_near_zero(probe: Probe, leaves: Leaves, data: torch.Tensor, normalised: bool) -> Decline:
    """Why the results for `data`, all of it tiny, do not follow the heads."""
    out = _norm_nodes(probe)
    nothing = probe.run(torch.zeros_like(data), leaves)
    if not bool((nothing == 0).all()):
        what = "no number" if bool(nothing.isnan().any()) else f"up to {float(nothing.abs().max()):.3g}"
        if normalised and bool(nothing.isnan().any()):
            return Decline("norm.eps", "for zero input the result is no number: expected a positive eps", out)
        return Decline("norm.offset", f"for zero input the result is {what}, expected 0: something is added to it", out)
    once, twice = probe.run(data, leaves), probe.run(2 * data, leaves)
    ratio = float((twice / once).nanmedian())
    if abs(ratio - 2) < TOLERANCE:
        return Decline("norm.not_per_head", "near zero a result grows with other heads than its own", out)
    found = f"near zero, doubling the input multiplies the result by {ratio:.9g}, expected 2"
    if normalised and abs(ratio - 1) < TOLERANCE:
        return Decline("norm.eps", f"{found}: nothing positive is added under the root", out)
    if normalised and abs(ratio - 2) < 1e-2:
        return Decline("norm.eps", f"{found}: eps is not added under the root", out)
    return Decline("norm.not_rms", found, out)


def check_per_head(probe: Probe, heads: Heads, leaves: Leaves, generator: torch.Generator) -> None:
    """Poison one element of each token's first head: no more than one head's results may feel it."""
    data = torch.randn(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
    data[:, heads.offset] = math.nan
    reached = int(probe.run(data, leaves).isnan().sum()) // probe.tokens
    if reached > heads.head_dim:
        found = f"one column reaches {reached} results, head_dim is {heads.head_dim}: the norm spans more than one head"
        raise Decline("norm.not_per_head", found, _norm_nodes(probe))


def place_heads(rest: torch.Tensor, heads: Heads, values: torch.Tensor) -> torch.Tensor:
    """A copy of `rest` [tokens, columns] with `values` [tokens, num_heads, head_dim] in the columns of `heads`."""
    placed = rest.clone()
    placed[:, expected_columns(heads)] = values
    return placed


def read_weight(probe: Probe, heads: Heads, leaves: Leaves, generator: torch.Generator) -> tuple[Node | None, bool]:
    """The leaf that is the norm's weight, and whether it enters as ``1 + weight``.

    A weight is the one leaf, a head wide, whose value of 0 (or -1) makes everything vanish.
    """
    data = torch.randn(probe.tokens, probe.columns, generator=generator, dtype=torch.float64)
    found: list[tuple[Node, bool]] = []
    for leaf, value in leaves.items():
        if value.numel() != heads.head_dim or leaf.meta["val"].dim() != 1:
            continue
        for neutral, gemma in ((0.0, False), (-1.0, True)):
            if not probe.run(data, {**leaves, leaf: torch.full_like(value, neutral)}).any():
                found.append((leaf, gemma))
    if len(found) > 1:
        raise Decline(
            "norm.weight", f"{len(found)} operands scale the head like a weight; expected one", [n for n, _ in found]
        )
    return found[0] if found else (None, False)


def read_eps(probe: Probe, heads: Heads, leaves: Leaves, owners: torch.Tensor, generator: torch.Generator) -> float:
    """eps, from how much a small head shrinks: ``ratio² = ms / (ms + eps)`` with ms the mean square.

    Snapped to the literal of the graph that it equals; measured at two magnitudes that must agree.
    """
    literals = _literals(probe)
    rest = torch.zeros(probe.tokens, probe.columns, dtype=torch.float64)
    lanes = torch.rand(probe.tokens, heads.num_heads, heads.head_dim, generator=generator, dtype=torch.float64) + 0.5
    large = probe.run(place_heads(rest, heads, LARGE * lanes), leaves).reshape(-1)
    at = int(large.abs().argmax())
    mean_square = lanes.square().mean(-1).reshape(-1)[owners[at]]
    measured: list[float] = []
    for magnitude in (1e-3, 1e-4):
        small = probe.run(place_heads(rest, heads, magnitude * lanes), leaves).reshape(-1)
        shrink = (small[at] / large[at]).square()
        measured.append(float(magnitude**2 * mean_square * (1 / shrink - 1)))
    for literal in literals:
        if all(abs(value - literal) < 1e-6 * literal for value in measured):
            return literal
    found = f"the constant under the root measures {measured[0]:.3e} on one input and {measured[1]:.3e} on another"
    raise Decline("norm.eps", f"{found}; expected one number of {literals}", _norm_nodes(probe))


def _literals(probe: Probe) -> list[float]:
    """The positive numbers written in the branch."""
    found: dict[float, None] = {}
    for node in probe.branch.nodes:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, float) and value > 0:
                found[value] = None
    return list(found)

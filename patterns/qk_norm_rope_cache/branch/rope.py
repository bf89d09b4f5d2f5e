"""Rotary embedding: which lanes couple, is that a rotation, and from where does each lane take its angle?

1-D rope and 3-D mRoPE are one thing here: each lane has a partner, and each pair of lanes an axis of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.patterns.qk_norm_rope_cache.branch.rms_norm import LARGE, place_heads
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.proof.region_function import TOLERANCE, Probe


@dataclass(frozen=True)
class Lanes:
    """Lane or pair i of the rotation takes element ``offset + i * step`` of a row that is `width` elements long."""

    leaf: Node
    width: int
    offset: int
    step: int
    count: int
    per_batch: bool
    """False if the row of (b, s) is row s of the leaf; True if it is row b * seq + s."""

    def __str__(self) -> str:
        columns = f"{self.offset}:{self.offset + self.step * self.count}:{self.step}"
        return f"columns {columns} of {self.leaf} [{'tokens' if self.per_batch else 'positions'}, {self.width}]"

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., count] from rows [..., width]"""
        return rows[..., self.offset : self.offset + self.step * self.count : self.step]


@dataclass(frozen=True)
class Rope:
    """The rotation of a head: lanes 0..rotary_dim, in pairs half a rotary_dim apart (neox) or adjacent (GPT-J)."""

    rotary_dim: int
    is_neox: bool
    cos: Lanes
    sin: Lanes


@dataclass(frozen=True)
class Couplings:
    """``out[lane] = own[t, lane] * x[lane] + other[t, lane] * x[partner[lane]]``; partner -1 where there is none."""

    partner: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor


def read_couplings(
    probe: Probe, heads: Heads, leaves: Mapping[Node, torch.Tensor], owners: torch.Tensor, normalised: bool
) -> Couplings:
    """Feed indicator vectors: lane l gets 1 if bit k of l is set. What comes back spells each lane's partner in binary.

    At most two lanes may enter a result; `other` then separates from `own` at any bit where the two lanes differ.
    """
    width = heads.head_dim
    lane = torch.arange(width)
    order = owners.argsort(stable=True)

    def respond(members: torch.Tensor) -> torch.Tensor:
        rest = torch.zeros(probe.tokens, probe.columns, dtype=torch.float64)
        data = place_heads(rest, heads, LARGE * members.double().expand(probe.tokens, heads.num_heads, -1))
        scale = math.sqrt(width / int(members.sum())) if normalised else LARGE
        return probe.run(data, leaves).reshape(-1)[order].reshape(probe.tokens, heads.num_heads, width) / scale

    everything = respond(torch.ones(width, dtype=torch.bool))
    if not bool((everything - everything[:, :1]).abs().max() < TOLERANCE * everything.abs().max()):
        raise _heads_differ(probe, heads)
    total = everything[:, 0]
    partner = torch.zeros(width, dtype=torch.long)
    own = torch.full_like(total, math.nan)
    small = 1e-7 * total.abs().max()
    bits = range(max(1, (width - 1).bit_length()))
    for bit in bits:
        members = (lane >> bit & 1).bool()
        if not members.any():
            continue
        part = respond(members)[:, 0]
        nothing, all_of_it = (part.abs() < small).all(0), ((part - total).abs() < small).all(0)
        same = torch.where(members, all_of_it, nothing)
        partner |= torch.where(same, members, ~members).long() << bit
        own = torch.where(same, own, torch.where(members, part, total - part))
    alone = partner == lane
    own = torch.where(alone, total, own)
    partner = torch.where(alone, -1, partner)
    if not bool(own.isfinite().all()) or bool((partner >= width).any()):
        raise Decline(
            "rope.not_a_rotation", "a lane takes from more than one other lane of its head", [probe.branch.out]
        )
    return Couplings(partner, own, total - own)


def _heads_differ(probe: Probe, heads: Heads) -> Decline:
    shape = (heads.num_heads, heads.head_dim)
    weights = [leaf for leaf in probe.leaves if probe.leaf_shape(leaf)[-2:] == shape]
    if weights:
        found = f"{weights[0]} holds {shape[0]} rows of {shape[1]}, one a head; expected one weight for all heads"
        return Decline("norm.weight", found, [weights[0], probe.branch.out])
    return Decline("rope.rows", "heads of one token are rotated by different angles", [probe.branch.out])


def read_rope(
    probe: Probe, couplings: Couplings, leaves: Mapping[Node, torch.Tensor], weight: Node | None, grid: tuple[int, int]
) -> Rope:
    """The style of the rotation and the place of every cosine and sine, looked up among the leaves' values."""
    out = probe.branch.out
    rotary_dim = int((couplings.partner >= 0).sum())
    if rotary_dim == 0:
        found = f"between {probe.branch.data} and {out} no lane of a head is combined with another"
        raise Decline("rope.missing", found, [out])
    is_neox = _style(couplings.partner, rotary_dim, out)
    if not bool(((couplings.own[:, rotary_dim:] - 1).abs() < TOLERANCE).all()):
        raise Decline("rope.not_a_rotation", f"the lanes after {rotary_dim} are scaled, expected a plain copy", [out])
    angles = {leaf: value for leaf, value in leaves.items() if leaf is not weight}
    first, second = _pairs(rotary_dim, is_neox)
    lanes = torch.cat([first, second])
    sign = torch.cat([-torch.ones(len(first)), torch.ones(len(second))]).double()
    cos = _look_up(couplings.own[:, lanes], angles, out, "cosine")
    sin = _look_up(couplings.other[:, lanes] * sign, angles, out, "sine")
    return Rope(rotary_dim, is_neox, _as_lanes(cos, lanes, grid), _as_lanes(sin, lanes, grid))


def _style(partner: torch.Tensor, rotary_dim: int, out: Node) -> bool:
    lane = torch.arange(rotary_dim)
    half = rotary_dim // 2
    if rotary_dim % 2 == 0 and bool((partner[:rotary_dim] == (lane + half) % rotary_dim).all()):
        return True
    if rotary_dim % 2 == 0 and bool((partner[:rotary_dim] == lane ^ 1).all()):
        return False
    found = (
        f"{rotary_dim} lanes are combined, lane 0 with lane {int(partner[0])}; "
        f"expected partners {half} apart or adjacent, from lane 0 on"
    )
    raise Decline("rope.not_a_rotation", found, [out])


def _pairs(rotary_dim: int, is_neox: bool) -> tuple[torch.Tensor, torch.Tensor]:
    lane = torch.arange(rotary_dim)
    half = rotary_dim // 2
    return (lane[:half], lane[half:]) if is_neox else (lane[0::2], lane[1::2])


@dataclass(frozen=True)
class _Place:
    """Where values were found: element numbers [tokens, lanes] of a leaf that has `total` elements."""

    leaf: Node
    number: torch.Tensor
    total: int


def _look_up(values: torch.Tensor, angles: Mapping[Node, torch.Tensor], out: Node, what: str) -> _Place:
    """The leaf that holds all of `values` [tokens, lanes]."""
    flat = values.reshape(-1).contiguous()
    for leaf, candidates in angles.items():
        ranked = candidates.reshape(-1).sort()
        nearest = _nearest(ranked.values, flat)
        if bool(_close(ranked.values[nearest], flat).all()):
            return _Place(leaf, ranked.indices[nearest].reshape(values.shape), candidates.numel())
    raise Decline("rope.not_a_rotation", _not_found(flat, angles, what), [out])


def _nearest(ranked: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(ranked, values - TOLERANCE).clamp(max=ranked.numel() - 1)


def _close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() < 2 * TOLERANCE


def _not_found(values: torch.Tensor, angles: Mapping[Node, torch.Tensor], what: str) -> str:
    if not angles:
        return f"the {what} of a lane measures {float(values[0]):.6g}; expected an operand to hold it, there is none"
    leaves = " or ".join(str(leaf) for leaf in angles)
    known = torch.cat([candidates.reshape(-1) for candidates in angles.values()]).sort().values
    odd = values[~_close(known[_nearest(known, values)], values)][:1]
    if not len(odd):
        return f"the {what}s of a head are spread over {leaves}; expected one of them to hold all"
    factor = _common_factor(values, known)
    if factor is not None:
        found = (
            f"the {what}s of a head measure {factor:.6g} times elements of {leaves}; expected the elements themselves"
        )
        return f"{found}: the head is scaled before or while it is rotated, where a kernel does not"
    found = f"the {what} of a lane measures {float(odd):.6g}; expected an element of {leaves}"
    return f"{found}, which has its negative" if bool(_close(known[_nearest(known, -odd)], -odd)) else found


def _common_factor(values: torch.Tensor, known: torch.Tensor) -> float | None:
    """The positive number by which `values` differ from elements of `known`, all of them alike."""
    for factor in (values[0] / known[:1024]).tolist():
        unscaled = values / factor if factor > 0 else values
        if factor > 0 and bool(_close(known[_nearest(known, unscaled)], unscaled).all()):
            return factor
    return None


def _as_lanes(place: _Place, lanes: torch.Tensor, grid: tuple[int, int]) -> Lanes:
    """Element numbers as rows and columns: one row a token (or a sequence position), the same columns in each."""
    batch, seq = grid
    number = place.number.reshape(batch, seq, len(lanes))
    for per_batch in (False, True) if batch > 1 else (True,):
        rows = batch * seq if per_batch else seq
        if place.total % rows:
            continue
        width = place.total // rows
        row = torch.arange(rows).reshape(-1, seq, 1)
        column = number - row * width
        if bool((column == column[0, 0]).all()):
            return _columns(place.leaf, width, column[0, 0], lanes, per_batch)
    raise Decline("rope.rows", f"{place.leaf} does not hold one row of angles per token", [place.leaf])


def constant_step(numbers: torch.Tensor) -> int | None:
    """The positive distance between neighbours in `numbers` [count], or None if it varies."""
    step = int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    even = bool((numbers == numbers[0] + step * torch.arange(len(numbers))).all())
    return step if even and step > 0 else None


def _columns(leaf: Node, width: int, column: torch.Tensor, lanes: torch.Tensor, per_batch: bool) -> Lanes:
    half = len(lanes) // 2
    first, second = column[:half], column[half:]
    if bool((first == second).all()):
        ordered, count = first, half
    else:
        ordered, count = torch.empty_like(column), len(lanes)
        ordered[lanes] = column
    step = constant_step(ordered)
    if step is None:
        raise Decline("rope.rows", f"the lanes' angles are not at a constant distance within a row of {leaf}", [leaf])
    return Lanes(leaf, width, int(ordered[0]), step, count, per_batch)

"""One branch read and proved: heads of a projection, normalised and rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fx_fusion.decline import Decline, reaching
from fx_fusion.graph.paths import Branch
from fx_fusion.graph.sizes import Sizes
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.patterns.qk_norm_rope_cache.branch.rms_norm import (
    Norm,
    check_per_head,
    is_normalised,
    read_eps,
    read_owners,
    read_weight,
)
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Lanes, Rope, read_couplings, read_rope
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import (
    Heads,
    expected_columns,
    read_columns,
    read_heads,
    take_heads,
)
from fx_fusion.proof.all_sizes import check_all_sizes
from fx_fusion.proof.certificate import certify
from fx_fusion.proof.evidence import Evidence, Sampled, weakest
from fx_fusion.proof.prove import prove
from fx_fusion.proof.reference import Reference
from fx_fusion.proof.region_function import Frontier, Probe, find_leaves
from fx_fusion.proof.samples import check_analytic
from fx_fusion.proof.token_reduction import fewer_tokens


@dataclass(frozen=True)
class RotatedHeads:
    """What a branch computes, and how its result is laid out.

    ``token_dims`` are the dimensions of the result that hold (batch, seq): () means one flat dimension of tokens.
    The result's elements, flattened, run over (batch, seq, head, lane), or over (batch, head, seq, lane) if
    ``heads_first``.
    """

    heads: Heads
    norm: Norm
    rope: Rope
    token_dims: tuple[int, ...]
    heads_first: bool
    evidence: Evidence | None = None
    """What is known of it; None while it is only read."""

    def on(self, leaves: Mapping[Node, Node]) -> RotatedHeads:
        """The same reading for an equal branch with other leaves; as it is if there are none."""
        if not leaves:
            return self
        weight = self.norm.weight
        cos, sin = self.rope.cos, self.rope.sin
        evidence = self.evidence
        if isinstance(evidence, Sampled):
            evidence = replace(evidence, nodes=tuple(leaves.get(node, node) for node in evidence.nodes))
        return replace(
            self,
            norm=replace(self.norm, weight=weight and leaves[weight]),
            rope=replace(self.rope, cos=replace(cos, leaf=leaves[cos.leaf]), sin=replace(sin, leaf=leaves[sin.leaf])),
            evidence=evidence,
        )

    def grid(self, out_shape: Sequence[int], tokens: int) -> tuple[int, int]:
        """(batch, seq) of a result of this shape."""
        return _grid(self.token_dims, out_shape, tokens)

    def arrange(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] in the order of the result's elements."""
        return heads.transpose(1, 2) if self.heads_first else heads


def read_rotated_heads(branch: Branch, sizes: Sequence[Sizes]) -> RotatedHeads:
    """Read at the first of `sizes`, prove at all of these; at fewer tokens where a few stand for all.

    That holds for every size: see :func:`fx_fusion.proof.all_sizes.check_all_sizes`.

    The frontier is taken in each way that :class:`Frontier` knows.

    Raises:
        Decline: of the attempt that got furthest.
    """
    with reaching("certificate"):
        certify(branch)
        _check_tokens(branch, sizes)
    short, originals = _at_fewer_tokens(branch, sizes[0])
    try:
        return _read_any(short, sizes).on(originals)
    except Decline as decline:
        reason = _explained(short, decline)
        nodes = [originals.get(node, node) for node in reason.nodes]
        raise Decline(reason.code, reason.found, nodes, decline.reached) from decline


def _explained(branch: Branch, decline: Decline) -> Decline:
    """Readers measure floats: where a root spells an absolute value, they may measure noise, and the root is the reason
    why nothing could be read.
    """
    if decline.code.startswith("proof."):
        return decline
    try:
        check_analytic(branch)
    except Decline as reason:
        return reason
    return decline


def _check_tokens(branch: Branch, sizes: Sequence[Sizes]) -> None:
    shapes = [each.shape(branch.data.meta["val"]) for each in sizes]
    empty = next((shape for shape in shapes if 0 in shape), None)
    if empty is not None:
        found = f"{branch.data} of shape {list(empty)} is empty: there is no token to compute"
        raise Decline("region.sizes", found, [branch.data])


def _at_fewer_tokens(branch: Branch, sizes: Sizes) -> tuple[Branch, dict[Node, Node]]:
    """`branch` with a few tokens, and what each of its nodes is a copy of; if it cannot be, itself and nothing."""
    leaves = find_leaves(branch)[Frontier.PARTS]
    tokens = branch.tokens(sizes)
    copies = fewer_tokens([branch.data, *leaves], [branch.out], branch.data, tokens)
    if not copies:
        return branch, {}
    data = copies[branch.data]
    columns = torch.Size(branch.data.meta["val"].shape).numel() // tokens
    projection = data.graph.placeholder("projection")
    projection.meta["val"] = data.meta["val"].reshape(-1, columns)
    nodes, frontier = ([copies[node] for node in part] for part in (branch.nodes, branch.frontier))
    short = Branch(projection, data, copies[branch.out], tuple(nodes), tuple(frontier))
    return short, {copy: node for node, copy in copies.items()}


def _read_any(branch: Branch, sizes: Sequence[Sizes]) -> RotatedHeads:
    furthest: Decline | None = None
    for leaves in dict.fromkeys(find_leaves(branch).values()):
        try:
            return _read(branch, leaves, sizes)
        except Decline as decline:
            furthest = decline if furthest is None or decline.stage > furthest.stage else furthest
    assert furthest is not None
    raise furthest


def _read(branch: Branch, leaves: tuple[Node, ...], sizes: Sequence[Sizes]) -> RotatedHeads:
    probe = Probe(branch, leaves, sizes[0])
    with reaching("sizes"):
        check_all_sizes([branch.data, *leaves], [branch.out])
    with reaching("split"):
        columns = read_columns(probe)
    first: Decline | None = None
    for head_dim in _head_dims(probe, len(columns)):
        try:
            with reaching("split"):
                heads = read_heads(columns, head_dim, probe.columns, branch.data)
            reading = _read_heads(probe, heads)
            break
        except Decline as decline:
            first = first or decline
    else:
        assert first is not None
        raise first
    with reaching("proof"):
        evidence = weakest([_prove(Probe(branch, leaves, each), reading) for each in sizes])
    return replace(reading, evidence=evidence)


def _head_dims(probe: Probe, columns: int) -> list[int]:
    """Widths a head may have: the result's last dimension where heads have a dimension of their own, or a weight's; the
    last two, where the halves or the pairs of a head have one.
    """
    shape = probe.sizes.shape(probe.branch.out.meta["val"])
    vectors = [probe.leaf_shape(leaf)[0] for leaf in probe.leaves if leaf.meta["val"].dim() == 1]
    candidates = [shape[-1], *vectors] if len(shape) > 2 or not vectors else [*vectors, shape[-1]]
    if len(shape) > 3:
        candidates.insert(0 if shape[-1] == 2 else len(candidates), shape[-2] * shape[-1])
    return [width for width in dict.fromkeys(candidates) if 1 < width <= columns] or [columns]


def _read_heads(probe: Probe, heads: Heads) -> RotatedHeads:
    generator = torch.Generator().manual_seed(0)
    leaves = probe.random_leaves(generator)
    with reaching("norm"):
        normalised = is_normalised(probe, leaves, generator)
        check_per_head(probe, heads, leaves, generator)
        owners = read_owners(probe, heads, leaves, normalised, generator)
        token_dims, heads_first = _read_layout(probe, heads, owners)
        eps = read_eps(probe, heads, leaves, owners, generator) if normalised else None
        weight, gemma = read_weight(probe, heads, leaves, generator)
    neutral = {**leaves, weight: torch.full_like(leaves[weight], 0.0 if gemma else 1.0)} if weight else leaves
    with reaching("rotation"):
        couplings = read_couplings(probe, heads, neutral, owners, normalised)
        grid = _grid(token_dims, probe.sizes.shape(probe.branch.out.meta["val"]), probe.tokens)
        rope = read_rope(probe, couplings, neutral, weight, grid)
    return RotatedHeads(heads, Norm(eps, weight, gemma), rope, token_dims, heads_first)


def _grid(token_dims: tuple[int, ...], out_shape: Sequence[int], tokens: int) -> tuple[int, int]:
    return (out_shape[token_dims[0]], out_shape[token_dims[1]]) if token_dims else (1, tokens)


def _read_layout(probe: Probe, heads: Heads, owners: torch.Tensor) -> tuple[tuple[int, ...], bool]:
    """Where tokens and heads lie in the result."""
    shape = probe.sizes.shape(probe.branch.out.meta["val"])
    tokens, num_heads, head_dim = probe.tokens, heads.num_heads, heads.head_dim
    if len(shape) == 5 and shape[3] * shape[4] == head_dim:  # halves or pairs have a dimension of their own
        shape = (*shape[:3], head_dim)
    numbers = torch.arange(tokens * num_heads)
    found = owners.reshape(-1, head_dim)
    if not bool((found == found[:, :1]).all()):
        raise Decline("split.layout", "the lanes of a head do not lie together in the result", [probe.branch.out])
    found = found[:, 0]
    for dims, heads_first in (((0, 2), True), ((0, 1), False), ((), False), ((), True)):
        if dims and (len(shape) != 4 or shape[1 if heads_first else 2] != num_heads or shape[3] != head_dim):
            continue
        batch = shape[dims[0]] if dims else 1
        grid = numbers.reshape(batch, tokens // batch, num_heads)
        if torch.equal((grid.transpose(1, 2) if heads_first else grid).reshape(-1), found):
            return dims, heads_first
    raise Decline(
        "split.layout", f"the result {list(shape)} does not hold tokens and heads in order", [probe.branch.out]
    )


def rows_of(lanes: Lanes, values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The rows [B or 1, S, count] of angles that `lanes` takes from its leaf's values."""
    batch = grid[0] if lanes.per_batch else 1
    if values.numel() != batch * grid[1] * lanes.width:
        raise Decline("region.sizes", f"the rows of {lanes.leaf} are as wide as a size that varies", [lanes.leaf])
    return lanes.take(values.reshape(batch, grid[1], lanes.width))


def _prove(probe: Probe, reading: RotatedHeads) -> Evidence:
    shape = probe.sizes.shape(probe.branch.out.meta["val"])
    batch, seq = reading.grid(shape, probe.tokens)
    norm, rope = reading.norm, reading.rope

    def expected(data: torch.Tensor, leaves: Mapping[Node, torch.Tensor]) -> torch.Tensor:
        x = take_heads(data, reading.heads).unflatten(0, (batch, seq))
        cos, sin = (rows_of(lanes, leaves[lanes.leaf], (batch, seq)) for lanes in (rope.cos, rope.sin))
        weight = leaves[norm.weight] if norm.weight else None
        y = reference.norm_rope(x, weight, norm.eps, norm.gemma, cos, sin, rope.rotary_dim, rope.is_neox)
        return reading.arrange(y).reshape(shape)

    claim = Reference(expected, expected_columns(reading.heads), norm.eps)
    return prove(probe, claim, torch.Generator().manual_seed(1))

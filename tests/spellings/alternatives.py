"""Alternatives for each step of :class:`spellings.model.Composed`, by axis and name; each overrides a method or two."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings.model import BLOCK, EPS, HIDDEN, POSITIONS, Composed, Shape


@dataclass(frozen=True)
class Alternative:
    """One wording of one step.

    Attributes:
        cls: what is mixed in.
        fits: the shapes and the choices on earlier axes that it makes sense with.
        declines: the codes with which a layer with this step may stay unfused; none: it must fuse.
    """

    cls: type
    fits: Callable[[Shape, dict[str, str]], bool]
    declines: frozenset[str]


AXES: dict[str, dict[str, Alternative]] = {}


def alternative(
    axis: str,
    *,
    fits: Callable[[Shape, dict[str, str]], bool] = lambda shape, chosen: True,
    declines: tuple[str, ...] = (),
) -> Callable[[type], type]:
    def add(cls: type) -> type:
        AXES.setdefault(axis, {})[cls.__name__] = Alternative(cls, fits, frozenset(declines))
        return cls

    return add


# --- weights: what a projection's output is made of -------------------------------------------------------------------


class _Linear:
    def add_linear(self: Any, name: str, width: int) -> None:
        self.add_module(name, nn.Linear(HIDDEN, width, bias=False))

    def linear(self: Any, x: Tensor, name: str) -> Tensor:
        return getattr(self, name)(x)


@alternative("weights")
class Plain(_Linear):
    pass


@alternative("weights")
class BiasInside(_Linear):
    def add_linear(self, name, width):
        self.add_module(name, nn.Linear(HIDDEN, width))


@alternative("weights")
class BiasOutside(_Linear):
    def add_linear(self, name, width):
        super().add_linear(name, width)
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(width)))

    def linear(self, x, name):
        return super().linear(x, name) + getattr(self, f"{name}_bias")


@alternative("weights")
class Int8(_Linear):
    """Weight-only quantisation: a scale a column, after the product."""

    def add_linear(self, name, width):
        self.register_buffer(f"{name}_int8", torch.randint(-127, 128, (width, HIDDEN), dtype=torch.int8))
        self.register_buffer(f"{name}_scale", torch.rand(width) / 64)

    def linear(self, x, name):
        return F.linear(x, getattr(self, f"{name}_int8").to(x.dtype)) * getattr(self, f"{name}_scale")


@alternative("weights")
class LoRA(_Linear):
    def add_linear(self, name, width):
        super().add_linear(name, width)
        self.add_module(f"{name}_down", nn.Linear(HIDDEN, 4, bias=False))
        self.add_module(f"{name}_up", nn.Linear(4, width, bias=False))

    def linear(self, x, name):
        return super().linear(x, name) + 0.5 * getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(x))


# --- split ------------------------------------------------------------------------------------------------------------


class _Packed:
    def add(self: Any) -> None:
        super().add()  # type: ignore[misc]
        self.add_linear("qkv", sum(self.sizes))

    def project(self: Any, x: Tensor) -> Any:
        return self.split(self.linear(x, "qkv"))


@alternative("split")
class Sizes(_Packed):
    def split(self, qkv):
        return [self.heads(part) for part in qkv.split(self.sizes, -1)]


@alternative("split")
class Slices(_Packed):
    def split(self, qkv):
        ends = [0, *itertools.accumulate(self.sizes)]
        return [self.heads(qkv[..., a:b]) for a, b in itertools.pairwise(ends)]


@alternative("split")
class TensorSplit(_Packed):
    def split(self, qkv):
        q, k, _ = itertools.accumulate(self.sizes)
        return [self.heads(part) for part in qkv.tensor_split((q, k), -1)]


@alternative("split")
class OverHeads(_Packed):
    def split(self, qkv):
        s = self.shape
        return self.heads(qkv).split([s.num_heads, s.num_kv_heads, s.num_kv_heads], -2)


@alternative("split")
class ValueKeyQuery(_Packed):
    def split(self, qkv):
        q, k, v = self.sizes
        return [self.heads(qkv.narrow(-1, a, n)) for a, n in ((v + k, q), (v, k), (0, v))]


@alternative("split")
class Contiguous(_Packed):
    def split(self, qkv):
        return [self.heads(part.contiguous()) for part in qkv.split(self.sizes, -1)]


@alternative("split")
class Grouped(_Packed):
    """Each key head lies behind its queries: with several queries a group, those are not evenly spaced, and copied."""

    def split(self, qkv):
        s = self.shape
        groups = qkv.view(*qkv.shape[:-1], s.num_kv_heads, -1, s.head_dim)
        return groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :]


@alternative("split")
class Strided(_Packed):
    def split(self, qkv):
        rows = qkv.reshape(-1, sum(self.sizes))
        starts = itertools.accumulate([0, *self.sizes[:2]])
        d = self.shape.head_dim
        parts = [
            rows.as_strided((len(rows), n // d, d), (rows.shape[1], d, 1), a)
            for a, n in zip(starts, self.sizes, strict=True)
        ]
        return [part.unflatten(0, qkv.shape[:-1]) for part in parts]


@alternative("split")
class ThreeProjections:
    def add(self):
        super().add()
        for name, width in zip("qkv", self.sizes, strict=True):
            self.add_linear(f"{name}_proj", width)

    def project(self, x):
        return [self.heads(self.linear(x, f"{name}_proj")) for name in "qkv"]


@alternative("split")
class QueryApart:
    def add(self):
        super().add()
        self.add_linear("q_proj", self.sizes[0])
        self.add_linear("kv_proj", 2 * self.sizes[1])

    def project(self, x):
        return self.heads(self.linear(x, "q_proj")), *map(self.heads, self.linear(x, "kv_proj").chunk(2, -1))


@alternative("split")
class Gated:
    """Qwen3-Next: behind each query head lies its gate."""

    def add(self):
        super().add()
        self.add_linear("q_proj", 2 * self.sizes[0])
        self.add_linear("k_proj", self.sizes[1])
        self.add_linear("v_proj", self.sizes[2])

    def project(self, x):
        q = self.linear(x, "q_proj")
        q, self.gate = q.view(*q.shape[:-1], -1, 2 * self.shape.head_dim).chunk(2, -1)
        return q, self.heads(self.linear(x, "k_proj")), self.heads(self.linear(x, "v_proj"))

    def attended(self, heads):
        return super().attended(heads * torch.sigmoid(self.gate))


# --- arrangement of heads ---------------------------------------------------------------------------------------------


@alternative("arrange")
class TokensFirst:
    pass


@alternative("arrange")
class HeadsFirst:
    """Transposed before the norm."""

    @property
    def heads_dim(self):
        return -3

    def arrange(self, heads):
        return heads.transpose(-3, -2)

    tokens_first = arrange


# --- norm -------------------------------------------------------------------------------------------------------------


@alternative("norm")
class WeightAfterCast:
    def norm(self, x, weight):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return y.to(x.dtype) * weight


@alternative("norm")
class WeightBeforeCast:
    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


@alternative("norm")
class Functional:
    def norm(self, x, weight):
        return F.rms_norm(x, (self.shape.head_dim,), weight, EPS)


@alternative("norm")
class RootAndDivision:
    def norm(self, x, weight):
        y = x.float()
        return (y / torch.sqrt((y * y).sum(-1, keepdim=True) / self.shape.head_dim + EPS) * weight).to(x.dtype)


@alternative("norm")
class PowerMinusHalf:
    def norm(self, x, weight):
        y = x.float()
        return (weight * (y * (torch.mean(y * y, -1, keepdim=True) + EPS).pow(-0.5))).to(x.dtype)


@alternative("norm")
class FunctionalInFloat32:
    def norm(self, x, weight):
        return F.rms_norm(x.float(), (self.shape.head_dim,), weight.float(), EPS).to(x.dtype)


@alternative("norm")
class Einsum:
    def norm(self, x, weight):
        y = x.float()
        squares = torch.einsum("...d,...d->...", y, y).unsqueeze(-1)
        return (y * torch.rsqrt(squares / self.shape.head_dim + EPS)).to(x.dtype) * weight


@alternative("norm")
class InverseRoot:
    def norm(self, x, weight):
        y = x.float()
        return weight * (y * (1.0 / torch.sqrt(torch.mean(y**2, -1, keepdim=True) + EPS))).to(x.dtype)


@alternative("norm")
class ScaledBeforeTheSquare:
    def norm(self, x, weight):
        y = x.float()
        squares = (y * self.shape.head_dim**-0.5).square().sum(-1, keepdim=True)
        return (y * torch.rsqrt(squares + EPS) * weight.float()).to(x.dtype)


@alternative("norm")
class Gemma:
    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).to(x.dtype)


@alternative("norm")
class OnFlatHeads:
    def norm(self, x, weight):
        flat = x.reshape(-1, self.shape.head_dim).float()
        flat = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + EPS)
        return (flat * weight.float()).to(x.dtype).view(x.shape)


@alternative("norm")
class NoNorm:
    def norm(self, x, weight):
        return x


@alternative("norm")
class Weightless:
    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@alternative("norm")
class QueryOnly(WeightBeforeCast):
    def norm(self, x, weight):
        return super().norm(x, weight) if weight is self.q_weight else x


# --- table: where cosine and sine come from ---------------------------------------------------------------------------


class _Lookup:
    """cos and sin are looked up, then the axes are mixed."""

    def angles(self: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (self.mix(rows) for rows in self.look_up(self.axes(positions)))
        return self.over_heads(cos), self.over_heads(sin)


@alternative("table")
class Indexed(_Lookup):
    def look_up(self, positions):
        return self.cos_sin_cache[positions].chunk(2, -1)


@alternative("table")
class IndexSelected(_Lookup):
    def look_up(self, positions):
        rows = self.cos_sin_cache.index_select(0, positions.flatten()).view(*positions.shape, -1)
        half = self.shape.head_dim // 2
        return rows[..., :half], rows[..., half:]


@alternative("table")
class Embedded(_Lookup):
    def look_up(self, positions):
        return F.embedding(positions, self.cos_sin_cache).split(self.shape.head_dim // 2, -1)


@alternative("table")
class Gathered(_Lookup):
    def look_up(self, positions):
        index = positions.flatten().unsqueeze(-1).expand(-1, self.shape.head_dim)
        return self.cos_sin_cache.gather(0, index).unflatten(0, positions.shape).chunk(2, -1)


@alternative("table")
class TwoTables(_Lookup):
    def add(self):
        super().add()
        cos, sin = self.cos_sin_cache.chunk(2, -1)
        self.register_buffer("cos_cached", cos.clone())
        self.register_buffer("sin_cached", sin.clone())

    def look_up(self, positions):
        return self.cos_cached[positions], self.sin_cached[positions]


@alternative("table")
class Float32Table(_Lookup):
    """Kept in float32: the rotation promotes to it."""

    def finish(self):
        super().finish()
        self.cos_sin_cache = self.cos_sin_cache.float()

    def look_up(self, positions):
        return self.cos_sin_cache[positions].chunk(2, -1)


@alternative("table")
class Float32TableCast(Float32Table):
    """Rows are rounded to the model's dtype."""

    def look_up(self, positions):
        return tuple(rows.to(self.shape.dtype) for rows in super().look_up(positions))


@alternative("table")
class ComplexTable(_Lookup):
    """Llama's own: the table is complex."""

    def finish(self):
        super().finish()
        angles = torch.outer(torch.arange(POSITIONS).float(), 100.0 ** (-torch.arange(0, 1, 2 / self.shape.head_dim)))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def look_up(self, positions):
        return self.turns[positions], self.turns[positions]


@alternative("table")
class ComplexRowsComputed(_Lookup):
    """No table: the turns of the positions, by polar coordinates."""

    def look_up(self, positions):
        pairs = torch.arange(0, 1, 2 / self.shape.head_dim)
        angles = positions.float().unsqueeze(-1) * 100.0**-pairs
        turns = torch.polar(torch.ones_like(angles), angles)
        return turns, turns


@alternative("table")
class Float64Angles(_Lookup):
    """In float64, and rounded once."""

    def look_up(self, positions):
        pairs = torch.arange(0, 1, 2 / self.shape.head_dim, dtype=torch.float64)
        angles = positions.double().unsqueeze(-1) * 100.0**-pairs
        return angles.cos().to(self.shape.dtype), angles.sin().to(self.shape.dtype)


@alternative("table")
class Computed:
    """No table: frequencies, their axes mixed, then cosine and sine."""

    def finish(self):
        super().finish()
        self.register_buffer("inv_freq", 100.0 ** (-torch.arange(0, 1, 2 / self.shape.head_dim)))

    def angles(self, positions):
        mixed = self.mix(self.axes(positions).float().unsqueeze(-1) * self.inv_freq)
        return tuple(self.over_heads(rows.to(self.shape.dtype)) for rows in (mixed.cos(), mixed.sin()))


# --- mixing: which axis of positions each pair takes ------------------------------------------------------------------


class _ThreeAxes:
    def axes(self, positions: Tensor) -> Tensor:
        return positions

    @property
    def axis_of_pair(self: Any) -> list[int]:
        """Interleaved: T H W T H W … T T"""
        _, height, width = self.shape.section
        pairs = range(self.shape.head_dim // 2)
        return [1 if i % 3 == 1 and i < 3 * height else 2 if i % 3 == 2 and i < 3 * width else 0 for i in pairs]


@alternative("mixing")
class OneAxis:
    def axes(self, positions):
        return positions[0]

    def mix(self, rows):
        return rows


@alternative("mixing")
class Sectioned(_ThreeAxes):
    def mix(self, rows):
        return torch.cat([part[axis] for axis, part in enumerate(rows.split(list(self.shape.section), -1))], -1)


@alternative("mixing")
class StridedAssignment(_ThreeAxes):
    def mix(self, rows):
        mixed = rows[0].clone()
        for axis in (1, 2):
            lanes = slice(axis, self.shape.section[axis] * 3, 3)
            mixed[..., lanes] = rows[axis, ..., lanes]
        return mixed


@alternative("mixing")
class WhereOnIota(_ThreeAxes):
    def mix(self, rows):
        lane = torch.arange(self.shape.head_dim // 2)
        _, height, width = self.shape.section
        by_height, by_width = (lane % 3 == 1) & (lane < 3 * height), (lane % 3 == 2) & (lane < 3 * width)
        return torch.where(by_height, rows[1], torch.where(by_width, rows[2], rows[0]))


@alternative("mixing")
class WhereOnBuffers(_ThreeAxes):
    """Masks are graph inputs: their values must not be read."""

    def add(self):
        super().add()
        axis = torch.tensor(self.axis_of_pair)
        self.register_buffer("by_height", axis == 1)
        self.register_buffer("by_width", axis == 2)

    def mix(self, rows):
        return torch.where(self.by_width, rows[2], torch.where(self.by_height, rows[1], rows[0]))


@alternative("mixing")
class GatherOfBuffer(_ThreeAxes):
    def add(self):
        super().add()
        self.register_buffer("axis", torch.tensor(self.axis_of_pair))

    def mix(self, rows):
        return rows.gather(0, self.axis.expand(1, *rows.shape[1:]))[0]


@alternative("mixing")
class AdvancedIndexing(_ThreeAxes):
    """Axis and lane of each pair as literals."""

    def mix(self, rows):
        return rows.movedim(-1, 1)[self.axis_of_pair, range(self.shape.head_dim // 2)].movedim(0, -1)


@alternative("mixing")
class AdvancedIndexingOfBuffer(GatherOfBuffer):
    def mix(self, rows):
        return rows.movedim(-1, 1)[self.axis, torch.arange(self.shape.head_dim // 2)].movedim(0, -1)


@alternative("mixing", fits=lambda shape, _: shape.head_dim <= 16)
class Stacked(_ThreeAxes):
    def mix(self, rows):
        return torch.stack([rows[axis, ..., pair] for pair, axis in enumerate(self.axis_of_pair)], -1)


@alternative("mixing")
class Weighted(_ThreeAxes):
    """A one-hot mixture: the rows are computed, not looked up."""

    def add(self):
        super().add()
        self.register_buffer("share", F.one_hot(torch.tensor(self.axis_of_pair), 3).T.float())

    def mix(self, rows):
        return (rows * self.share.to(rows.dtype).view(3, *[1] * (rows.dim() - 2), -1)).sum(0)


# --- rotation ---------------------------------------------------------------------------------------------------------

COMPLEX_TABLES = ("ComplexTable", "ComplexRowsComputed")
rotation = alternative("rope", fits=lambda _, chosen: chosen["table"] not in COMPLEX_TABLES)


@rotation
class Chunks:
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@rotation
class RotateHalf:
    def rotate(self, x, cos, sin):
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


@rotation
class RepeatedAngles:
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        repeats = [1] * (cos.dim() - 1) + [2]
        return x * cos.repeat(repeats) + torch.cat([-b, a], -1) * sin.repeat(repeats)


@rotation
class Roll:
    def rotate(self, x, cos, sin):
        return x * torch.cat([cos, cos], -1) + x.roll(x.shape[-1] // 2, -1) * torch.cat([-sin, sin], -1)


@rotation
class Flip:
    def rotate(self, x, cos, sin):
        halves = x.unflatten(-1, (2, -1))
        turned = halves.flip(-2) * torch.stack([-sin, sin], -2)
        return (halves * cos.unsqueeze(-2) + turned).flatten(-2)


@rotation
class Addcmul:
    def rotate(self, x, cos, sin):
        a, b = x.to(cos.dtype).chunk(2, -1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1)


@rotation
class AddcmulInPlace:
    """ComfyUI's text encoders"""

    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        y = x * torch.cat([cos, cos], -1)
        y[..., :half].addcmul_(x[..., half:].to(y.dtype), sin, value=-1)
        y[..., half:].addcmul_(x[..., :half].to(y.dtype), sin)
        return y


@rotation
class UnboundHalves:
    """Qwen's own first code"""

    def rotate(self, x, cos, sin):
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


@rotation
class StackedHalves:
    def rotate(self, x, cos, sin):
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        turned = torch.stack([-b, a], -2).reshape(x.shape)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)


@rotation
class RollWhere:
    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        turned = x.roll(half, -1)
        turned = torch.where(torch.arange(x.shape[-1]) < half, -turned, turned)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)


@rotation
class LanesSelected:
    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        lane = torch.arange(x.shape[-1])
        sign = torch.where(lane < half, -1.0, 1.0).to(x.dtype)
        turned = x.index_select(-1, (lane + half) % x.shape[-1]) * sign
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)


@rotation
class InPlace:
    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        y = x.to(cos.dtype).clone()
        y[..., :half] = x[..., :half] * cos - x[..., half:] * sin
        y[..., half:] = x[..., half:] * cos + x[..., :half] * sin
        return y


@rotation
class MultipliedInPlace:
    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        y = x.to(cos.dtype).clone()
        y[..., :half].mul_(cos).sub_(b * sin)
        y[..., half:].mul_(cos).add_(a * sin)
        return y


@rotation
class Upcast:
    """In float32, whatever the model's dtype."""

    def rotate(self, x, cos, sin):
        a, b = x.float().chunk(2, -1)
        cos, sin = cos.float(), sin.float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@rotation
class GptJ:
    def rotate(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@rotation
class GptJEveryTwo:
    def rotate(self, x, cos, sin):
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


@rotation
class GptJAssigned:
    def rotate(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        y = torch.empty_like(x, dtype=cos.dtype)
        y[..., 0::2] = a * cos - b * sin
        y[..., 1::2] = b * cos + a * sin
        return y


@rotation
class Matrices:
    """Flux: a matrix of two by two for each pair"""

    def rotate(self, x, cos, sin):
        turn = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)).float()
        pairs = x.float().unflatten(-1, (-1, 1, 2))
        return (turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]).flatten(-2)


@rotation
class Complex:
    """Llama's own: cosine and sine as one complex number."""

    def rotate(self, x, cos, sin):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2)


@alternative("rope", fits=lambda shape, chosen: chosen["table"] in COMPLEX_TABLES)
class ComplexRows:
    """What is looked up is complex."""

    def rotate(self, x, turn, _):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)


@rotation
class ComplexHalves:
    """The two halves of a head as real and imaginary part."""

    def rotate(self, x, cos, sin):
        a, b = x.float().chunk(2, -1)
        turned = torch.complex(a, b) * torch.complex(cos.float(), sin.float())
        return torch.cat([turned.real, turned.imag], -1)


@rotation
class Partial:
    """The first half of the lanes turns."""

    def rotate(self, x, cos, sin):
        d = x.shape[-1] // 2
        cos, sin = cos[..., : d // 2], sin[..., : d // 2]
        a, b = x[..., :d].chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., d:]], -1)


@rotation
class PartialByPadding:
    """All lanes turn, the last ones by nothing."""

    def rotate(self, x, cos, sin):
        pairs = x.shape[-1] // 2
        cos, sin = cos[..., : pairs // 2], sin[..., : pairs // 2]
        cos, sin = F.pad(cos, (0, pairs - pairs // 2), value=1.0), F.pad(sin, (0, pairs - pairs // 2))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@rotation
class PartialInPlace:
    def rotate(self, x, cos, sin):
        d = x.shape[-1] // 2
        cos, sin = cos[..., : d // 2], sin[..., : d // 2]
        a, b = x[..., :d].chunk(2, -1)
        y = x.to(cos.dtype).clone()
        y[..., :d] = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return y


@rotation
class PartialGptJ:
    def rotate(self, x, cos, sin):
        d = x.shape[-1] // 2
        cos, sin = cos[..., : d // 2], sin[..., : d // 2]
        a, b = x[..., :d:2], x[..., 1:d:2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, x[..., d:]], -1)


# --- cache and store --------------------------------------------------------------------------------------------------


class _OnePerToken:
    """Slots [T] or [B, S] of caches that all sequences share."""

    def slot_shape(self: Any) -> tuple[int, ...]:
        return self.shape.grid

    def caches(self: Any, *caches: Tensor) -> Any:
        return caches

    def flat(self: Any, slots: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return slots.flatten(), value.reshape(-1, self.shape.num_kv_heads, self.shape.head_dim)


def _slots(shape: Shape, *rest: int) -> tuple[int, ...]:
    return (shape.slots, shape.num_kv_heads, shape.head_dim, *rest)


@alternative("store")
class Flat(_OnePerToken):
    def cache_shapes(self):
        return [_slots(self.shape)] * 2

    def store(self, cache, slots, value):
        cache[slots] = value.to(cache.dtype)


@alternative("store")
class FlatIndexCopy(Flat):
    def store(self, cache, slots, value):
        slots, value = self.flat(slots, value)
        cache.index_copy_(0, slots, value.to(cache.dtype))


@alternative("store")
class FlatIndexPut(Flat):
    def store(self, cache, slots, value):
        slots, value = self.flat(slots, value)
        cache.index_put_((slots.long(),), value.to(cache.dtype))


@alternative("store")
class FlatRows(_OnePerToken):
    """[slots, Hk * D]"""

    def cache_shapes(self):
        return [(self.shape.slots, self.sizes[1])] * 2

    def store(self, cache, slots, value):
        slots, value = self.flat(slots, value)
        cache[slots] = value.flatten(1).to(cache.dtype)


@alternative("store")
class Paged(_OnePerToken):
    """[blocks, block size, Hk, D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.slots // BLOCK, BLOCK, s.num_kv_heads, s.head_dim)] * 2

    def store(self, cache, slots, value):
        cache[slots // BLOCK, slots % BLOCK] = value.to(cache.dtype)


@alternative("store")
class PagedViewedFlat(Paged):
    def store(self, cache, slots, value):
        cache.view(-1, self.shape.num_kv_heads, self.shape.head_dim)[slots] = value.to(cache.dtype)


@alternative("store")
class PagedHeadsFirst(_OnePerToken):
    """[blocks, Hk, block size, D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.slots // BLOCK, s.num_kv_heads, BLOCK, s.head_dim)] * 2

    def store(self, cache, slots, value):
        cache[slots // BLOCK, :, slots % BLOCK] = value.to(cache.dtype)


@alternative("store")
class OneTensor(Flat):
    """[2, slots, Hk, D]"""

    def cache_shapes(self):
        return [(2, *_slots(self.shape))]

    def caches(self, cache):
        return cache.unbind(0)


@alternative("store")
class OneTensorBySlot(Flat):
    """[slots, 2, Hk, D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.slots, 2, s.num_kv_heads, s.head_dim)]

    def caches(self, cache):
        return cache[:, 0], cache[:, 1]


@alternative("store")
class SideBySide(Flat):
    """[slots, Hk, 2 * D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.slots, s.num_kv_heads, 2 * s.head_dim)]

    def caches(self, cache):
        return cache.chunk(2, -1)


class _Joined:
    """Keys and values stored at once."""

    def store_both(self: Any, caches: tuple[Tensor, ...], slots: Tensor, k: Tensor, v: Tensor) -> None:
        (cache,) = caches
        self.store(cache, slots, self.join(k, v))


@alternative("store")
class JoinedBySlot(_Joined, OneTensorBySlot):
    def join(self, k, v):
        return torch.stack([k, v], -3)


@alternative("store")
class JoinedSideBySide(_Joined, SideBySide):
    def join(self, k, v):
        return torch.cat([k, v], -1)


@alternative("store")
class JoinedTakingTurns(_Joined, _OnePerToken):
    """[slots, 2 * Hk, D]: a key head, its value head, the next key head"""

    def cache_shapes(self):
        s = self.shape
        return [(s.slots, 2 * s.num_kv_heads, s.head_dim)]

    def caches(self, cache):
        return cache[:, ::2], cache[:, 1::2]

    def join(self, k, v):
        return torch.stack([k, v], -2).flatten(-3, -2)

    def store(self, cache, slots, value):
        cache.index_copy_(0, slots.flatten(), value.reshape(-1, *cache.shape[1:]).to(cache.dtype))


@alternative("store", fits=lambda shape, _: shape.batch > 0)
class BySequenceAndPosition(_OnePerToken):
    """[B, Hk, slots, D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.batch, s.num_kv_heads, s.slots, s.head_dim)] * 2

    def store(self, cache, slots, value):
        cache[torch.arange(len(value)).unsqueeze(-1), :, slots] = value.to(cache.dtype)


@alternative("store", fits=lambda shape, _: shape.batch > 0)
class PerSequence:
    """[B, Hk, slots, D], one slot for all sequences"""

    def slot_shape(self):
        return (self.shape.tokens,)

    def cache_shapes(self):
        s = self.shape
        return [(s.batch, s.num_kv_heads, s.slots, s.head_dim)] * 2

    def caches(self, *caches):
        return caches

    def store(self, cache, slots, value):
        cache.index_copy_(2, slots, value.transpose(1, 2).to(cache.dtype))


@alternative("store", fits=lambda shape, _: shape.batch > 0)
class PerSequenceTokensFirst(PerSequence):
    """[B, slots, Hk, D]"""

    def cache_shapes(self):
        s = self.shape
        return [(s.batch, s.slots, s.num_kv_heads, s.head_dim)] * 2

    def store(self, cache, slots, value):
        cache[:, slots] = value.to(cache.dtype)


@alternative("store", fits=lambda shape, _: shape.batch > 0, declines=("store.index",))
class PerSequenceOwnSlots(PerSequenceTokensFirst):
    """Each sequence writes at slots of its own."""

    def slot_shape(self):
        return self.shape.grid

    def store(self, cache, slots, value):
        cache[torch.arange(self.shape.batch)[:, None], slots] = value.to(cache.dtype)


@alternative("cache dtype")
class SameDtype:
    cache_dtype = None


@alternative("cache dtype")
class Float16Cache:
    cache_dtype = torch.float16


@alternative("cache dtype")
class Float32Cache:
    cache_dtype = torch.float32


# --- what else uses query, key and value ------------------------------------------------------------------------------


class _Attended:
    def attended(self: Any, heads: Tensor) -> Tensor:
        """[..., H, D] through the output projection."""
        return self.o_proj(heads.flatten(-2).to(self.shape.dtype))


@alternative("consumer")
class Projected(_Attended):
    def consume(self, q, k, v, k_cache, v_cache):
        return self.attended(self.tokens_first(q))


@alternative("consumer")
class Scaled(_Attended):
    def consume(self, q, k, v, k_cache, v_cache):
        return self.attended(self.tokens_first(q) * self.shape.head_dim**-0.5)


@alternative("consumer")
class QueryTwice(_Attended):
    def consume(self, q, k, v, k_cache, v_cache):
        return self.attended(self.tokens_first(q)), q.sum(-1), torch.relu(q)


@alternative("consumer")
class EverythingReturned(_Attended):
    def consume(self, q, k, v, k_cache, v_cache):
        return q, k, v


@alternative("consumer")
class KeyReturned(_Attended):
    def consume(self, q, k, v, k_cache, v_cache):
        return self.attended(self.tokens_first(q)), k.clone(), v.clone()


@alternative("consumer")
class FreshAttention(_Attended):
    """Prefill: attention on the fresh key and value."""

    def consume(self, q, k, v, k_cache, v_cache):
        q, k, v = map(self.attention_input, (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return self.attended(out if self.shape.batch else out[0])


@alternative("consumer")
class CachesRead(_Attended):
    """Whatever the caches hold afterwards is used."""

    def consume(self, q, k, v, k_cache, v_cache):
        return self.attended(self.tokens_first(q)), k_cache.float().sum(-1), v_cache.float().amax()


class Model(Composed):
    """The skeleton, with what comes after the conversion to the model's dtype."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.finish()

    def finish(self) -> None:
        pass

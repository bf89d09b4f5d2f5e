"""A norm and a rotation of a few heads as plain functions, and what only looks like them."""

from __future__ import annotations

import torch

from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.proof.field import Comparison
from fx_fusion.proof.field.draw import needed_square, scaled_to_squares

TOKENS, HEADS, LANES, EPS = 3, 4, 16, 1e-6

SHAPES = {
    "x": (TOKENS, HEADS * LANES), "weight": (LANES,), "cos": (TOKENS, LANES // 2), "sin": (TOKENS, LANES // 2),
}  # fmt: skip

SQUARES = {needed_square(EPS)}


def mean_square(x, eps=EPS):
    return x.pow(2).mean(-1, keepdim=True) + eps


def normalised(x):
    return x * torch.rsqrt(mean_square(x))


def fused(inputs, eps=EPS):
    x = inputs["x"].reshape(1, TOKENS, HEADS, LANES)
    cos, sin = (inputs[name].reshape(1, TOKENS, -1) for name in ("cos", "sin"))
    return reference.norm_rope(x, inputs["weight"], eps, False, cos, sin, LANES, True)


def region_of(norm):
    """Heads, normalised by `norm`, weighted and rotated."""

    def region(inputs, at):
        y = norm(inputs["x"].reshape(TOKENS, HEADS, LANES)) * inputs["weight"]
        a, b = y.chunk(2, -1)
        cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)[None]

    return region


def with_roots(field, values, fresh):
    rows = values["x"].reshape(TOKENS, HEADS, LANES)
    values["x"] = scaled_to_squares(field, rows, EPS, fresh).reshape(TOKENS, -1)


def comparison(norm=normalised, expected=fused):
    """Of `norm`, weighted and rotated, with the fused operation."""
    return Comparison(region_of(norm), expected, SHAPES, with_roots, SQUARES, never={EPS}, text="heads")


def sign(d):
    """1 or -1; sqrt(d * d) / d, written with a sum under the root."""
    return torch.stack([d, d]).square().mean(0).sqrt() / d


def signs(count):
    """1 unless `count` differences of lanes are all negative."""

    def norm(x):
        unlikely = 1.0
        for lane in range(count):
            unlikely = unlikely * (0.5 - 0.5 * sign(x[..., lane : lane + 1] - 0.5 * x[..., lane + 1 : lane + 2]))
        return normalised(x) * (1 - unlikely)

    return norm


def squared(x):
    return x.sum(-1, keepdim=True).square()


#: What float64 mostly takes for the fused operation, and is not.
PLANTED = {
    "rational bump": lambda x: normalised(x) * (squared(x) / (squared(x) + 1e-35)),
    "rational bump of the norm's own": lambda x: normalised(x) * (mean_square(x, 0) / (mean_square(x, 0) + 1e-33)),
    "far-out polynomial": lambda x: normalised(x) + (x * 1e-20).square() * x,
    "eps + 1e-20": lambda x: x * torch.rsqrt(mean_square(x) + 1e-20),
    "eps in the last place": lambda x: x * torch.rsqrt(mean_square(x, EPS * (1 + 2**-52))),
    "a factor of 1 + 2**-52": lambda x: normalised(x) * (1 + 2**-52),
    "1e-30 of its square": lambda x: normalised(x) + 1e-30 * normalised(x).square(),
    "absolute value": lambda x: normalised(x).square().sqrt(),
    "absolute value by a mean": lambda x: sign(normalised(x)) * normalised(x),
    "S / S": lambda x: normalised(x) * (x.sum(-1, keepdim=True) / x.sum(-1, keepdim=True)),
    "0 * S / S": lambda x: normalised(x) + 0.0 * (x.sum(-1, keepdim=True) / x.sum(-1, keepdim=True)),
    "u / u": lambda x: normalised(x) * (mean_square(x, 0.0) / mean_square(x, 0.0)),
    "a multiple of a known prime": lambda x: normalised(x) + 2147483647.0 * normalised(x) * normalised(x),
    "a multiple of two known primes": lambda x: normalised(x) + 2147483647.0 * 2147483629.0 * x,
    "no eps": lambda x: x * torch.rsqrt(mean_square(x, 0.0)),
    "eps outside": lambda x: x / (mean_square(x, 0.0).sqrt() + EPS),
    "fewer lanes": lambda x: x * torch.rsqrt(mean_square(x[..., :-1])),
    "another head": lambda x: normalised(x) + 1e-30 * x.flip(1),
    "another head's root": lambda x: x * torch.rsqrt(mean_square(x)).flip(1),
    "the square root of another head and back": lambda x: normalised(x) * (
        torch.rsqrt(mean_square(x)).flip(1) * mean_square(x).sqrt().flip(1)
    ) + 1e-300,
    "negative by a root of 121": lambda x: x * (121.0 * mean_square(x)).sqrt() / mean_square(x) / -11.0,
    "negative by a root of 169": lambda x: x * (169.0 * mean_square(x)).rsqrt() * -13.0,
    "negative by three roots": lambda x: x
    * (22.0 * mean_square(x)).sqrt() * (33.0 * mean_square(x)).sqrt() * (6.0 * mean_square(x)).rsqrt()
    / mean_square(x) / -11.0,
    "a root of a negative": lambda x: x / (-1.0 * mean_square(x)).sqrt() * (-1.0 * mean_square(x)).sqrt()
    * torch.rsqrt(mean_square(x)),
    "zero to the power of zero": lambda x: normalised(x) + x.pow(0) - 1.0 + 1e-40 * x,
    **{f"product of {count} signs": signs(count) for count in (1, 2, 3, 8, 14)},
}  # fmt: skip

#: Odd ways to write the fused operation: what literals must stand for, if for anything.
SPELLED = {
    "plain": (normalised, {}),
    "root and quotient": (lambda x: x / mean_square(x).sqrt(), {}),
    "power": (lambda x: x * mean_square(x).pow(-0.5), {}),
    "root over square": (lambda x: x * mean_square(x).sqrt() / mean_square(x), {}),
    "cube of the root": (lambda x: x * mean_square(x).pow(-1.5) * mean_square(x), {}),
    "fourfold": (lambda x: x * (4.0 * mean_square(x)).rsqrt() * 2.0, {}),
    "by 121": (lambda x: x * (121.0 * mean_square(x)).rsqrt() * 11.0, {}),
    "by 121, a quotient": (lambda x: x * (121.0 * mean_square(x)).sqrt() / mean_square(x) / 11.0, {}),
    "by 22, 33 and 6": (
        lambda x: x * (22.0 * mean_square(x)).sqrt() * (33.0 * mean_square(x)).sqrt() * (6.0 * mean_square(x)).rsqrt()
        / mean_square(x) / 11.0,
        {},
    ),
    "by the root of 27": (
        lambda x: x * (27.0 * mean_square(x)).rsqrt() * 27.0**0.5,
        {27.0**0.5: "sqrt(27)"},
    ),
    "roots of literals": (lambda x: normalised(x) * torch.full((), 2.0).sqrt() * torch.full((), 0.5).sqrt(), {}),
    "a tenth, tenfold": (lambda x: normalised(x) * 0.1 * 10.0, {0.1: "1/10"}),
    "minus a third, threefold": (lambda x: normalised(x) * (-1 / 3) * -3.0, {-1 / 3: "-1/3"}),
    "scaled before the square": (
        lambda x: x * torch.rsqrt((x * 3**-0.5).pow(2).sum(-1, keepdim=True) * (3 / LANES) + EPS),
        {3**-0.5: "sqrt(1/3)"},
    ),
    "a tensor of literals": (
        lambda x: normalised(x) * (torch.arange(LANES) * 0.5 + 1.0) / (torch.arange(LANES) * 0.5 + 1.0), {},
    ),
    "float32 values of literals": (
        lambda x: normalised(x) * 0.10000000149011612 * 10.0, {0.10000000149011612: "1/10"},
    ),
    "each head by itself": (lambda x: torch.stack([normalised(head) for head in x.unbind(1)], 1), {}),
    "each head by a root of 3": (
        lambda x: torch.stack([head * (3.0 * mean_square(head)).rsqrt() * 3**0.5 for head in x.unbind(1)], 1),
        {3**0.5: "sqrt(3)"},
    ),
    "heads in another order": (lambda x: normalised(x.flip(1)).flip(1), {}),
    "half of the heads first": (lambda x: torch.cat([normalised(x[:, :2]), normalised(x[:, 2:])], 1), {}),
    "written into memory": (
        lambda x: torch.slice_scatter(
            torch.slice_scatter(torch.empty_like(x), normalised(x)[..., :8], -1, 0, 8),
            normalised(x)[..., 8:], -1, 8, 16,
        ),
        {},
    ),
}  # fmt: skip

"""Arithmetic of the vector unit that numpy lacks, on arrays: fused multiply-add, steps of a division, conversions.

Rounding is to nearest, ties to even, and subnormal numbers are kept: the only modes that the simulator accepts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MIN_NORMAL = np.float32(2.0**-126)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Fused multiply-add: a * b + c in float32, rounded once."""
    return _multiply_add(a, b, c).astype(np.float32)


def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    """In float64, rounded to odd, which a second rounding cannot make wrong; the product is exact there."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(np.isfinite(total) & (error != 0) & even, odd, total)


def approximate(function: Any, x: Any, nearest: bool) -> Any:
    """A result that the hardware promises to less than one unit in the last place: one of the two floats around it.

    Which one depends on the bits of the argument, unless `nearest`. Subnormal arguments and results are flushed.
    """
    flushed = _flush(x)
    exact = function(flushed.astype(np.float64))
    rounded = exact.astype(np.float32)
    error = exact - rounded
    other = np.nextafter(rounded, np.copysign(np.float32(np.inf), error.astype(np.float32)))
    takes_other = flushed.view(np.uint32) * np.uint32(2654435761) >> np.uint32(31) == 1
    inexact = np.isfinite(rounded) & (error != 0)
    return _flush(rounded if nearest else np.where(inexact & takes_other, other, rounded))


def _flush(x: Any) -> Any:
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x)


def reciprocal(x: Any) -> Any:
    return 1 / x


def reciprocal_root(x: Any) -> Any:
    return 1 / np.sqrt(x)


def div_scale(value: Any, denominator: Any, numerator: Any) -> tuple[Any, Any]:
    """V_DIV_SCALE_F32: `value`, which is one of the others, scaled so that the steps of a division stay in range.

    The second result tells v_div_fmas to undo it. Where both the quotient and the reciprocal would be subnormal, AMD's
    documents scale the denominator up, which would overflow: down is what makes the division right.
    """
    ratio = np.abs(numerator.astype(np.float64) / denominator.astype(np.float64))
    scales_denominator = value.view(np.uint32) == denominator.view(np.uint32)
    scales_numerator = value.view(np.uint32) == numerator.view(np.uint32)
    tiny_reciprocal = np.abs(denominator.astype(np.float64)) > 2.0**126
    tiny_ratio = (ratio < 2.0**-126) & (ratio > 0)
    up, down = np.ldexp(value, 64), np.ldexp(value, -64)
    cases = [
        (numerator == 0) | (denominator == 0),
        exponent(numerator) - exponent(denominator) >= 96,
        (exponent(denominator) == 0),
        tiny_reciprocal & tiny_ratio,
        tiny_reciprocal,
        tiny_ratio,
        exponent(numerator) <= 23,
    ]
    results = [
        np.float32(np.nan),
        np.where(scales_denominator, up, value),
        up,
        np.where(scales_denominator, down, value),
        down,
        np.where(scales_numerator, up, value),
        up,
    ]
    undo = [False, True, False, True, False, True, False]
    shape = np.broadcast_shapes(value.shape, denominator.shape, numerator.shape)
    cases = [np.broadcast_to(case, shape) for case in cases]
    return np.select(cases, results, value).astype(np.float32), np.select(cases, undo, False)


def div_fmas(a: Any, b: Any, c: Any, undo: Any) -> Any:
    """V_DIV_FMAS_F32: the last multiply-add of a division, which undoes the scaling; taken to round once."""
    result = _multiply_add(a, b, c)
    return np.where(undo, np.ldexp(result, np.where(exponent(c) > 127, 64, -64)), result).astype(np.float32)


def div_fixup(quotient: Any, denominator: Any, numerator: Any) -> Any:
    """V_DIV_FIXUP_F32: the special cases of a division. Where its steps gave NaN without reason, they overflowed."""
    sign = np.signbit(denominator) ^ np.signbit(numerator)
    nan, zero, infinity = np.float32(np.nan), np.float32(0), np.float32(np.inf)
    cases = [
        (denominator == 0) | np.isinf(numerator),
        (numerator == 0) | np.isinf(denominator),
        exponent(numerator) - exponent(denominator) < -150,
    ]
    shape = np.broadcast_shapes(quotient.shape, denominator.shape, numerator.shape)
    cases = [np.broadcast_to(case, shape) for case in cases]
    estimate = np.where(np.isnan(quotient), infinity, np.abs(quotient))
    magnitude = np.select(cases, [infinity, zero, zero], estimate).astype(np.float32)
    result = np.where(sign, -magnitude, magnitude)
    # An invalid division gives the negative NaN; the first NaN among the sources is passed on.
    invalid = (numerator == 0) & (denominator == 0) | np.isinf(numerator) & np.isinf(denominator)
    result = np.where(invalid, -nan, result)
    result = np.where(np.isnan(denominator), denominator, result)
    return np.where(np.isnan(numerator), numerator, result)


def exponent(x: Any) -> Any:
    return (x.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32)


def to_bfloat16(x: Any) -> Any:
    """The upper half of a float32, rounded, as u32."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(x), bits >> np.uint32(16) | np.uint32(0x40), rounded)


def to_unsigned(x: Any) -> Any:
    """Towards zero, clamped; NaN is 0."""
    clamped = np.clip(np.nan_to_num(x.astype(np.float64), posinf=2.0**32), 0, 2.0**32 - 1)
    return clamped.astype(np.uint32)


def to_half(x: Any) -> Any:
    return x.astype(np.float16)


def pack(low: Any, high: Any) -> Any:
    """Two halves, each in the lower bits of a u32 or two bytes wide, as one u32."""
    low, high = (half.view(np.uint16) if half.dtype == np.float16 else half for half in (low, high))
    return low.astype(np.uint32) & np.uint32(0xFFFF) | high.astype(np.uint32) << np.uint32(16)

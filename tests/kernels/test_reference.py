"""The operation against an oracle of its own: a loop over tokens, heads and lanes in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fx_fusion
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION


def oracle_head(x, weight, eps, gemma, cos, sin, rotary_dim, is_neox):
    """One head, written from the definition. cos(pair, lane) and sin(pair, lane) give the angle."""
    y = list(x)
    if eps is not None:
        scale = 1 / math.sqrt(sum(value * value for value in x) / len(x) + eps)
        y = [value * scale for value in y]
    if weight is not None:
        y = [value * (1 + w if gemma else w) for value, w in zip(y, weight, strict=True)]
    out = list(y)
    half = rotary_dim // 2
    for pair in range(half):
        a, b = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
        out[a] = y[a] * cos(pair, a) - y[b] * sin(pair, a)
        out[b] = y[b] * cos(pair, b) + y[a] * sin(pair, b)
    return out


@st.composite
def problems(draw):
    batch, seq = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    num_heads, num_kv_heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    head_dim = draw(st.sampled_from([4, 8, 12]))
    rotary_dim = draw(st.sampled_from([head_dim, head_dim // 2]))
    return {
        "grid": (batch, seq),
        "heads": (num_heads, num_kv_heads, head_dim),
        "rotary_dim": rotary_dim,
        "is_neox": draw(st.booleans()),
        "gemma_norm": draw(st.booleans()),
        "eps": draw(st.sampled_from([None, 1e-6, 1e-2])),
        "weights": draw(st.booleans()),
        "full_width": draw(st.booleans()),
        "table": draw(st.booleans()),
        "shared_rows": draw(st.booleans()),
        "per_sequence": draw(st.booleans()),
        "gap": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 1 << 16)),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems())
def test_equals_the_definition(problem):
    torch.manual_seed(problem["seed"])
    batch, seq = problem["grid"]
    num_heads, num_kv_heads, head_dim = problem["heads"]
    rotary_dim, is_neox = problem["rotary_dim"], problem["is_neox"]
    float64 = {"dtype": torch.float64}

    def strided(heads):
        return torch.randn(batch, seq, heads, head_dim + problem["gap"], **float64)[..., :head_dim]

    q, k, v = strided(num_heads), strided(num_kv_heads), strided(num_kv_heads)
    q_weight, k_weight = (torch.randn(2, head_dim, **float64)) if problem["weights"] else (None, None)
    width = rotary_dim if problem["full_width"] else rotary_dim // 2
    axes = [pair % 3 for pair in range(rotary_dim // 2)] if problem["table"] else [0] * (rotary_dim // 2)
    rows = 1 if problem["shared_rows"] else batch
    if problem["table"]:
        cos, sin = torch.randn(2, 9, width, **float64)
        positions = torch.randint(-9, 9, (3, rows, seq))
    else:
        cos, sin = torch.randn(2, rows, seq, width, **float64)
        positions = None
    length = batch * seq + 2
    blocks = None
    if problem["per_sequence"]:
        caches = torch.zeros(2, batch, length, num_kv_heads, head_dim, **float64)
        slots = torch.randperm(length)[:seq].expand(batch, seq) - (length if problem["gap"] == 1 else 0)
    else:
        caches = torch.zeros(2, 1, length, num_kv_heads, head_dim, **float64)
        slots = torch.randperm(length)[: batch * seq].view(batch, seq)

    q_out, k_out = fx_fusion.qk_norm_rope_cache(
        q, k, v, q_weight, k_weight, cos, sin, positions, slots, blocks, caches[0], caches[1],
        q_eps=problem["eps"], k_eps=problem["eps"], gemma_norm=problem["gemma_norm"], rotary_dim=rotary_dim,
        is_neox=is_neox, axes=axes, return_k=True,
    )  # fmt: skip

    expected = torch.zeros_like(caches)
    for b in range(batch):
        for s in range(seq):

            def angle(source, pair, lane, b=b, s=s):
                column = lane if problem["full_width"] else pair
                if positions is None:
                    return float(source[b % rows, s, column])
                return float(source[positions[axes[pair], b % rows, s], column])

            def turned(x, weight, angle=angle):
                w = None if weight is None else weight.tolist()
                return torch.tensor(
                    oracle_head(
                        x.tolist(), w, problem["eps"], problem["gemma_norm"],
                        lambda pair, lane: angle(cos, pair, lane), lambda pair, lane: angle(sin, pair, lane),
                        rotary_dim, is_neox,
                    ), **float64,
                )  # fmt: skip

            block, slot = (b if problem["per_sequence"] else 0), int(slots[b, s])
            for h in range(num_heads):
                torch.testing.assert_close(q_out[b, s, h], turned(q[b, s, h], q_weight), rtol=1e-12, atol=1e-12)
            for h in range(num_kv_heads):
                expected[0, block, slot, h] = turned(k[b, s, h], k_weight)
                expected[1, block, slot, h] = v[b, s, h]
                torch.testing.assert_close(k_out[b, s, h], expected[0, block, slot, h], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(caches, expected, rtol=1e-12, atol=1e-12)


def call(dtype=torch.float32, slots=(3, 1, 7), blocks=None, **changes):
    """Arguments of a small call and its options."""
    torch.manual_seed(0)
    packed = torch.randn(1, 3, 8 * 16, dtype=dtype)
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in packed.split([64, 32, 32], -1))
    table = torch.randn(40, 16)
    caches = (
        torch.zeros(2, 4, 8, 2, 16, dtype=dtype) if blocks is not None else torch.zeros(2, 1, 8, 2, 16, dtype=dtype)
    )
    arguments = [
        q, k, v, torch.rand(16), torch.rand(16), table[:, :8], table[:, 8:], torch.randint(0, 40, (3, 1, 3)),
        torch.tensor([slots]), None if blocks is None else torch.tensor([blocks]), caches[0].clone(), caches[1].clone(),
    ]  # fmt: skip
    options = {
        "q_eps": 1e-6, "k_eps": 1e-6, "gemma_norm": False, "rotary_dim": 16, "is_neox": True,
        "axes": [0, 1, 2, 0, 1, 2, 0, 0], "skip_negative_slots": False, "return_k": True, **changes,
    }  # fmt: skip
    return arguments, options


@pytest.mark.parametrize("return_k", [True, False])
@pytest.mark.parametrize("blocks", [None, (0, 3, 3)])
def test_opcheck(return_k, blocks):
    arguments, options = call(return_k=return_k, blocks=blocks)
    *operands, k_cache, v_cache = arguments
    layouts = {"k_layout": CacheLayout.of(k_cache), "v_layout": CacheLayout.of(v_cache)}
    fixed = {"k_scale_value": None, "v_scale_value": None, "saturate": False, "implementation": "reference"}
    torch.library.opcheck(
        OPERATION.overload, (*operands, None, None, k_cache, v_cache), {**options, **layouts, **fixed}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype):
    arguments, options = call(dtype)
    q_out, k_out = fx_fusion.qk_norm_rope_cache(*arguments, **options)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    exact_q, exact_k = fx_fusion.qk_norm_rope_cache(*wide, **options)
    for actual, exact in ((q_out, exact_q), (k_out, exact_k)):
        # Half a unit in the last place, and float32's own error, which may tip a tie.
        assert bool(((actual.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.501 + 1e-6).all())


def test_a_block_and_an_offset():
    arguments, options = call(slots=(3, 1, 7), blocks=(0, 3, 3))
    _, k_out = fx_fusion.qk_norm_rope_cache(*arguments, **options)
    k_cache = arguments[-2]
    for token, (block, slot) in enumerate(((0, 3), (3, 1), (3, 7))):
        assert torch.equal(k_cache[block, slot], k_out[0, token])
    assert int((k_cache != 0).any(-1).any(-1).sum()) == 3


@pytest.mark.parametrize("slots", [(3, -1, 7), (-1, 2, -1), (-1, -1, -1)])
def test_negative_slots_are_skipped(slots):
    arguments, options = call(slots=slots, skip_negative_slots=True)
    arguments[-1].fill_(5.0)
    _, k_out = fx_fusion.qk_norm_rope_cache(*arguments, **options)
    k_cache, v_cache = arguments[-2:]
    kept = [(token, slot) for token, slot in enumerate(slots) if slot >= 0]
    for token, slot in kept:
        assert torch.equal(k_cache[0, slot], k_out[0, token])
    assert int((k_cache != 0).any(-1).any(-1).sum()) == len(kept)
    assert int((v_cache != 5).any(-1).any(-1).sum()) == len(kept)


def test_negative_slots_count_from_the_end():
    arguments, options = call(slots=(3, -1, 2))
    _, k_out = fx_fusion.qk_norm_rope_cache(*arguments, **options)
    assert torch.equal(arguments[-2][0, 7], k_out[0, 1])


def test_slots_outside_the_cache_raise():
    arguments, options = call(slots=(3, 8, 2))
    with pytest.raises(IndexError):
        fx_fusion.qk_norm_rope_cache(*arguments, **options)


def test_positions_outside_the_table_raise():
    arguments, options = call()
    arguments[7] = torch.full((3, 1, 3), 40)
    with pytest.raises(IndexError):
        fx_fusion.qk_norm_rope_cache(*arguments, **options)


def test_an_unknown_implementation_is_named():
    arguments, options = call(implementation="magic")
    with pytest.raises(ValueError, match=r"one of .*'reference'.*, got 'magic'"):
        fx_fusion.qk_norm_rope_cache(*arguments, **options)

"""aiter's contract, argument by argument, and the unrelated package of the same name."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.aiter.contract import CONTRACT, refuses
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.mrope import mrope_section
from fx_fusion.kernels.target import Target

HEADS, KV_HEADS, TOKENS, ROWS = 32, 8, 5, 40
AXES = tuple(i % 3 if i % 3 and i < 60 else 0 for i in range(64))


def served(
    dtype=torch.bfloat16, head_dim=128, angle_dtype=None, cache_dtype=None, cache=(1, 16384), caches=None, **changes
) -> Call[Tensor]:
    """A call on the meta device that aiter serves, changed.

    Args:
        cache: blocks, and slots of each.
        caches: the sizes of k_cache and v_cache, where they are others than [*cache, Hk, D].
        changes: by the name of a tensor or an option: another one, or what makes it of the one that is there.
    """
    sizes = [HEADS, KV_HEADS, KV_HEADS]
    q, k, v = torch.empty(1, TOKENS, sum(sizes), head_dim, dtype=dtype, device="meta").split(sizes, 2)
    q_weight, k_weight = torch.empty(2, head_dim, dtype=dtype, device="meta")
    cos, sin = torch.empty(ROWS, head_dim, dtype=angle_dtype or dtype, device="meta").chunk(2, -1)
    index = torch.empty(4, 1, TOKENS, dtype=torch.int64, device="meta")
    caches = caches or ((*cache, KV_HEADS, head_dim),) * 2
    k_cache, v_cache = (torch.empty(size, dtype=cache_dtype or dtype, device="meta") for size in caches)
    options = Options(
        k_layout=CacheLayout.of(k_cache, "k_cache"), v_layout=CacheLayout.of(v_cache, "v_cache"), k_scale_value=None,
        v_scale_value=None, q_eps=1e-6, k_eps=1e-6, gemma_norm=False, rotary_dim=head_dim, is_neox=True, axes=AXES,
        saturate=False, skip_negative_slots=False, return_k=False,
    )  # fmt: skip
    call = Call(q, k, v, q_weight, k_weight, cos, sin, index[:3], index[3], None, None, None, k_cache, v_cache, options)
    for name, change in changes.items():
        if name in call.tensors:
            new = change(call.tensors[name]) if callable(change) else change
            call = replace(call, **{name: new})
        else:
            old = getattr(call.options, name)
            call = replace(call, options=replace(call.options, **{name: change(old) if callable(change) else change}))
    return call


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def in_blocks(size):
    """Blocks of so many slots, and the block of each token."""
    return {"cache": (64, size), "blocks": torch.empty(1, TOKENS, dtype=torch.int64, device="meta")}


def sized(**sizes):
    return lambda layout: layout._replace(**sizes)


ONE_AXIS = {"positions": lambda positions: positions[:1], "axes": (0,) * 64}
FLOAT8 = {"cache_dtype": torch.float8_e4m3fn, "k_scale_value": 0.5}
SHUFFLE = {**in_blocks(16), "caches": ((64, KV_HEADS, 16, 16, 8), (64, KV_HEADS, 2, 128, 8))}
K_OUT = "no rotated k, or a cache of k's dtype where no slot is skipped"
#: Known when a graph runs, and not before.
SYMBOL = ShapeEnv().create_unbacked_symint()

REFUSED = [
    ({"dtype": torch.float32}, "argument qkv: expected bfloat16 or float16, found torch.float32"),
    ({"v": Tensor.clone}, "argument qkv: expected q, k, v in one contiguous tensor"),
    ({"q_weight": to(torch.float32)}, "argument qw: expected the dtype of qkv, found torch.float32"),
    ({"k_weight": None}, "argument kw: expected the dtype of qkv, found None"),
    ({"sin": Tensor.clone}, "argument cos_sin: expected one table"),
    ({"positions": None}, "argument cos_sin: expected one table"),
    ({"angle_dtype": torch.float32}, "argument cos_sin: expected the dtype of qkv, found torch.float32"),
    ({"positions": to(torch.int32)}, "argument positions: expected int64, found torch.int32"),
    ({"positions": lambda positions: positions[:2]}, "argument positions: expected 1 or 3 axes, found 2"),
    ({"axes": tuple(reversed(AXES))}, "argument mrope_section_: expected sections, found [0, 0, 0, 0, 2, 1"),
    ({"head_dim": 96}, "argument head_size: expected 64, 128 or 256, found 96"),
    ({"q_eps": None}, "argument eps: expected a norm on q and on k"),
    ({"k_eps": 1e-5}, "argument eps: expected one value for q and k"),
    ({**ONE_AXIS, "gemma_norm": True}, "argument gemma_norm: expected False with 1 axis, found True"),
    ({"slots": to(torch.int32)}, "argument slot_mapping: expected int64, found torch.int32"),
    ({"cache": (2, 16384)}, "argument slot_mapping: expected one cache"),
    (
        {**in_blocks(16), "k_layout": sized(block_size=SYMBOL)},
        f"argument block_size: expected a power of two, found {SYMBOL}",
    ),
    (in_blocks(48), "argument block_size: expected a power of two, found 48"),
    ({"cache_dtype": torch.float16}, "argument k_cache: expected the dtype of qkv or float8_e4m3, found torch.float16"),
    ({"k_layout": sized(lane_stride=2)}, "argument k_cache: expected a unit lane stride, found 2"),
    (
        {"v_cache": to(torch.float8_e4m3fn)},
        "argument v_cache: expected the dtype of k_cache, found torch.float8_e4m3fn",
    ),
    (
        {**FLOAT8, "v_cache": to(torch.bfloat16)},
        "argument v_cache: expected the dtype of k_cache, found torch.bfloat16",
    ),
    (
        {**FLOAT8, "k_scale": torch.empty(1, device="meta")},
        "argument k_scale, v_scale: expected a number, found a tensor",
    ),
    (
        {**FLOAT8, "v_scale": torch.empty(1, device="meta")},
        "argument k_scale, v_scale: expected a number, found a tensor",
    ),
    (
        {"k_scale_value": 0.5},
        "argument k_scale, v_scale: expected none, as aiter divides only what it converts, found one",
    ),
    (
        {"v_scale_value": 0.5},
        "argument k_scale, v_scale: expected none, as aiter divides only what it converts, found one",
    ),
    ({"return_k": True, "skip_negative_slots": True}, f"argument k_out: expected {K_OUT}, found skipped slots"),
    ({"return_k": True, **FLOAT8}, f"argument k_out: expected {K_OUT}, found torch.float8_e4m3fn"),
]

#: What lies otherwise in memory than aiter reads it, where every line of the contract holds.
MISPLACED = [
    ({"v_layout": sized(lane_stride=2)}, "argument v_cache: expected a unit lane stride, found 2"),
    (
        {**in_blocks(16), "v_layout": sized(num_blocks=63)},
        "argument v_cache: expected the blocks of k_cache, (64, 16), found (63, 16)",
    ),
    (
        {**in_blocks(16), "v_layout": sized(num_blocks=128, block_size=8)},
        "argument v_cache: expected the blocks of k_cache, (64, 16), found (128, 8)",
    ),
    (
        {**in_blocks(16), "caches": ((64, 16, KV_HEADS, 128), SHUFFLE["caches"][1])},
        "argument v_cache: expected the shuffle layout of k_cache, False, found True",
    ),
    (
        {**in_blocks(16), "caches": (SHUFFLE["caches"][0], (64, 16, KV_HEADS, 128))},
        "argument v_cache: expected the shuffle layout of k_cache, True, found False",
    ),
    (
        {**SHUFFLE, "caches": ((64, KV_HEADS, 32, 16, 4), SHUFFLE["caches"][1])},
        "argument k_cache: expected lanes in groups of 8, and nothing else in groups, found 4 and 0",
    ),
    (
        {**SHUFFLE, "caches": (SHUFFLE["caches"][0], (64, KV_HEADS, 4, 128, 4))},
        "argument v_cache: expected slots in groups of 8, and nothing else in groups, found 4 and 0",
    ),
    (
        {**SHUFFLE, "v_layout": sized(block_stride=2 * KV_HEADS * 16 * 128)},
        "argument v_cache: expected the shuffle layout, contiguous, found strides [32768, 2048, 1024, 8, 1]",
    ),
    (
        {"caches": ((1, KV_HEADS, 16, 16, 8), (1, KV_HEADS, 2, 128, 8))},
        "argument slot_mapping: expected a block and an offset in the shuffle layout, found a slot",
    ),
    (
        {"k_weight": lambda weight: torch.empty(256, dtype=weight.dtype, device="meta")[::2]},
        "argument kw: expected [128], contiguous, found [128] with strides [2]",
    ),
    (
        {"q_weight": lambda weight: weight[:64]},
        "argument qw: expected [128], contiguous, found [64] with strides [1]",
    ),
]


SERVES = [
    {},
    {"dtype": torch.float16},
    {"head_dim": 64, "axes": (0,) * 32},
    ONE_AXIS,
    {"gemma_norm": True},
    {"return_k": True},
    {"skip_negative_slots": True},
    in_blocks(16),
    SHUFFLE,
    {"k_layout": sized(slot_stride=2 * KV_HEADS * 128), "v_layout": sized(head_stride=512)},
]


@pytest.mark.parametrize("change", SERVES, ids=", ".join)
def test_serves(change):
    assert refuses(served(**change), Target("gfx942")) is None


@pytest.mark.parametrize(
    ("target", "float8", "fits"),
    [
        ("gfx942", torch.float8_e4m3fnuz, True),
        ("gfx942", torch.float8_e4m3fn, False),
        ("gfx950", torch.float8_e4m3fn, True),
        ("gfx950", torch.float8_e4m3fnuz, False),
        ("gfx1201", torch.float8_e4m3fn, True),
        ("gfx1250", torch.float8_e4m3fn, True),
        ("gfx90a", torch.float8_e4m3fn, False),
        ("hip", torch.float8_e4m3fn, False),
    ],
)
def test_float8_is_the_devices(target, float8, fits):
    found = refuses(served(cache_dtype=float8, k_scale_value=0.5), Target(target))
    if fits:
        assert found is None
    else:
        assert found == (
            "argument k_cache: expected float8_e4m3fnuz on gfx942, float8_e4m3fn on gfx950 and gfx12, "
            f"found {float8} on {target}"
        )


def test_the_architecture_is_asked_where_only_the_platform_is_known(monkeypatch):
    class Properties:
        gcnArchName = "gfx950:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: Properties())
    assert refuses(served(**FLOAT8), Target("hip")) is None


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason.split(":")[0] for _, reason in REFUSED])
def test_refuses_by_argument(change, reason):
    found = refuses(served(**change), Target("gfx942"))
    assert found is not None
    assert found.startswith(reason)


@pytest.mark.parametrize(("change", "reason"), MISPLACED, ids=[reason[9:50] for _, reason in MISPLACED])
def test_refuses_what_lies_otherwise_in_memory(change, reason):
    call = served(**change)
    assert all(line.holds(call) for line in CONTRACT)
    assert refuses(call, Target("gfx942")) == reason


def test_every_line_of_the_contract_can_refuse():
    refused = {refuses(served(**change), Target("hip")) for change, _ in REFUSED}
    for line in CONTRACT:
        assert any(reason.startswith(f"argument {line.argument}: expected {line.expected}") for reason in refused), line


def test_runs_on_amd_only():
    assert "runs on AMD GPUs" in (aiter.Aiter().unavailable(Target("cuda")) or "")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "aiter is not installed" in (aiter.Aiter().unavailable(Target("gfx942")) or "")


def test_the_unrelated_package_is_named(monkeypatch):
    class Distribution:
        metadata = {"Summary": "Useful patterns building upon asynchronous iterators."}  # noqa: RUF012

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    for target in ("gfx942", "cpu"):
        assert "unrelated asyncio helper" in (aiter.Aiter().unavailable(Target(target)) or "")


def test_mrope_sections():
    assert mrope_section((0, 0, 1, 1, 2)) == ((2, 2, 1), False)
    assert mrope_section((0, 1, 2, 0, 0, 0)) == ((4, 1, 1), True)
    assert mrope_section((2, 1, 0)) is None

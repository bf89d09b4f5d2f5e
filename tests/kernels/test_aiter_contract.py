"""aiter's contract, argument by argument, and the unrelated package of the same name."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.target import Problem, Target, mrope_section

SERVED = Problem(
    num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, is_neox=True, gemma_norm=False, q_eps=1e-6, k_eps=1e-6,
    dtype=torch.bfloat16, cache_dtype=torch.bfloat16, weight_dtypes=(torch.bfloat16, torch.bfloat16),
    angle_dtype=torch.bfloat16, packed_qkv=True, packed_table=True, positions_dtype=torch.int64, num_axes=3,
    axes=tuple(i % 3 if i % 3 and i < 60 else 0 for i in range(64)), slots_dtype=torch.int64, separate_blocks=False,
    per_sequence_cache=False, cache_stride=(16384, 1024, 128, 1), return_k=False, skip_negative_slots=False,
)  # fmt: skip

FLOAT8 = {"cache_dtype": torch.float8_e4m3fn, "scaled": True}
K_OUT = "no rotated k, or a cache of k's dtype where no slot is skipped"

REFUSED = [
    ({"dtype": torch.float32}, "argument qkv: expected bfloat16 or float16, found torch.float32"),
    ({"packed_qkv": False}, "argument qkv: expected q, k, v in one contiguous tensor"),
    ({"weight_dtypes": (torch.float32, torch.bfloat16)}, "argument qw: expected the dtype of qkv, found torch.float32"),
    ({"weight_dtypes": (torch.bfloat16, None)}, "argument kw: expected the dtype of qkv, found None"),
    ({"packed_table": False}, "argument cos_sin: expected one table"),
    ({"angle_dtype": torch.float32}, "argument cos_sin: expected the dtype of qkv, found torch.float32"),
    ({"positions_dtype": torch.int32}, "argument positions: expected int64, found torch.int32"),
    ({"num_axes": 2}, "argument positions: expected 1 or 3 axes, found 2"),
    ({"axes": tuple(reversed(SERVED.axes))}, "argument mrope_section_"),
    ({"head_dim": 96}, "argument head_size: expected 64, 128 or 256, found 96"),
    ({"q_eps": None}, "argument eps: expected a norm on q and on k"),
    ({"k_eps": 1e-5}, "argument eps: expected one value for q and k"),
    ({"num_axes": 1, "gemma_norm": True}, "argument gemma_norm: expected False with 1 axis, found True"),
    ({"slots_dtype": torch.int32}, "argument slot_mapping: expected int64, found torch.int32"),
    ({"per_sequence_cache": True}, "argument slot_mapping: expected one cache"),
    ({"separate_blocks": True}, "argument block_size: expected a power of two, found None"),
    ({"separate_blocks": True, "block_size": 48}, "argument block_size: expected a power of two, found 48"),
    ({"cache_dtype": torch.float16}, "argument k_cache: expected the dtype of qkv or float8_e4m3, found torch.float16"),
    ({"cache_stride": (1, 1, 1, 2)}, "argument k_cache: expected a unit lane stride, found 2"),
    ({"scale_on_device": True, **FLOAT8}, "argument k_scale, v_scale: expected a number, found a tensor"),
    ({"scaled": True}, "argument k_scale, v_scale: expected none, as aiter divides only what it converts, found one"),
    ({"return_k": True, "skip_negative_slots": True}, f"argument k_out: expected {K_OUT}, found skipped slots"),
    ({"return_k": True, **FLOAT8}, f"argument k_out: expected {K_OUT}, found torch.float8_e4m3fn"),
]


SERVES = [
    {},
    {"num_axes": 1, "axes": (0,) * 64},
    {"gemma_norm": True},
    {"return_k": True},
    {"skip_negative_slots": True},
    {"separate_blocks": True, "block_size": 16},
]


@pytest.mark.parametrize("change", SERVES, ids=str)
def test_serves(change):
    assert aiter.refuses(dataclasses.replace(SERVED, **change), Target("gfx942")) is None


@pytest.mark.parametrize(
    ("target", "float8", "served"),
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
def test_float8_is_the_devices(target, float8, served):
    problem = dataclasses.replace(SERVED, cache_dtype=float8, scaled=True)
    found = aiter.refuses(problem, Target(target))
    if served:
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
    assert aiter.refuses(dataclasses.replace(SERVED, **FLOAT8), Target("hip")) is None


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason.split(":")[0] for _, reason in REFUSED])
def test_refuses_by_argument(change, reason):
    found = aiter.refuses(dataclasses.replace(SERVED, **change), Target("gfx942"))
    assert found is not None
    assert found.startswith(reason)


def test_every_line_of_the_contract_can_refuse():
    refused = {aiter.refuses(dataclasses.replace(SERVED, **change), Target("hip")) for change, _ in REFUSED}
    for line in aiter.CONTRACT:
        assert any(reason.startswith(f"argument {line.argument}: expected {line.expected}") for reason in refused), line


def test_runs_on_amd_only():
    assert "runs on AMD GPUs" in (aiter.unavailable(Target("cuda")) or "")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "aiter is not installed" in (aiter.unavailable(Target("gfx942")) or "")


def test_the_unrelated_package_is_named(monkeypatch):
    class Distribution:
        metadata = {"Summary": "Useful patterns building upon asynchronous iterators."}  # noqa: RUF012

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    for target in ("gfx942", "cpu"):
        assert "unrelated asyncio helper" in (aiter.unavailable(Target(target)) or "")


def test_mrope_sections():
    assert mrope_section((0, 0, 1, 1, 2)) == ((2, 2, 1), False)
    assert mrope_section((0, 1, 2, 0, 0, 0)) == ((4, 1, 1), True)
    assert mrope_section((2, 1, 0)) is None

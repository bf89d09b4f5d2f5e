"""aiter's contract, argument by argument, and the unrelated package of the same name."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from fx_fusion.kernels import aiter
from fx_fusion.kernels.contract import Problem, Target, mrope_section

SERVED = Problem(
    num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128, is_neox=True, gemma_norm=False, q_eps=1e-6, k_eps=1e-6,
    dtype=torch.bfloat16, cache_dtype=torch.bfloat16, weight_dtypes=(torch.bfloat16, torch.bfloat16),
    angle_dtype=torch.bfloat16, packed_qkv=True, packed_table=True, positions_dtype=torch.int64, num_axes=3,
    axes=tuple(i % 3 if i % 3 and i < 60 else 0 for i in range(64)), slots_dtype=torch.int64, separate_blocks=False,
    per_sequence_cache=False, cache_stride=(16384, 1024, 128, 1), return_k=False, skip_negative_slots=False,
)  # fmt: skip

REFUSED = [
    ({"dtype": torch.float32}, "argument qkv: expected bfloat16 or float16, found torch.float32"),
    ({"packed_qkv": False}, "argument qkv: expected q, k, v in one contiguous tensor"),
    ({"weight_dtypes": (torch.float32, torch.bfloat16)}, "argument qw: expected the dtype of qkv, found torch.float32"),
    ({"weight_dtypes": (torch.bfloat16, None)}, "argument kw: expected the dtype of qkv, found None"),
    ({"packed_table": False}, "argument cos_sin: expected one table"),
    ({"angle_dtype": torch.float32}, "argument cos_sin: expected the dtype of qkv, found torch.float32"),
    ({"positions_dtype": torch.int32}, "argument positions: expected int64, found torch.int32"),
    ({"num_axes": 1}, "argument positions: expected 3 axes, found 1"),
    ({"axes": tuple(reversed(SERVED.axes))}, "argument mrope_section_"),
    ({"head_dim": 96}, "argument head_size: expected 64, 128 or 256, found 96"),
    ({"q_eps": None}, "argument eps: expected a norm on q and on k"),
    ({"k_eps": 1e-5}, "argument eps: expected one value for q and k"),
    ({"slots_dtype": torch.int32}, "argument slot_mapping: expected int64, found torch.int32"),
    ({"per_sequence_cache": True}, "argument slot_mapping: expected one cache"),
    ({"separate_blocks": True}, "argument slot_mapping: expected one number"),
    ({"cache_dtype": torch.float16}, "argument k_cache: expected the dtype of qkv, found torch.float16"),
    ({"cache_stride": (1, 1, 1, 2)}, "argument k_cache: expected a unit lane stride, found 2"),
]


def test_serves():
    assert aiter.refuses(SERVED, Target("gfx942")) is None


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

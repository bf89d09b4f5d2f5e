"""The file of measurements: its format, what is looked up in it, and that a bad one does no harm."""

from __future__ import annotations

import json

import pytest
import torch

from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import VERSION, Machine, Shape, Timing, Tuned, from_json, to_json
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import plan
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import (
    Tile,
    candidates,
    choose_tile,
    tile_from_json,
    tile_to_json,
)

HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", "0.1.5")
SHAPE = Shape(32, 8, 128, 128, "bfloat16")


def timing(num_tokens, tile, **microseconds):
    return Timing(num_tokens, microseconds, {"triton": tile_to_json(tile)})


TIMINGS = (
    timing(8, Tile(2, 1), triton=3.5, aiter=2.25),
    timing(64, Tile(4, 2, 2), triton=5.0),
    timing(512, Tile(8, 1, 4), triton=9.0, aiter=20.0),
)
TUNED = Tuned(HERE, "2.13.0", "2026-11-23", {SHAPE: TIMINGS})
GPU = torch.device("cuda", 0)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of measurements of this machine, which the pass reads."""
    path = tmp_path / "measured.json"
    path.write_text(to_json(TUNED))
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    return path


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(tuned.log, "warning", lambda message, *values: found.append(message % values))
    return found


# --- the format ---------------------------------------------------------------------------------------------------


def test_round_trip():
    assert from_json(to_json(TUNED)) == TUNED


def test_timings_are_sorted():
    content = json.loads(to_json(TUNED))
    content["shapes"][0]["timings"].reverse()
    assert from_json(json.dumps(content)) == TUNED


def without_version(content):
    del content["version"]


def other_version(content):
    content["version"] = VERSION + 1


def one_word(content):
    content["shapes"] = "none"


def no_settings(content):
    del content["shapes"][0]["timings"][0]["settings"]


def no_tile(content):
    content["shapes"][0]["timings"][0]["settings"]["triton"] = None


def three_tokens(content):
    content["shapes"][0]["timings"][0]["settings"]["triton"]["tokens"] = 3


def no_warps(content):
    content["shapes"][0]["timings"][0]["settings"]["triton"]["num_warps"] = 0


def more_than_a_tile(content):
    content["shapes"][0]["timings"][0]["settings"]["triton"]["stages"] = 2


def no_time(content):
    content["shapes"][0]["timings"][0]["microseconds"]["triton"] = float("nan")


def true_tokens(content):
    content["shapes"][0]["timings"][0]["num_tokens"] = True


SPOILED = {
    without_version: "KeyError: 'version'",
    other_version: f"its format has version {VERSION + 1}, this fx_fusion reads {VERSION}",
    one_word: "TypeError",
    no_settings: "KeyError: 'settings'",
    no_tile: "TypeError",
    no_time: "triton must be a positive number of microseconds, found nan",
    true_tokens: "num_tokens must be a positive integer, found True",
}
#: A kernel's settings are for the kernel to read.
SPOILED_SETTINGS = {
    three_tokens: "a tile's tokens must be a power of two up to 256, found 3",
    no_warps: "a tile's num_warps must be a power of two up to 16, found 0",
    more_than_a_tile: "a tile has tokens, num_warps, heads, found {",
}


def spoiled(spoil):
    content = json.loads(to_json(TUNED))
    spoil(content)
    return json.dumps(content)


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_says_what_is_wrong(spoil):
    with pytest.raises(ValueError, match=SPOILED[spoil]):
        from_json(spoiled(spoil))


@pytest.mark.parametrize("spoil", SPOILED | SPOILED_SETTINGS, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_file_is_ignored(spoil, path, warnings):
    path.write_text(spoiled(spoil))
    reason = (SPOILED | SPOILED_SETTINGS)[spoil]
    assert reason in tuned.why_ignored(path, HERE)
    assert planned(100) == choose_tile(100, 32, 8, 128)
    (warning,) = warnings
    assert reason in warning


def test_settings_of_a_kernel_that_is_not_here_are_kept(path, warnings):
    """Another process may register it."""
    here = TIMINGS[0]
    other = Timing(8, {**here.microseconds, "ours": 1.0}, {**here.settings, "ours": {"depth": "any"}})
    content = Tuned(HERE, "2.13.0", "2026-11-23", {SHAPE: (other,)})
    path.write_text(to_json(content))
    assert tuned.why_ignored(path, HERE) is None
    assert tuned.timing(SHAPE, 8, GPU) == other
    assert planned(8) == Tile(2, 1)
    assert not warnings


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"text"', "[" * 100_000], ids=lambda text: text[:6])
def test_anything_else_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


def test_what_was_measured_again_replaces_the_older():
    other = Shape(8, 1, 128, 128, "bfloat16")
    newer = Tuned(HERE, "2.14.0", "2027-01-01", {SHAPE: (timing(64, Tile(1, 1), triton=4.0),), other: TIMINGS})
    both = TUNED.updated(newer)
    assert both.shapes == {SHAPE: (TIMINGS[0], newer.shapes[SHAPE][0], TIMINGS[2]), other: TIMINGS}
    assert (both.torch, both.date) == ("2.14.0", "2027-01-01")


def test_nothing_of_another_machine_stays():
    elsewhere = Tuned(HERE._replace(triton="3.7.0"), "2.13.0", "2026-12-01", {})
    assert TUNED.updated(elsewhere) == elsewhere


# --- look-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "measured"),
    [(1, None), (7, None), (8, 8), (63, 8), (64, 64), (511, 64), (512, 512), (1 << 20, 512)],
)
def test_the_largest_count_that_is_not_above(count, measured):
    found = TUNED.at(SHAPE, count)
    assert (found and found.num_tokens) == measured


def test_another_shape_has_no_timing():
    assert TUNED.at(SHAPE._replace(dtype="float16"), 64) is None


def test_a_symbolic_count_has_no_timing(path):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert tuned.timing(SHAPE, None, GPU) is None
    assert tuned.timing(SHAPE, ShapeEnv().create_unbacked_symint(), GPU) is None


def call(tokens, rotary_dim=128):
    q, kv = torch.empty(1, tokens, 32, 128).bfloat16(), torch.empty(1, tokens, 8, 128).bfloat16()
    half = torch.empty(4, rotary_dim // 2).bfloat16()
    cache, index = torch.empty(1, 1024, 8, 128).bfloat16(), torch.empty(1, tokens, dtype=torch.int64)
    layout = CacheLayout.of(cache)
    options = Options(
        k_layout=layout, v_layout=layout, k_scale_value=None, v_scale_value=None, q_eps=1e-6, k_eps=1e-6,
        gemma_norm=False, rotary_dim=rotary_dim, is_neox=True, axes=(0,) * (rotary_dim // 2), saturate=False,
        skip_negative_slots=False, return_k=False,
    )  # fmt: skip
    weight = torch.empty(128).bfloat16()
    return Call(q, kv, kv, weight, weight, half, half, index[None], index, None, None, None, cache, cache, options)


def planned(tokens, tile=None):
    return plan(call(tokens), tile).tile


def test_a_launch_takes_the_tile_that_was_measured(path):
    assert planned(8) == Tile(2, 1)
    assert planned(100) == Tile(4, 2, 2)
    assert planned(100, tile=Tile(1, 1)) == Tile(1, 1)
    assert planned(4) == choose_tile(4, 32, 8, 128)


def test_another_rotary_dim_is_another_shape(path):
    assert plan(call(100, rotary_dim=64)).tile == choose_tile(100, 32, 8, 128)


def test_off(path, monkeypatch):
    monkeypatch.setenv("FX_FUSION_TUNED", "off")
    assert planned(100) == choose_tile(100, 32, 8, 128)


def test_a_device_of_another_kind_has_no_measurements():
    assert tuned.machine(torch.device("cpu")) is None


def test_lies_beside_inductors_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("FX_FUSION_TUNED", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert tuned.location() == tmp_path / "fx_fusion" / "tuned.json"
    monkeypatch.setenv("FX_FUSION_TUNED", "elsewhere.json")
    assert str(tuned.location()) == "elsewhere.json"


# --- files that cannot be used ------------------------------------------------------------------------------------


def content_of(machine):
    return to_json(Tuned(machine, "2.13.0", "2026-11-23", {SHAPE: TIMINGS}))


BAD = {
    "malformed": ("{", "Expecting property name"),
    "bytes": (b"\xff\xfe\x00", "codec can't decode"),
    "another version": (to_json(TUNED).replace(f'"version": {VERSION}', '"version": 9'), "its format has version 9"),
    "another device": (
        content_of(HERE._replace(device="AMD Instinct MI325X")),
        "it was measured on device 'AMD Instinct MI325X' (here: 'AMD Instinct MI300X')",
    ),
    "another compiler": (content_of(HERE._replace(triton="3.5.0")), "triton '3.5.0' (here: '3.6.0')"),
    "no aiter then": (content_of(HERE._replace(aiter=None)), "aiter None (here: '0.1.5')"),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_warning(name, path, warnings):
    content, reason = BAD[name]
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(3):
        assert planned(100) == choose_tile(100, 32, 8, 128)
    assert len(warnings) == 1
    for part in (str(path), reason, "python -m fx_fusion tune"):
        assert part in warnings[0]


def test_no_file_in_the_usual_place_is_no_warning(path, warnings, monkeypatch):
    monkeypatch.delenv("FX_FUSION_TUNED")
    assert planned(100) == choose_tile(100, 32, 8, 128)
    assert not warnings


def test_a_file_that_changed_is_read_again(path):
    assert planned(64) == Tile(4, 2, 2)
    path.write_text(to_json(Tuned(HERE, "2.13.0", "2026-11-24", {SHAPE: (timing(64, Tile(16, 4), triton=1.0),)})))
    assert planned(64) == Tile(16, 4)


# --- writing ------------------------------------------------------------------------------------------------------


def test_save_keeps_what_was_measured_before(path):
    newer = Tuned(HERE, "2.13.0", "2026-11-24", {SHAPE: (timing(1, Tile(1, 1), triton=1.0),)})
    tuned.save(path, newer)
    assert from_json(path.read_text()).shapes == {SHAPE: (*newer.shapes[SHAPE], *TIMINGS)}
    assert [each.name for each in path.parent.iterdir() if "partial" in each.name] == []


def test_save_replaces_what_cannot_be_read(tmp_path):
    path = tmp_path / "new folder" / "tuned.json"
    tuned.save(path, TUNED)
    path.write_text("{")
    tuned.save(path, TUNED)
    assert from_json(path.read_text()) == TUNED


# --- candidates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("wave_size", [32, 64])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_every_candidate_can_be_launched_and_kept(head_dim, wave_size, num_kv_heads):
    found = candidates(num_kv_heads, head_dim, wave_size)
    assert len(found) == len(set(found)) >= 8
    content = Tuned(HERE, "", "", {SHAPE: tuple(timing(i + 1, tile, triton=1.0) for i, tile in enumerate(found))})
    assert from_json(to_json(content)) == content
    for tile in found:
        assert tile_from_json(json.loads(json.dumps(tile_to_json(tile)))) == tile
        assert 4 <= tile.tokens * head_dim // (tile.num_warps * wave_size) <= 16

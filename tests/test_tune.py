"""`python -m fx_fusion tune`, with times that the test makes up."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch

from fx_fusion.__main__ import main
from fx_fusion.cli import terminal, tune
from fx_fusion.kernels.measure import tuned, tuning
from fx_fusion.kernels.measure.bench import Refused
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Timing, from_json
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, choose_tile

HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", "0.1.5")
SHAPE = Shape(32, 8, 128, 128, "bfloat16")
CPU = torch.device("cpu")


class Times:
    """Tiles take `slow` microseconds but for those in `fast`; None is a refusal."""

    def __init__(self, fast=(), slow=10.0, aiter=None):
        self.fast, self.slow, self.aiter_us = dict(fast), slow, aiter
        self.asked = []

    def triton(self, tile):
        self.asked.append(tile)
        time = self.fast.get(tile, self.slow)
        if time is None:
            raise Refused("it spills")
        return time

    def aiter(self):
        if self.aiter_us is None:
            raise Refused("aiter is not installed")
        return self.aiter_us


# --- which tile -----------------------------------------------------------------------------------------------------

RULE, OTHER = Tile(4, 4), Tile(2, 1)


def measured(times, tiles=(RULE, OTHER)):
    return tuning.measure(SHAPE, 8, tiles, times)


def test_the_fastest_tile_is_kept():
    found = measured(Times({OTHER: 4.0}, aiter=3.0))
    assert found.best == Timing(8, OTHER, 4.0, 3.0)
    assert (found.rule, found.rule_us, found.gain) == (RULE, 10.0, 2.5)
    assert found.refusals == ()


def test_noise_does_not_replace_the_rule():
    assert measured(Times({OTHER: 9.9})).best == Timing(8, RULE, 10.0, None)


def test_a_tile_that_is_refused_is_left_out_and_named():
    found = measured(Times({RULE: None}, aiter=11.0))
    assert found.best == Timing(8, OTHER, 10.0, 11.0)
    assert (found.rule_us, found.gain) == (None, None)
    assert found.refusals == ("tile 4 x 1, 4 warps: it spills",)


def test_all_tiles_refused():
    with pytest.raises(Refused, match="tile 4 x 1, 4 warps: it spills\ntile 2 x 1, 1 warp: it spills"):
        measured(Times(slow=None))


def test_the_rules_tile_is_measured_first():
    for wave_size in (32, 64):
        for count, tiles in tuning.tiles_to_measure(SHAPE, [1, 512, 8192], wave_size, quick=False).items():
            assert tiles[0] == choose_tile(count, 32, 8, 128, wave_size)
            assert set(tiles) >= set(candidates(8, 128, wave_size))
            assert len(set(tiles)) == len(tiles)


def test_quick_measures_the_rules_tiles_only():
    counts = [1, 64, 512, 8192]
    tiles = tuning.tiles_to_measure(SHAPE, counts, 32, quick=True)
    rule = {choose_tile(count, 32, 8, 128) for count in counts}
    assert all(set(each) == rule for each in tiles.values())


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    monkeypatch.setattr(tune, "wave_size_of", lambda device: 64)


def run(*arguments, times=None):
    """The exit code of `tune` with `times` for every count."""
    commands = argparse.ArgumentParser().add_subparsers()
    tune.add_to(commands)
    chosen = commands.choices["tune"].parse_args(arguments)
    return chosen.run(chosen, lambda shape, count, device: times or Times())


def test_writes_a_file_that_the_pass_reads(gpu, tmp_path, capsys, monkeypatch):
    path = tmp_path / "gpu.json"
    times = Times({OTHER: 4.0}, aiter=3.0)
    assert run("--heads", "32/8/128", "16/2/256/64", "--tokens", "64,1", "--output", str(path), times=times) == 0
    content = from_json(path.read_text())
    assert content.machine == HERE
    assert content.torch == torch.__version__
    gated = Shape(16, 2, 256, 64, "bfloat16")
    assert {shape: [each.num_tokens for each in found] for shape, found in content.shapes.items()} == {
        SHAPE: [1, 64], gated: [1, 64],
    }  # fmt: skip
    assert content.at(SHAPE, 100).aiter_us == 3.0
    printed = capsys.readouterr()
    assert f"export FX_FUSION_TUNED={path}" in printed.out
    assert "token counts" in printed.out
    assert "32/8/128 bfloat16, 64 tokens: " in printed.err
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    assert tuned.timing(SHAPE, 100, CPU) == content.at(SHAPE, 100)


def test_writes_where_the_pass_looks(gpu, capsys):
    assert run("--tokens", "1", "--quick", "--dtype", "float16") == 0
    assert tuned.timing(SHAPE._replace(dtype="float16"), 1, CPU) is not None
    assert "export" not in capsys.readouterr().out


def test_says_what_was_not_timed_once(gpu, capsys):
    assert run("--tokens", "1,2,3") == 0
    assert capsys.readouterr().out.count("not timed: aiter: aiter is not installed") == 1


def test_fails_where_no_tile_can_be_timed(gpu, capsys):
    assert run("--tokens", "1", times=Times(slow=None)) == 1
    assert "no tile could be timed" in capsys.readouterr().err
    assert not tuned.location().exists()


def test_fails_where_the_file_cannot_be_written(gpu, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--tokens", "1", "--output", str(tmp_path / "file" / "gpu.json")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(tuned, "machine", lambda device: None)
    assert run() == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err


def test_needs_triton(monkeypatch, capsys):
    monkeypatch.setattr(tuned, "machine", lambda device: HERE._replace(triton=None))
    assert run() == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_needs_a_place(gpu, monkeypatch, capsys):
    monkeypatch.setenv("FX_FUSION_TUNED", "off")
    assert run() == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["--heads", "32/8"], ["--heads", "32/5/128"], ["--heads", "32/8/128/256"], ["--heads", "32/0/128"],
     ["--tokens", "1,x"], ["--tokens", ""], ["--dtype", "int8"]],
    ids=" ".join,
)  # fmt: skip
def test_refuses_what_it_cannot_read(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments] if arguments else [])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_as_a_process():
    done = subprocess.run([sys.executable, "-m", "fx_fusion", "tune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fx_fusion tune: PyTorch finds no CUDA or ROCm device here")


def test_a_table_without_rich():
    text = terminal.plain_table("times", ("tokens", "us"), [("1", "2.50"), ("16384", "3")])
    assert text == "times\ntokens  us\n1       2.50\n16384   3"


@pytest.mark.gpu
def test_on_a_device(tmp_path, monkeypatch):
    """What is written there is what a launch there takes."""
    path = tmp_path / "gpu.json"
    assert main(["tune", "--tokens", "1,64", "--quick", "--output", str(path)]) == 0
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    gpu = torch.device("cuda")
    for count in (1, 64):
        assert tuned.timing(SHAPE, count, gpu) == from_json(path.read_text()).at(SHAPE, count) is not None

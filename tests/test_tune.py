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
from fx_fusion.kernels.measure.bench import Bench, Refused
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Timing, from_json
from fx_fusion.kernels.measure.tuning import Best
from fx_fusion.kernels.qk_norm_rope_cache.aiter.implementation import Aiter
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton import launch as triton_launch
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, choose_tile, tile_to_json
from fx_fusion.kernels.target import Target

HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", "0.1.5")
SHAPE = Shape(32, 8, 128, 128, "bfloat16")
CPU = torch.device("cpu")
RULE, OTHER = Tile(4, 4), Tile(2, 1)


class Times:
    """Tiles take `slow` microseconds but for those in `fast`; None is a refusal."""

    kernels = (triton.Triton(), Aiter())

    def __init__(self, fast=(), slow=10.0, aiter=None):
        self.fast, self.slow, self.aiter_us = dict(fast), slow, aiter

    def settings(self, kernel):
        return [RULE, OTHER] if kernel.name == "triton" else [None]

    def time(self, kernel, setting):
        if kernel.name == "aiter":
            assert setting is None
            return self._us(self.aiter_us, "aiter is not installed")
        return self._us(self.fast.get(setting, self.slow), "it spills")

    def _us(self, time, refusal):
        if time is None:
            raise Refused(refusal)
        return time


# --- which setting --------------------------------------------------------------------------------------------------


def measured(times):
    return tuning.measure(SHAPE, 8, tuning.all_settings(times), times)


def of_triton(tile):
    return {"triton": tile_to_json(tile)}


def test_the_fastest_tile_is_kept():
    found = measured(Times({OTHER: 4.0}, aiter=3.0))
    assert found.timing == Timing(8, {"triton": 4.0, "aiter": 3.0}, of_triton(OTHER))
    assert found.best == {"triton": Best(RULE, 10.0, OTHER, 4.0), "aiter": Best(None, 3.0, None, 3.0)}
    assert found.best["triton"].gain == 2.5
    assert found.fastest == "aiter"
    assert found.refusals == ()


def test_noise_does_not_replace_the_rule():
    found = measured(Times({OTHER: 9.9}))
    assert found.timing == Timing(8, {"triton": 10.0}, of_triton(RULE))
    assert found.fastest == "triton"


def test_a_tile_that_is_refused_is_left_out_and_named():
    found = measured(Times({RULE: None}, aiter=11.0))
    assert found.timing == Timing(8, {"triton": 10.0, "aiter": 11.0}, of_triton(OTHER))
    assert (found.best["triton"].rule_us, found.best["triton"].gain) == (None, None)
    assert found.refusals == ("triton 4 x 1, 4 warps: it spills",)


def test_a_kernel_all_of_whose_tiles_are_refused_is_left_out():
    found = measured(Times(slow=None, aiter=11.0))
    assert found.timing == Timing(8, {"aiter": 11.0}, {})
    assert found.refusals == ("triton 4 x 1, 4 warps: it spills", "triton 2 x 1, 1 warp: it spills")


def test_everything_refused():
    refusals = "triton 4 x 1, 4 warps: it spills\ntriton 2 x 1, 1 warp: it spills\naiter: aiter is not installed"
    with pytest.raises(Refused, match=refusals):
        measured(Times(slow=None))


def every_setting(counts):
    return {count: tuning.all_settings(Bench(SHAPE, count, CPU)) for count in counts}


@pytest.mark.parametrize("wave_size", [32, 64])
def test_the_rules_tile_is_measured_first(wave_size, monkeypatch):
    for module in (triton, triton_launch):
        monkeypatch.setattr(module, "wave_size_of", lambda device: wave_size)
    every = every_setting([1, 512])
    assert tuning.settings_to_measure(every, quick=False) == every
    for count, settings in every.items():
        tiles = settings["triton"]
        assert tiles[0] == choose_tile(count, 32, 8, 128, wave_size)
        assert set(tiles) >= set(candidates(8, 128, wave_size))
        assert len(set(tiles)) == len(tiles)
        assert settings["aiter"] == [None]


def test_quick_measures_the_rules_tiles_only():
    counts = [1, 64, 512]
    quick = tuning.settings_to_measure(every_setting(counts), quick=True)
    rule = {count: choose_tile(count, 32, 8, 128) for count in counts}
    for count, settings in quick.items():
        assert settings["triton"][0] == rule[count]
        assert set(settings["triton"]) == set(rule.values())
        assert len(settings["triton"]) == len(set(rule.values())) > 1
        assert settings["aiter"] == [None]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)


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
    assert content.at(SHAPE, 100) == Timing(64, {"triton": 4.0, "aiter": 3.0}, of_triton(OTHER))
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


def test_fails_where_no_kernel_can_be_timed(gpu, capsys):
    assert run("--tokens", "1", times=Times(slow=None)) == 1
    assert "no kernel could be timed" in capsys.readouterr().err
    assert not tuned.location().exists()


def test_fails_where_the_file_cannot_be_written(gpu, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--tokens", "1", "--output", str(tmp_path / "file" / "gpu.json")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(tuned, "machine", lambda device: None)
    assert run() == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err


class WithoutTriton(Times):
    """Only what does not run is said of Triton, as on a machine that lacks it."""

    def time(self, kernel, setting):
        reason = kernel.unavailable(Target("hip")) if kernel.name == "triton" else None
        return super().time(kernel, setting) if reason is None else self._us(None, reason)


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(tuned, "machine", lambda device: HERE._replace(triton=None))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_needs_triton_or_another_kernel(no_triton, capsys):
    assert run("--tokens", "1", times=WithoutTriton()) == 1
    assert "the package triton is not installed" in capsys.readouterr().err
    assert not tuned.location().exists()


def test_without_triton_the_others_are_measured(no_triton, capsys):
    assert run("--tokens", "1", times=WithoutTriton(aiter=3.0)) == 0
    assert from_json(tuned.location().read_text()).at(SHAPE, 1) == Timing(1, {"aiter": 3.0}, {})
    assert "the package triton is not installed" in capsys.readouterr().out


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


@pytest.mark.slow
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

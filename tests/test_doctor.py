"""`python -m fx_fusion doctor`: each thing that may be in the way, and its remedy."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from fx_fusion.cli import doctor
from fx_fusion.cli import doctor_checks as checks
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import Machine
from fx_fusion.kernels.qk_norm_rope_cache import reference

CPU = torch.device("cpu")
HERE = Machine("AMD Instinct MI300X", "gfx942", "3.6.0", None)


def run(*arguments):
    commands = argparse.ArgumentParser().add_subparsers()
    doctor.add_to(commands)
    chosen = commands.choices["doctor"].parse_args(arguments)
    return chosen.run(chosen)


def found(name):
    (check,) = [check for check in checks.check_all() if check.name == name]
    return check


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """No GPU, no driver, nothing hidden: whatever the machine of the tests has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "AMD", tmp_path / "kfd")
    monkeypatch.setattr(checks, "NVIDIA", tmp_path / "nvidiactl")
    for name in checks._HIDING:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_a_gpu_models_run_unfused(no_gpu, capsys):
    assert run() == 1
    printed = capsys.readouterr().out
    assert "no fast kernel runs here" in printed.lower()
    assert "explain --target" in printed


def test_the_reference_runs_everywhere(no_gpu, capsys):
    assert run("--kernel", "reference") == 0
    assert run("--kernel", "triton") == 1
    assert "'triton' does not run here" in capsys.readouterr().out


def test_json_is_for_programs(no_gpu, capsys):
    code = run("--kernel", "reference", "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] == (code == 0)
    assert {check["name"] for check in content["checks"]} >= {"torch", "device", "Triton", "aiter", "report files"}
    kernels = {kernel["name"]: kernel for kernel in content["kernels"]}
    assert kernels["reference"]["runs"] and kernels["reference"]["tried"]
    assert kernels["aiter"]["runs"] or kernels["aiter"]["reason"]


@pytest.mark.parametrize(
    ("device", "text", "remedy"),
    [("AMD", "an AMD GPU that this CPU build", "ROCm build"), ("NVIDIA", "an NVIDIA GPU that this CPU", "CUDA build")],
)
def test_a_gpu_that_this_torch_cannot_use(no_gpu, monkeypatch, device, text, remedy):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    getattr(checks, device).touch()
    check = found("device")
    assert check.state == "problem" and text in check.found and remedy in check.remedy
    assert run("--kernel", "reference") == 1, "a problem is one whatever kernel is asked for"


def test_a_gpu_that_may_not_be_opened(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    checks.AMD.touch()
    assert "render,video" in found("device").remedy


def test_a_hidden_gpu(no_gpu, monkeypatch):
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    check = found("device")
    assert check.state == "problem" and check.remedy == "unset HIP_VISIBLE_DEVICES"


def test_the_unrelated_aiter_is_named(monkeypatch):
    from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter

    monkeypatch.setattr(aiter.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(aiter, "_is_unrelated", lambda: True)
    check = found("aiter")
    assert check.state == "note" and "unrelated asyncio helper" in check.found and "ROCm/aiter" in check.remedy


def test_no_triton_on_a_gpu_is_a_problem(monkeypatch):
    monkeypatch.setattr(checks, "triton_version", lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        assert next(checks._triton()).state == "problem"


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert found("C compiler").state == "problem"


def test_reports_need_a_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(checks, "cache_folder", lambda: tmp_path / "file" / "fx_fusion")
    check = found("report files")
    assert check.state == "problem" and "TORCHINDUCTOR_CACHE_DIR" in check.remedy


def test_measurements_of_another_machine(monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    monkeypatch.setenv("FX_FUSION_TUNED", str(path))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    assert found("measurements").found.startswith("none")
    path.write_text("{}")
    check = found("measurements")
    assert "is ignored" in check.found and "tune" in check.remedy


def test_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("FX_FUSION_KERNEL", "fast")
    assert found("FX_FUSION_KERNEL").state == "problem"
    monkeypatch.setenv("FX_FUSION_KERNEL", "reference")
    assert found("FX_FUSION_KERNEL").state == "note"
    monkeypatch.setenv("FX_FUSION_DISABLE", "1")
    assert found("FX_FUSION_DISABLE").state == "problem"


def test_a_check_that_raises_is_a_problem(monkeypatch):
    def broken():
        raise OSError("disk on fire")

    monkeypatch.setattr(checks, "triton_version", broken)
    (check,) = [check for check in checks.check_all() if check.state == "problem" and "fire" in check.found]
    assert check.name == "triton"


def test_a_kernel_that_disagrees_does_not_run(monkeypatch):
    def wrong(self, call, setting=None):
        q_out, k_out = reference.qk_norm_rope_cache(call)
        return q_out * 1.1, k_out

    monkeypatch.setattr(reference.Reference, "run", wrong)
    (check,) = [check for check in checks.check_kernels(CPU) if check.name == "reference"]
    assert not check.runs and check.tried and "q_out differs" in check.reason


@pytest.mark.gpu
def test_triton_runs_on_this_gpu(capsys):
    assert run("--kernel", "triton") == 0, capsys.readouterr().out

"""What this machine can run: one check a fact, each with what was found, and the remedy where that is in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fx_fusion import config
from fx_fusion.cache_folder import cache_folder
from fx_fusion.config import OptionError
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.operation import Implementation
from fx_fusion.kernels.qk_norm_rope_cache.agreement import compare
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call
from fx_fusion.kernels.target import Target
from fx_fusion.kernels.versions import aiter_version, triton_version

State = Literal["ok", "note", "problem"]

#: One layer's call of a model that is common enough for every kernel to serve it.
TYPICAL = Shape(32, 8, 128, 128, "bfloat16")
#: What the drivers of a GPU leave to be opened.
AMD, NVIDIA = Path("/dev/kfd"), Path("/dev/nvidiactl")
INSTALL = "install torch's {} build: https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Check:
    """One fact.

    Attributes:
        state: ``ok``, ``note`` (works, but one should know) or ``problem`` (nothing fuses before this is mended).
        remedy: what to do, unless the state is ``ok``.
    """

    name: str
    found: str
    state: State = "ok"
    remedy: str | None = None


@dataclass(frozen=True)
class KernelCheck:
    """Can `name` run on this machine's device? `reason` says why not, `remedy` what to do about it, if anything."""

    name: str
    runs: bool
    reason: str | None = None
    remedy: str | None = None
    tried: bool = False
    """It was run here, beside the reference, rather than only looked for."""
    fast: bool = True
    """``auto`` may choose it."""


# --- the machine --------------------------------------------------------------------------------------------------


def check_all() -> list[Check]:
    """Every check of the environment, in the order in which one would look."""
    checks = (
        _python, _torch, _device, _triton, _aiter, _compiler, _transformers, _backend, _reports, _measurements,
        _environment,
    )  # fmt: skip
    return [found for check in checks for found in _safely(check)]


def _safely(check: Callable[[], Iterator[Check]]) -> list[Check]:
    """A machine that is broken enough may break a check: the doctor reports that too."""
    try:
        return list(check())
    except Exception as error:
        name = check.__name__.strip("_")
        return [Check(name, f"{type(error).__name__}: {error}", "problem", f"mend what raises this ({name})")]


def _python() -> Iterator[Check]:
    yield Check("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Check]:
    yield Check("torch", f"{torch.__version__}, {_build()}")


def _build() -> str:
    if torch.version.hip:
        return f"ROCm build (HIP {torch.version.hip})"
    return f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"


def _device() -> Iterator[Check]:
    if torch.cuda.is_available():
        here = tuned.machine(torch.device("cuda"))
        assert here is not None
        count = torch.cuda.device_count()
        others = f", and {count - 1} more" if count > 1 else ""
        yield Check("device", f"{here.device} ({here.architecture}){others}")
        return
    yield Check("device", *_no_device())


def _no_device() -> tuple[str, State, str | None]:
    """What is in the way of a GPU: it may be there, and PyTorch unable to see it."""
    amd, nvidia = AMD, NVIDIA
    hiding = next((name for name in _HIDING if os.environ.get(name) in ("", "-1")), None)
    if hiding:
        return f"none: {hiding}={os.environ[hiding]!r} hides every GPU", "problem", f"unset {hiding}"
    if amd.exists() and not torch.version.hip:
        return f"an AMD GPU that this {_build()} of torch cannot use", "problem", INSTALL.format("ROCm")
    if amd.exists() and not os.access(amd, os.R_OK | os.W_OK):
        remedy = "add your user to the groups that own it: sudo usermod -aG render,video $USER"
        return f"an AMD GPU, but {amd} may not be opened", "problem", remedy
    if nvidia.exists() and not torch.version.cuda:
        return f"an NVIDIA GPU that this {_build()} of torch cannot use", "problem", INSTALL.format("CUDA")
    if amd.exists() or nvidia.exists():
        return "a GPU that PyTorch cannot open", "problem", "see what python -c 'import torch; torch.cuda.init()' says"
    remedy = "to see what another device would do: python -m fx_fusion explain --target gfx942"
    return "no GPU: models are recognised and proved, and run unfused", "note", remedy


_HIDING = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


# --- packages -----------------------------------------------------------------------------------------------------


def _triton() -> Iterator[Check]:
    version = triton_version()
    if version is not None:
        yield Check("Triton", version)
        return
    gpu = torch.cuda.is_available()
    remedy = "install the Triton that belongs to this torch"
    yield Check("Triton", "not installed", "problem" if gpu else "note", remedy)


def _aiter() -> Iterator[Check]:
    reason = aiter.installed()
    if reason is None:
        yield Check("aiter", f"AMD's, {aiter_version()}")
        return
    # On anything but AMD its absence is no news.
    found, _, remedy = reason.partition("; ")
    unrelated = importlib.util.find_spec("aiter") is not None
    wanted = bool(torch.version.hip) or unrelated
    yield Check("aiter", found, "note" if wanted else "ok", remedy if wanted else None)


def _compiler() -> Iterator[Check]:
    """Triton builds its launchers, and Inductor its CPU code, with it."""
    named = os.environ.get("CXX" if not torch.cuda.is_available() else "CC")
    found = next((each for each in (named, "g++", "clang++", "gcc", "clang") if each and shutil.which(each)), None)
    if found:
        yield Check("C compiler", found)
    else:
        yield Check("C compiler", "none on the PATH", "problem", "install one (apt-get install g++), or set CC and CXX")


def _transformers() -> Iterator[Check]:
    try:
        yield Check("transformers", importlib.metadata.version("transformers"))
    except importlib.metadata.PackageNotFoundError:
        remedy = "needed by `explain --transformers` only: pip install 'transformers>=5.17'"
        yield Check("transformers", "not installed", "note", remedy)


# --- ours ---------------------------------------------------------------------------------------------------------


def _backend() -> Iterator[Check]:
    from fx_fusion.version import __version__

    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fx_fusion")
    if entries:
        yield Check("fx_fusion", f'{__version__}, backend="fx_fusion" known to torch.compile')
    else:
        remedy = "works after `import fx_fusion`; without the import, install the package: pip install fx_fusion"
        yield Check("fx_fusion", f"{__version__}, imported from {Path(__file__).parent}", "note", remedy)


def _reports() -> Iterator[Check]:
    """Reports lie beside Inductor's cache."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"doctor.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to a directory that may be written to"
        yield Check("report files", f"{folder}: {error}", "problem", remedy)
    else:
        yield Check("report files", str(folder))


def _measurements() -> Iterator[Check]:
    path, here = tuned.location(), tuned.machine(torch.device("cuda"))
    if path is None:
        yield Check("measurements", f"off ({tuned.VARIABLE})")
    elif here is None:
        yield Check("measurements", "none: no device to measure on")
    elif not path.exists():
        remedy = "python -m fx_fusion tune: measures what `auto` and the tiles then go by"
        yield Check("measurements", f"none ({path}): built-in rules are used", "note", remedy)
    else:
        reason = tuned.why_ignored(path, here)
        used = Check("measurements", str(path))
        ignored = Check("measurements", f"{path} is ignored: {reason}", "note", "python -m fx_fusion tune")
        yield used if reason is None else ignored


def _environment() -> Iterator[Check]:
    for name, read, meaning in (
        ("FX_FUSION_KERNEL", config.kernel_from_environment, "the kernel where no option names one"),
        ("FX_FUSION_FUEL", config.fuel, "rewriting stops after so many, and compile caches are off"),
    ):
        if name not in os.environ:
            continue
        try:
            yield Check(name, f"{read()}: {meaning}", "note", f"unset {name}, unless that is what you want")
        except OptionError as error:
            yield Check(name, str(error), "problem", f"correct or unset {name}")
    if config.disabled():
        yield Check("FX_FUSION_DISABLE", "set: nothing is recognised, nothing rewritten", "problem", "unset it")


# --- kernels ------------------------------------------------------------------------------------------------------


def check_kernels(device: torch.device) -> list[KernelCheck]:
    """Every kernel of the built-in operation, run on `device` beside the reference where it can be."""
    return [_check_kernel(kernel, device) for kernel in OPERATION]


def _check_kernel(kernel: Implementation[Any], device: torch.device) -> KernelCheck:
    target, call = Target.of(device), typical_call(TYPICAL, 8, device)
    reason = kernel.unavailable(target)
    if reason is not None:
        return KernelCheck(kernel.name, runs=False, reason=reason, remedy=kernel.remedy(target), fast=kernel.fast)
    reason = kernel.objects(call, target) or _disagreement(kernel, call)
    if reason is None:
        return KernelCheck(kernel.name, runs=True, tried=True, fast=kernel.fast)
    remedy = "report it with the output of `doctor --json`; until then, another kernel serves"
    return KernelCheck(kernel.name, runs=False, reason=reason, remedy=remedy, tried=True, fast=kernel.fast)


def _disagreement(kernel: Implementation[Any], call: Call[torch.Tensor]) -> str | None:
    """What is wrong with the kernel's results; None if they agree with the reference."""
    try:
        with torch.no_grad():
            differences = compare(kernel.trial, call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = [str(difference) for difference in differences if not difference.error <= difference.allowed]
    return "; ".join(wrong) or None

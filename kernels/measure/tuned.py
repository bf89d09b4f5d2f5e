"""What was measured on this machine's GPU, if somebody did: see docs/tuning.md.

A file that cannot be used is never an error: calls then run as if there were none, and one warning says why.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from pathlib import Path

import torch

from fx_fusion.cache_folder import cache_folder
from fx_fusion.kernels.measure.tuned_file import Machine, Shape, Timing, Tuned, from_json, to_json
from fx_fusion.kernels.operation import OPERATIONS
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.kernels.versions import aiter_version, triton_version

VARIABLE = "FX_FUSION_TUNED"
OFF = "off"

log = logging.getLogger(__name__)


def location() -> Path | None:
    """``FX_FUSION_TUNED``, else ``tuned.json`` in our folder of Inductor's cache; None if it is ``off``."""
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    return Path(named) if named else cache_folder() / "tuned.json"


def machine(device: torch.device) -> Machine | None:
    """What is measured on `device`; None for a device that nothing is measured on, and for a fake one."""
    if device.type != "cuda" or not _gpu_is_there():
        return None
    return _machine(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_is_there() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = str(properties.gcnArchName).split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Machine(properties.name, architecture, triton_version(), aiter_version())


def timing(shape: Shape, num_tokens: Size | None, device: torch.device) -> Timing | None:
    """What was measured for `num_tokens` tokens of `shape` on `device`: see :meth:`Tuned.at`.

    A symbolic number of tokens (None, or a SymInt) has no timing: one graph serves all of them.
    """
    if not isinstance(num_tokens, int):
        return None
    here, path = machine(device), location()
    if here is None or path is None:
        return None
    found = _load(path, _stamp(path), here)
    return found.at(shape, num_tokens) if found else None


def fingerprint() -> str:
    """Changes with the content of the file, whether it can be used here or not."""
    path = location()
    if path is None:
        return OFF
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


def save(path: Path, measured: Tuned) -> Tuned:
    """Write `measured` to `path`, at once or not at all, and what the file holds of the same machine besides.

    Returns:
        What the file holds now.

    Raises:
        OSError: it cannot be written.
    """
    content = _updated(path, measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(to_json(content))
    partial.replace(path)
    return content


def _updated(path: Path, measured: Tuned) -> Tuned:
    try:
        return from_json(path.read_text()).updated(measured)
    except (OSError, ValueError):
        return measured


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes when the file does; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def _load(path: Path, stamp: tuple[int, int] | None, here: Machine) -> Tuned | None:
    """Read once for each stamp, hence warned of once."""
    if stamp is None and VARIABLE not in os.environ:
        return None
    found, reason = _read(path, here)
    if reason is None:
        return found
    log.warning(
        "fx_fusion: the file of measurements %s is ignored, and built-in rules are used: %s. Run `python -m fx_fusion "
        "tune` on this machine to write a new one, or set %s to another file or to '%s'",
        path, reason, VARIABLE, OFF,
    )  # fmt: skip
    return None


def why_ignored(path: Path, here: Machine) -> str | None:
    """What is wrong with the file, for the device that is `here`; None if it is used."""
    return _read(path, here)[1]


def _read(path: Path, here: Machine) -> tuple[Tuned | None, str | None]:
    try:
        found = from_json(path.read_text())
        _check_settings(found)
    except (OSError, ValueError) as error:
        return None, str(error)
    return found, _difference(found.machine, here)


def _check_settings(found: Tuned) -> None:
    """Raises ValueError for a setting that a kernel of this name does not have."""
    kernels = {each.name: each for operation in OPERATIONS.values() for each in operation}
    for timings in found.shapes.values():
        for name, setting in ((name, each) for timing in timings for name, each in timing.settings.items()):
            if name in kernels:
                kernels[name].setting_from_json(setting)


def _difference(measured: Machine, here: Machine) -> str | None:
    names = [name for name in Machine._fields if getattr(measured, name) != getattr(here, name)]
    if not names:
        return None
    return "it was measured on " + ", ".join(
        f"{name} {getattr(measured, name)!r} (here: {getattr(here, name)!r})" for name in names
    )

"""Run a compiled launch in the simulator, on the very tensors of the launch."""

from __future__ import annotations

from typing import Any

from launches.checks import storage_bytes
from launches.problem import Prepared
from torch import Tensor

from amdgcn.aot import Binary
from amdgcn.simulator import Arena, Result, run


def execute(prepared: Prepared, binary: Binary, **options: Any) -> Result:
    """Storages become buffers of the simulated memory, so that views keep their strides; outputs are written in place.

    `binary` was compiled for the arguments of `prepared`. See :func:`amdgcn.simulator.run` for the options.
    """
    arena = Arena()
    addresses: dict[int, int] = {}
    arguments = [_argument(value, arena, addresses) for value in binary.arguments.values()]
    result = run(
        binary.assembly,
        arguments,
        arena,
        grid=prepared.grid,
        num_warps=binary.num_warps,
        lds_bytes=binary.lds_bytes,
        **options,
    )
    arena.copy_back()
    return result


def _argument(value: Any, arena: Arena, addresses: dict[int, int]) -> int:
    if not isinstance(value, Tensor):
        assert isinstance(value, int)
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in addresses:
        addresses[storage.data_ptr()] = arena.add(storage_bytes(value))
    address = addresses[storage.data_ptr()] + value.data_ptr() - storage.data_ptr()
    # The compiler was told whether 16 divides the address.
    assert address % 16 == value.data_ptr() % 16
    return address

"""Take the tensors of a launch to another device, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from launches.problem import Prepared


def on(prepared: Prepared, device: str) -> Prepared:
    """The same views of copies of the same storages, there."""
    storages: dict[int, Any] = {}

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = bytes_of(tensor).to(device, copy=True).untyped_storage()
        there = torch.empty(0, dtype=tensor.dtype, device=device)
        return there.set_(storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    return replace(prepared, tensors={name: copy(tensor) for name, tensor in prepared.tensors.items()})


def bring_back(there: Prepared, prepared: Prepared) -> None:
    """Overwrite the storages of `prepared` with those that a launch left on the device."""
    for name, tensor in prepared.tensors.items():
        if tensor is not None:
            bytes_of(tensor).copy_(bytes_of(there.tensors[name]))


def bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())

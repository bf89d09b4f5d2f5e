"""Tensors that look like floats and hold elements of a finite field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.graph.torch_compat import NO_TORCH_FUNCTION
from fx_fusion.proof.field.arithmetic import Elements
from fx_fusion.proof.field.verdict import NoMeaning


class FieldTensor(Tensor):
    """Looks like a float64 tensor, or with two parts like a complex128 one. Only the mode `Over` computes with it."""

    __torch_function__ = NO_TORCH_FUNCTION  # type: ignore[assignment]
    parts: tuple[Elements, ...]

    @staticmethod
    def __new__(cls, *parts: Elements) -> FieldTensor:
        like = parts[0].residues[0]
        dtype = torch.float64 if len(parts) == 1 else torch.complex128
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=dtype)  # type: ignore[return-value]

    def __init__(self, *parts: Elements) -> None:
        self.parts = parts

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"FieldTensor({', '.join(str(part.residues[0]) for part in self.parts)})"

    @property
    def bytes_held(self) -> int:
        """Of what this tensor alone holds: nothing if it is a view."""
        held = [residues for part in self.parts for residues in part.residues]
        return sum(residues.untyped_storage().nbytes() for residues in held if not residues._is_view())

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise NoMeaning(f"{func} outside of a field")

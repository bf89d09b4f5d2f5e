"""Fake values of a graph that is inserted again and again, made from those that it was traced with.

To run each operation on fake tensors takes longer than everything else that a further layer costs. Shapes, strides and
dtypes are known from the first time; what aliases what is too. Only the memory must be new: two layers' results that
shared it would be taken for views of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph import operations
from fx_fusion.graph.torch_compat import FakeTensor, in_kernel_invocation_manager, pytree, storage_key


class FakeCopies:
    """New values beside old ones: those of one insertion."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[FakeTensor, FakeTensor]] = {}

    def know(self, old: Any, new: Any) -> None:
        """`new` stands where `old` stood."""
        if isinstance(old, FakeTensor) and isinstance(new, FakeTensor):
            self._of.setdefault(_storage(old), (old, new))

    def value(self, node: Node, run: Callable[[], Any]) -> Any:
        """The value of a copy of `node`: made like its own, or by `run` where that cannot be told."""
        old = node.meta.get("val")
        leaves = [leaf for leaf in pytree.tree_leaves(old) if leaf is not None]
        is_plain = all(isinstance(leaf, FakeTensor) and leaf.layout == torch.strided for leaf in leaves)
        views = node.target in operations.VIEW and not all(_storage(leaf) in self._of for leaf in leaves)
        if not leaves or not is_plain or views:
            new = run()
            for a, b in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=False):
                self.know(a, b)
            return new
        return pytree.tree_map(self._copied, old)

    def _copied(self, old: FakeTensor | None) -> FakeTensor | None:
        if old is None:
            return None
        known = self._of.get(_storage(old))
        if known is None:
            like = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="meta")
            new = FakeTensor(old.fake_mode, like, old.device)
            self.know(old, new)
            return new
        first, base = known
        offset = base.storage_offset() + old.storage_offset() - first.storage_offset()
        if old.dtype != base.dtype:
            base = base.view(old.dtype)
        with in_kernel_invocation_manager(old.fake_mode):
            view = torch.as_strided(base, old.shape, old.stride(), offset)
        return FakeTensor(old.fake_mode, view, old.device)


def _storage(value: FakeTensor) -> int:
    return storage_key(value)

"""What a region is said to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Reference:
    """
    Attributes:
        run: (data [tokens, columns], leaves) to what the branch's result should be, unrounded: float32 for narrower
            data, else the data's dtype; its elements in rows of `lanes`, one a head of a token.
        columns: [heads, lanes], the columns of the data that a row is computed from.
        eps: what is added to the mean square of a row under the root; None if there is no root.
    """

    run: Callable[[Tensor, Mapping[Node, Tensor]], Tensor]
    columns: Tensor
    eps: float | None

    @property
    def lanes(self) -> int:
        return self.columns.shape[-1]

"""PyTorch over a finite field.

The region runs node by node and the reference as it is written, both under one mode: there is one interpreter, and
nothing is traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fx_fusion.graph.torch_compat import TorchDispatchMode
from fx_fusion.proof.field.arithmetic import FieldArithmetic
from fx_fusion.proof.field.operations import RULES, without_floats


class Over(TorchDispatchMode):
    """Within it, arithmetic on floats is `arithmetic` in a field. Integers and truth values stay what they are.

    An operation without a rule raises NoMeaning, and names itself.
    """

    def __init__(self, arithmetic: FieldArithmetic) -> None:
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func, without_floats)
        return rule(self.arithmetic, func, args, kwargs or {})

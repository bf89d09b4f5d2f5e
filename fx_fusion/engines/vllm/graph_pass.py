"""The pass as vLLM wants it: an InductorPass with a uuid, that can be copied and sent to workers."""

from __future__ import annotations

import secrets
from typing import Any

from torch.fx import Graph

from fx_fusion.config import Config
from fx_fusion.engines.vllm.names import InductorPass
from fx_fusion.engines.vllm.store import VLLM_STORE
from fx_fusion.engines.vllm.switch import Switch
from fx_fusion.fusion_pass import FusionPass
from fx_fusion.semantics.hidden_stores import declare_hidden_store


class VllmFusionPass(InductorPass):
    """For ``CompilationConfig(inductor_passes={"post_grad_custom_post_pass": VllmFusionPass("triton")})``.

    Args:
        kernel: as ``fx_fusion.kernel``.
        require: the engine does not start unless every layer is fused.
        before: a pass that runs first.
    """

    def __init__(self, kernel: str = "auto", *, require: bool = False, before: Any = None) -> None:
        self.switch = Switch(kernel, require)
        self._before = before
        self._pass = FusionPass(Config(kernel=kernel), before=before)
        self._unknown = secrets.token_hex(16)
        declare_hidden_store(VLLM_STORE)

    def __call__(self, graph: Graph) -> None:
        self._pass(graph)

    def uuid(self) -> str:
        """Of the configuration, the registered fusions, the sources and the versions.

        vLLM takes None for a value like any other: where something cannot be told, the uuid is one of its own.
        """
        known = self._pass.uuid()
        return InductorPass.hash_dict({"fx_fusion": self._unknown if known is None else repr(known)})

    def __deepcopy__(self, memo: dict[int, Any]) -> VllmFusionPass:
        return self

    def sent(self) -> tuple[Switch, Any, str]:
        """What a worker makes the same pass of, by :meth:`remade`."""
        return self.switch, self._before, self._unknown

    @staticmethod
    def remade(switch: Switch, before: Any, unknown: str) -> VllmFusionPass:
        made = VllmFusionPass(switch.kernel, require=switch.require, before=before)
        made._unknown = unknown
        return made

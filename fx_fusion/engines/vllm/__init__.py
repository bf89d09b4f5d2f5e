"""vLLM: norm, rotation and the store into the paged cache as one call, behind a layer's name.

``FX_FUSION_VLLM=auto`` in the environment of ``vllm serve`` switches it on; docs/vllm.md. Needs vLLM to be imported.
"""

from fx_fusion.engines.vllm.graph_pass import VllmFusionPass
from fx_fusion.engines.vllm.startup import install

__all__ = ["VllmFusionPass", "install"]

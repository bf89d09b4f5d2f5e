"""A pass for each kernel, by a name that vLLM's ``inductor_passes`` resolves: ``fx_fusion_vllm_pass.triton``."""

from fx_fusion.engines.vllm import VllmFusionPass, install

install()

auto = VllmFusionPass("auto")
triton = VllmFusionPass("triton")
aiter = VllmFusionPass("aiter")
reference = VllmFusionPass("reference")

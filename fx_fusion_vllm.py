"""fx_fusion in vLLM: the plug-in's entry point, and a pass of each kernel for vLLM's own configuration.

A module of its own: vLLM resolves the name of a pass at the top level of a module only, and loads every plug-in that
is installed, so nothing of fx_fusion is imported here unless it is asked for.

``FX_FUSION_VLLM=triton vllm serve MODEL``, or by configuration, where the module below is imported by name:
``vllm serve MODEL -cc '{"inductor_passes": {"post_grad_custom_post_pass": "fx_fusion_vllm_pass.triton"}}'``.
"""

import os


def load() -> None:
    """The entry point ``vllm.general_plugins``: does nothing unless ``FX_FUSION_VLLM`` is set."""
    if os.environ.get("FX_FUSION_VLLM"):
        from fx_fusion.engines.vllm import install

        install()

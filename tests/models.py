"""Small random Transformers models: the families that must fuse, every layer of them."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import StaticCache

VOCABULARY, LAYERS, MAX_LENGTH = 97, 2, 32

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e5,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
}


def qwen3():
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_COMMON))


def qwen3_moe():
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_COMMON, **_MOE))


def qwen3_vl_text():
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    return Qwen3VLTextModel(Qwen3VLTextConfig(**_COMMON, **_MROPE))


def qwen3_vl_moe_text():
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

    return Qwen3VLMoeTextModel(Qwen3VLMoeTextConfig(**_COMMON, **_MOE, **_MROPE))


def qwen3_omni_thinker_text():
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextModel

    return Qwen3OmniMoeThinkerTextModel(Qwen3OmniMoeTextConfig(**_COMMON, **_MOE, **_MROPE))


FAMILIES = {
    build.__name__: build for build in (qwen3, qwen3_moe, qwen3_vl_text, qwen3_vl_moe_text, qwen3_omni_thinker_text)
}


_NO_HEAD_DIM = {name: value for name, value in _COMMON.items() if name != "head_dim"}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def _sectioned(*sections):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": list(sections)}}


def qwen2_vl_text():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    return Qwen2VLTextModel(Qwen2VLTextConfig(**_NO_HEAD_DIM, **_sectioned(2, 3, 3)))


def qwen2_5_vl_text():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_NO_HEAD_DIM, **_sectioned(2, 3, 3)))


def qwen3_next():
    config = {**_COMMON, **_LINEAR, **_MOE, "shared_expert_intermediate_size": 32}
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**config))


def qwen3_5_text():
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

    return Qwen3_5TextModel(Qwen3_5TextConfig(**{**_COMMON, **_LINEAR}))


def glm4():
    return hf.Glm4ForCausalLM(hf.Glm4Config(**_COMMON))


def glm4_moe():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    return hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**_COMMON, **experts, first_k_dense_replace=1, use_qk_norm=True))


def glm4v_text():
    from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig
    from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel

    rope = {**_sectioned(2, 3, 3)["rope_parameters"], "partial_rotary_factor": 0.5}
    return Glm4vTextModel(Glm4vTextConfig(**_COMMON, rope_parameters=rope))


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_COMMON, sliding_window=16, layer_types=layers))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON))


def qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_NO_HEAD_DIM))


def mistral():
    return hf.MistralForCausalLM(hf.MistralConfig(**_COMMON))


def phi3():
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_NO_HEAD_DIM))


def gpt_oss():
    return hf.GptOssForCausalLM(hf.GptOssConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2))


def olmo2():
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**_NO_HEAD_DIM))


#: Further families; of those with linear attention, one layer of four stores keys and values.
FURTHER = {
    build.__name__: build
    for build in (
        qwen2_vl_text, qwen2_5_vl_text, qwen3_next, qwen3_5_text, glm4, glm4_moe, glm4v_text, gemma3, llama, qwen2,
        mistral, phi3, gpt_oss, olmo2,
    )
}  # fmt: skip
_THREE_AXES = frozenset(name for name in (*FAMILIES, *FURTHER) if "vl" in name or "omni" in name or "4v" in name) | {
    "qwen3_5_text"
}


class Run:
    """One model with a static cache, stepped by hand; position ids are 3-D and distinct where the model takes them."""

    def __init__(self, family, dtype=torch.float32, batch=2, device="cpu"):
        torch.manual_seed(0)
        self.family, self.batch, self.device = family, batch, device
        self.model = {**FAMILIES, **FURTHER}[family]().to(device, dtype).eval()
        self.cache = StaticCache(config=self.model.config, max_cache_len=MAX_LENGTH)
        self.head = torch.randn(64, VOCABULARY).bfloat16().to(device, dtype)
        self.length = 0

    def copy_weights(self, source):
        """Take the weights, and the buffers that no state dict holds, of another run of the same family."""
        pairs = [*zip(self.model.parameters(), source.model.parameters(), strict=True)]
        pairs += zip(self.model.buffers(), source.model.buffers(), strict=True)
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)

    @property
    def is_3d(self):
        return self.family in _THREE_AXES

    def inputs(self, tokens):
        """Time runs on; height and width differ from it and from each other."""
        inputs = {"input_ids": tokens, "past_key_values": self.cache}
        if self.is_3d:
            time = torch.arange(self.length, self.length + tokens.shape[1], device=self.device).expand(self.batch, -1)
            inputs["position_ids"] = torch.stack([time, (time * 2 + 1) % 61, (time * 3 + 2) % 53])
        self.length += tokens.shape[1]
        return inputs

    @torch.no_grad()
    def step(self, tokens, model=None, *, dynamic=False):
        """Logits of the last position, [batch, vocabulary]; `dynamic` makes the number of tokens symbolic."""
        inputs = self.inputs(tokens)
        if dynamic:
            torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
            if self.is_3d:
                torch._dynamo.mark_dynamic(inputs["position_ids"], 2)
        out = (self.model if model is None else model)(**inputs)[0][:, -1]
        return out if out.shape[-1] == VOCABULARY else out @ self.head

    @torch.no_grad()
    def prefill(self, length=6):
        generator = torch.Generator().manual_seed(1)
        return self.step(torch.randint(1, VOCABULARY, (self.batch, length), generator=generator).to(self.device))

    def caches(self):
        return [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]

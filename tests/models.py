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


class Run:
    """One model with a static cache, stepped by hand; position ids are 3-D and distinct where the model takes them."""

    def __init__(self, family, dtype=torch.float32, batch=2, device="cpu"):
        torch.manual_seed(0)
        self.family, self.batch, self.device = family, batch, device
        self.model = FAMILIES[family]().to(device, dtype).eval()
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
        return self.family not in ("qwen3", "qwen3_moe")

    def inputs(self, tokens):
        """Time runs on; height and width differ from it and from each other."""
        inputs = {"input_ids": tokens, "past_key_values": self.cache}
        if self.is_3d:
            time = torch.arange(self.length, self.length + tokens.shape[1], device=self.device).expand(self.batch, -1)
            inputs["position_ids"] = torch.stack([time, (time * 2 + 1) % 61, (time * 3 + 2) % 53])
        self.length += tokens.shape[1]
        return inputs

    @torch.no_grad()
    def step(self, tokens, model=None):
        """Logits of the last position, [batch, vocabulary]."""
        out = (self.model if model is None else model)(**self.inputs(tokens))[0][:, -1]
        return out if out.shape[-1] == VOCABULARY else out @ self.head

    @torch.no_grad()
    def prefill(self, length=6):
        generator = torch.Generator().manual_seed(1)
        return self.step(torch.randint(1, VOCABULARY, (self.batch, length), generator=generator).to(self.device))

    def caches(self):
        return [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]

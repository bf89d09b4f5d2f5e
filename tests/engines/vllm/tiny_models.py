"""Tiny random models that vLLM serves: ``python tiny_models.py FOLDER NAME …``. Run in the engine's environment."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 1024
LAYERS = 3

_TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 1000000.0,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1,
    "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
_VISION = {
    "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256, "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1], "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02,
}  # fmt: skip
_IMAGE_TOKENS = {
    "image_token_id": 1000,
    "video_token_id": 1001,
    "vision_start_token_id": 1002,
    "vision_end_token_id": 1003,
}
_MROPE = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True}


def _vl(kind: str, text: dict) -> dict:
    text = {**_TEXT, **text, "model_type": f"{kind}_text", "rope_scaling": _MROPE, "rope_theta": 5000000.0}
    vision = {**_VISION, "model_type": kind}
    return {
        "model_type": kind,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        **_IMAGE_TOKENS,
    }


#: Of each model: the class of Transformers that makes it, and its configuration.
MODELS: dict[str, tuple[str, dict]] = {
    "qwen3": ("Qwen3ForCausalLM", {"model_type": "qwen3", **_TEXT}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"model_type": "qwen3_moe", **_TEXT, **_EXPERTS}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _vl("qwen3_vl", {})),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", _vl("qwen3_vl_moe", _EXPERTS)),
    "llama": ("LlamaForCausalLM", {"model_type": "llama", **_TEXT}),
    "qwen2": ("Qwen2ForCausalLM", {"model_type": "qwen2", **_TEXT, "num_attention_heads": 4}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "model_type": "gemma3_text", **_TEXT, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 16,
            "query_pre_attn_scalar": 64, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            "model_type": "qwen3_next", **_TEXT, **_EXPERTS, "num_hidden_layers": 4, "partial_rotary_factor": 0.25,
            "shared_expert_intermediate_size": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}  # fmt: skip


def write(folder: Path, name: str) -> None:
    """Configuration and random weights; a tokenizer and a processor where there are images."""
    architecture, content = MODELS[name]
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    text = {"architectures": [architecture], "dtype": "bfloat16", **content}
    (place / "config.json").write_text(json.dumps(text, indent=1))
    config = transformers.AutoConfig.from_pretrained(place)
    model = getattr(transformers, architecture)(config).to(torch.float32)
    _fill(model)
    with tempfile.TemporaryDirectory() as saved:
        # Weights as checkpoints have them; the configuration stays the one above.
        model.to(torch.bfloat16).save_pretrained(saved)
        shutil.copy(Path(saved, "model.safetensors"), place)
    if name == "qwen3_vl_moe":
        _turn_experts(place / "model.safetensors")
    if "vision_config" in content:
        _write_processor(place)


def _turn_experts(path: Path) -> None:
    """Published checkpoints of this kind hold the experts' weights with inputs before outputs, [E, in, out]."""
    state = load_file(path)
    turned = {key: value.mT.contiguous() for key, value in state.items() if key.endswith(("gate_up_proj", "down_proj"))}
    save_file({**state, **turned}, path, metadata={"format": "pt"})


def _fill(model: torch.nn.Module) -> None:
    """Larger weights than a fresh model's, so that tokens vary, and norms that are not ones."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
            value = torch.rand(parameter.shape, generator=generator) + 0.5
        elif parameter.dim() == 1:
            value = value * 0.02
        elif "embed_tokens" in name:
            # Where logits are products with the same rows, a large one would repeat its token for ever.
            value = value * (0.05 if model.config.get_text_config().tie_word_embeddings else 1.0)
        else:
            value = value * parameter.shape[-1] ** -0.5 * 1.2
        with torch.no_grad():
            parameter.copy_(value)


def _write_processor(place: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {
        1: "<|im_start|>", 2: "<|endoftext|>", 3: "<|im_end|>", 1000: "<|image_pad|>", 1001: "<|video_pad|>",
        1002: "<|vision_start|>", 1003: "<|vision_end|>",
    }  # fmt: skip
    words = {special.get(i, f"t{i}"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(special.values()),
    )  # fmt: skip
    fast.save_pretrained(place)
    both = {
        "size": {"longest_edge": 65536, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
    }  # fmt: skip
    image = {**both, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {**both, "video_processor_type": "Qwen3VLVideoProcessor"}
    (place / "preprocessor_config.json").write_text(json.dumps(image))
    (place / "video_preprocessor_config.json").write_text(json.dumps(video))
    names = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }  # fmt: skip
    path = place / "tokenizer_config.json"
    content = {
        **json.loads(path.read_text()),
        **names,
        "extra_special_tokens": names,
        "processor_class": "Qwen3VLProcessor",
    }
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    for each in sys.argv[2:]:
        write(Path(sys.argv[1]), each)

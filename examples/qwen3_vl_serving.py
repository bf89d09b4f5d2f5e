"""A small Qwen3-VL text decoder as a serving engine writes it, unfused, in plain PyTorch, and compiled with fx_fusion.

Packed QKV, a cos_sin_cache looked up with [3, T] positions (time, height, width), interleaved mRoPE, a paged KV cache
with a slot_mapping, paged attention, greedy decoding of several sequences of different length, one with an image.

    python examples/qwen3_vl_serving.py

The model knows nothing of fx_fusion: `main` compiles it, and asserts that every layer became one call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_fusion


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int = 512
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (12, 10, 10)
    max_position: int = 1024
    num_blocks: int = 64
    block_size: int = 16


@dataclass(frozen=True)
class Batch:
    """One step: T tokens of several sequences, flat.

    positions [3, T]; slot_mapping [T]; block_tables [T, max_blocks] and context_lens [T] of each token's sequence, as
    far as that token may look.
    """

    tokens: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) * 0.5 + 0.75)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class MRotaryEmbedding(nn.Module):
    """Interleaved 3-D rope: pair i turns with axis i % 3 as far as that axis' section goes, else with time."""

    cos_sin_cache: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.section = config.mrope_section
        inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position).float(), inv_freq)
        self.register_buffer("cos_sin_cache", torch.cat([angles.cos(), angles.sin()], -1), persistent=False)

    def interleave(self, x: Tensor) -> Tensor:
        mixed = x[0].clone()
        mixed[..., 1 : self.section[1] * 3 : 3] = x[1, ..., 1 : self.section[1] * 3 : 3]
        mixed[..., 2 : self.section[2] * 3 : 3] = x[2, ..., 2 : self.section[2] * 3 : 3]
        return mixed

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.view(x.shape[0], -1, self.head_dim)
        a, b = heads.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).view_as(x)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, -1)
        cos, sin = self.interleave(cos).unsqueeze(1), self.interleave(sin).unsqueeze(1)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)


class PagedAttention(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        pages = (config.num_blocks, config.block_size, config.num_kv_heads, config.head_dim)
        self.register_buffer("k_cache", torch.zeros(pages), persistent=False)
        self.register_buffer("v_cache", torch.zeros(pages), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        tokens = q.shape[0]
        shape = (tokens, self.num_kv_heads, self.head_dim)
        self.k_cache.view(-1, *shape[1:])[batch.slot_mapping] = k.view(shape)
        self.v_cache.view(-1, *shape[1:])[batch.slot_mapping] = v.view(shape)
        keys = self.k_cache[batch.block_tables].flatten(1, 2).transpose(1, 2)
        values = self.v_cache[batch.block_tables].flatten(1, 2).transpose(1, 2)
        visible = torch.arange(keys.shape[2], device=q.device) < batch.context_lens.unsqueeze(1)
        queries = q.view(tokens, self.num_heads, 1, self.head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, visible[:, None, None], enable_gqa=True)
        return out.reshape(tokens, -1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, rotary: MRotaryEmbedding) -> None:
        super().__init__()
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, self.q_size + 2 * self.kv_size, bias=False)
        self.o_proj = nn.Linear(self.q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.rotary = rotary
        self.attention = PagedAttention(config)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        q = self.q_norm(q.view(*q.shape[:-1], -1, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(*k.shape[:-1], -1, self.head_dim)).view(k.shape)
        q, k = self.rotary(batch.positions, q, k)
        return self.o_proj(self.attention(q, k, v, batch))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, rotary: MRotaryEmbedding) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rotary)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.attention(self.input_norm(x), batch)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        rotary = MRotaryEmbedding(config)
        self.layers = nn.ModuleList(Layer(config, rotary) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [T, vocab_size]."""
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x, batch)
        return self.lm_head(self.norm(x))

    def clear_caches(self) -> None:
        for layer in self.layers:
            layer.attention.attention.k_cache.zero_()
            layer.attention.attention.v_cache.zero_()


@dataclass
class Request:
    """One request: its tokens, and the (time, height, width) position of each."""

    tokens: list[int]
    positions: list[tuple[int, int, int]]
    blocks: list[int]

    @staticmethod
    def prompt(tokens: list[int], image: tuple[int, int] | None, blocks: list[int]) -> Request:
        """Text positions are equal on all axes; an image's patches share a time and spread over height and width."""
        positions = [(i, i, i) for i in range(3)]
        if image is not None:
            positions += [(3, 3 + row, 3 + column) for row in range(image[0]) for column in range(image[1])]
        while len(positions) < len(tokens):
            following = max(map(max, positions)) + 1
            positions.append((following, following, following))
        return Request(tokens, positions[: len(tokens)], blocks)

    def append(self, token: int) -> None:
        following = max(map(max, self.positions)) + 1
        self.tokens.append(token)
        self.positions.append((following, following, following))


def make_batch(sequences: Sequence[Request], starts: Sequence[int], block_size: int, device: torch.device) -> Batch:
    """The tokens of each sequence from its start on, as one flat step."""
    tokens: list[int] = []
    positions: list[tuple[int, int, int]] = []
    slots: list[int] = []
    tables: list[list[int]] = []
    lens: list[int] = []
    for sequence, start in zip(sequences, starts, strict=True):
        for i in range(start, len(sequence.tokens)):
            tokens.append(sequence.tokens[i])
            positions.append(sequence.positions[i])
            slots.append(sequence.blocks[i // block_size] * block_size + i % block_size)
            tables.append(sequence.blocks)
            lens.append(i + 1)
    tensors = [torch.tensor(each, device=device) for each in (tokens, positions, slots, tables, lens)]
    return Batch(tensors[0], tensors[1].t().contiguous(), *tensors[2:])


def generate(
    model: Callable[[Batch], Tensor], config: DecoderConfig, steps: int, device: torch.device
) -> list[list[int]]:
    """Greedy decoding of three prompts of different length, the second with an image of 4 x 6 patches."""
    generator = torch.Generator().manual_seed(0)
    sequences: list[Request] = []
    for i, (length, image) in enumerate(((7, None), (40, (4, 6)), (18, None))):
        tokens = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        sequences.append(Request.prompt(tokens, image, blocks=list(range(5 * i + 1, 5 * i + 6))))
    starts = [0] * len(sequences)
    for _ in range(steps):
        batch = make_batch(sequences, starts, config.block_size, device)
        logits = model(batch)
        starts = [len(sequence.tokens) for sequence in sequences]
        last = torch.tensor([*map(len, (s.tokens for s in sequences))], device=device)
        ends = last.cumsum(0) - 1 if len(batch.tokens) > len(sequences) else torch.arange(len(sequences), device=device)
        for sequence, token in zip(sequences, logits[ends].argmax(-1).tolist(), strict=True):
            sequence.append(token)
    return [sequence.tokens for sequence in sequences]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="reference", help="reference, triton, aiter or auto")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = DecoderConfig()
    model = Decoder(config).to(device, getattr(torch, arguments.dtype)).eval()

    expected = generate(model, config, arguments.steps, device)
    model.clear_caches()
    print("compiling the prefill step and the decode step …", flush=True)
    options = {"fx_fusion.kernel": arguments.kernel, "fx_fusion.require": config.num_layers, "fx_fusion.strict": True}
    compiled = torch.compile(model, backend="fx_fusion", fullgraph=True, dynamic=False, options=options)
    tokens = generate(compiled, config, arguments.steps, device)

    report = fx_fusion.last_report()
    assert report is not None
    print(report)
    print(f"{len(report.fused)} of {config.num_layers} layers fused")
    print("tokens equal eager's" if tokens == expected else f"tokens differ: {tokens} against {expected}")
    if arguments.dtype == "float32":
        assert tokens == expected


if __name__ == "__main__":
    main()

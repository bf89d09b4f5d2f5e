"""The variants of a launch that every implementation is tested with."""

from __future__ import annotations

import torch

from fx_fusion.kernels.tile import Tile
from fx_fusion.kernels.triton import choose_tile
from launches.problem import Variant

E4M3FN, E4M3FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
FLOAT32 = torch.float32
AHEAD = Tile(8, 1, heads_ahead=True)
MISPLACED = {"seq": 13, "slots": "misplaced"}

VARIANTS = {
    "plain": Variant(),
    "decode-tile": Variant(tile=Tile(2, 1)),
    "four-warps": Variant(seq=9, tile=Tile(8, 4)),
    "two-warps": Variant(seq=17, tile=Tile(16, 2)),
    "many-heads-a-program": Variant(tile=Tile(8, 1, 4)),
    "tile-of-few-tokens": Variant(num_heads=32, num_kv_heads=8, seq=3).tiled_for(64),
    "tile-of-many-tokens": Variant(tile=choose_tile(8192, 32, 8, 128, 64)),
    "tile-of-many-tokens-256": Variant(head_dim=256, tile=choose_tile(8192, 16, 2, 256, 64)),
    "fewer-heads-than-the-tile": Variant(tile=Tile(4, 1, 4, heads_per_program=2)),
    "heads-ahead": Variant(tile=AHEAD),
    "heads-ahead-left-over": Variant(num_heads=5, num_kv_heads=3, tile=Tile(4, 1, 2, heads_ahead=True)),
    "heads-ahead-fewer": Variant(tile=Tile(4, 1, 4, heads_per_program=2, heads_ahead=True)),
    "heads-ahead-in-blocks": Variant(batch=3, seq=3, cache="HND", blocks=True, tile=AHEAD),
    "heads-ahead-of-sequences": Variant(cache="sequence", batch=3, table=False, tile=AHEAD),
    "heads-ahead-partial": Variant(rotary_dim=32, gemma_norm=True, gated=True, tile=AHEAD),
    "heads-ahead-gptj": Variant(rotary_dim=64, is_neox=False, full_width=True, tile=AHEAD),
    "heads-ahead-float8": Variant(
        **MISPLACED, cache_dtype=E4M3FN, k_scale=0.007, v_scale="tensor", skip_negative_slots=True, tile=AHEAD
    ),
    "heads-ahead-shuffle": Variant(cache="shuffle", blocks=True, tile=AHEAD),
    "heads-ahead-80": Variant(head_dim=80, tile=AHEAD),
    "heads-left-over": Variant(num_heads=5, num_kv_heads=3, tile=Tile(2, 1, 2)),
    "one-token": Variant(seq=1),
    "batch": Variant(batch=3, seq=3),
    "float16": Variant(dtype=torch.float16),
    "float32": Variant(dtype=FLOAT32),
    "float32-four-warps": Variant(dtype=FLOAT32, is_neox=False, tile=Tile(8, 4)),
    "HND": Variant(cache="HND", blocks=True),
    "sequence": Variant(cache="sequence", batch=3),
    "packed": Variant(cache="packed", blocks=True),
    "whole": Variant(cache="whole", blocks=True),
    "shuffle": Variant(cache="shuffle", blocks=True),
    "shuffle-float32": Variant(cache="shuffle", dtype=FLOAT32),
    "shuffle-float8": Variant(cache="shuffle", cache_dtype=E4M3FNUZ, blocks=True),
    "shuffle-two-warps": Variant(cache="shuffle", seq=17, tile=Tile(16, 2)),
    "gptj": Variant(is_neox=False),
    "gptj-two-warps": Variant(is_neox=False, seq=17, tile=Tile(16, 2)),
    "gptj-full-width": Variant(is_neox=False, full_width=True),
    "sectioned": Variant(axes="sectioned"),
    "any-axes": Variant(axes="any"),
    "any-axes-full-width": Variant(axes="any", full_width=True),
    "rope": Variant(axes="one"),
    "rows": Variant(table=False, batch=2, seq=3),
    "rows-full-width": Variant(table=False, full_width=True),
    "rows-gptj": Variant(table=False, is_neox=False),
    "partial": Variant(rotary_dim=32),
    "partial-gptj": Variant(rotary_dim=64, is_neox=False),
    "gated-gemma": Variant(
        head_dim=256,
        rotary_dim=64,
        gated=True,
        gemma_norm=True,
        num_heads=3,
        num_kv_heads=1,
        axes="sectioned",
        tile=Tile(4, 1),
    ),
    "gated": Variant(gated=True),
    "gemma": Variant(gemma_norm=True),
    "no-norm": Variant(q_eps=None, k_eps=None, weights=False),
    "no-weights": Variant(weights=False),
    "two-eps": Variant(q_eps=0.5, k_eps=2.0),
    "float32-weights-and-tables": Variant(weight_dtype=FLOAT32, angle_dtype=FLOAT32),
    "float32-gemma": Variant(weight_dtype=FLOAT32, gemma_norm=True, dtype=torch.float16),
    "int32": Variant(index_dtype=torch.int32, blocks=True),
    "head-dim-64": Variant(head_dim=64),
    "head-dim-80": Variant(head_dim=80),
    "head-dim-80-gptj": Variant(head_dim=80, rotary_dim=32, is_neox=False, dtype=torch.float16, tile=Tile(4, 2)),
    "head-dim-96": Variant(head_dim=96),
    "head-dim-256": Variant(head_dim=256),
    "no-k": Variant(return_k=False),
    "e4m3fn": Variant(cache_dtype=E4M3FN),
    "e4m3fnuz": Variant(cache_dtype=E4M3FNUZ),
    "e5m2": Variant(cache_dtype=E5M2),
    "e4m3fn-scaled": Variant(cache_dtype=E4M3FN, k_scale=0.007, v_scale="tensor"),
    "e4m3fnuz-scaled": Variant(cache_dtype=E4M3FNUZ, k_scale="tensor", v_scale=0.3),
    "e5m2-scaled": Variant(cache_dtype=E5M2, k_scale=1e-4, v_scale="tensor"),
    "e4m3fn-saturated": Variant(cache_dtype=E4M3FN, k_scale=0.007, v_scale="tensor", saturate=True),
    "e4m3fnuz-saturated": Variant(cache_dtype=E4M3FNUZ, k_scale="tensor", v_scale=0.011, saturate=True),
    "e5m2-saturated": Variant(cache_dtype=E5M2, k_scale=1e-4, v_scale=1e-5, saturate=True),
    "float32-to-e4m3fn": Variant(dtype=FLOAT32, cache_dtype=E4M3FN, k_scale="tensor", v_scale=0.3),
    "float16-to-e5m2": Variant(dtype=torch.float16, cache_dtype=E5M2, axes="one"),
    "bfloat16-to-float32": Variant(cache_dtype=FLOAT32),
    "float32-to-bfloat16": Variant(dtype=FLOAT32, cache_dtype=torch.bfloat16),
    "float32-to-float16": Variant(dtype=FLOAT32, cache_dtype=torch.float16),
    "slots-wrap": Variant(**MISPLACED),
    "slots-wrap-in-blocks": Variant(**MISPLACED, blocks=True, cache="HND"),
    "slots-skip": Variant(**MISPLACED, skip_negative_slots=True),
    "slots-skip-shuffle": Variant(**MISPLACED, skip_negative_slots=True, cache="shuffle"),
    "slots-skip-int32": Variant(**MISPLACED, skip_negative_slots=True, index_dtype=torch.int32, blocks=True),
    "positions-outside": Variant(seq=9, positions="outside"),
    "positions-outside-int32": Variant(
        seq=9, positions="outside", axes="one", index_dtype=torch.int32, full_width=True
    ),
}

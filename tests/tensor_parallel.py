"""One rank of a tensor-parallel Transformers model, fused: ``torchrun --nproc-per-node 2 tests/tensor_parallel.py …``.

Writes ``rank-N.json`` beside the checkpoint: how many layers are fused, with how many KV heads, and the tokens decoded.
A file for each rank, because what two processes print into one pipe can share a line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import LAYERS, VOCABULARY
from torch import Tensor
from transformers import Qwen3Config, StaticCache
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import fx_fusion

STEPS, BATCH, PROMPT = 4, 2, 5


def tokens_of(model, compiled, device) -> list[list[int]]:
    """Greedy decoding, from the same prompt and with the same head everywhere."""
    random = torch.Generator().manual_seed(0)
    head = torch.randn(64, VOCABULARY, generator=random).to(device)
    ids = torch.randint(1, VOCABULARY, (BATCH, PROMPT), generator=random).to(device)
    cache, length, chosen = StaticCache(config=model.config, max_cache_len=32), 0, []
    with torch.no_grad():
        for step in range(STEPS):
            time = torch.arange(length, length + ids.shape[1], device=device).expand(BATCH, -1)
            positions = torch.stack([time, (time * 2 + 1) % 61, (time * 3 + 2) % 53])
            call = model if step == 0 else compiled
            hidden: Tensor = call(input_ids=ids, position_ids=positions, past_key_values=cache)[0]
            length += ids.shape[1]
            ids = (hidden[:, -1] @ head).argmax(-1, keepdim=True)
            chosen.append(ids.flatten().tolist())
    return chosen


def main(checkpoint: str, kernel: str, inner: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    config = Qwen3VLTextConfig.from_pretrained(checkpoint)
    # Transformers ships a plan for Qwen3, whose layers are the same, and none for this model.
    config.base_model_tp_plan = Qwen3Config.base_model_tp_plan
    model = Qwen3VLTextModel.from_pretrained(checkpoint, config=config, tp_plan="auto", dtype=torch.float32).eval()
    options = {"fx_fusion.kernel": kernel, "fx_fusion.inner": inner, "fx_fusion.require": LAYERS}
    compiled = torch.compile(model, backend="fx_fusion", dynamic=False, options=options)
    tokens = tokens_of(model, compiled, device)
    report = fx_fusion.last_report()
    heads = [layer.reading["num_kv_heads"] for layer in report.fused]
    found = {"fused": len(report.fused), "kv_heads": heads, "tokens": tokens}
    Path(checkpoint, f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

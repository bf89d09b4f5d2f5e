"""The main job on this machine's device: an unmodified Transformers Qwen3-VL text model, fused, proved and compared.

    python examples/demo.py

Small random weights; greedy decoding from 3-D positions whose time, height and width differ. About a minute on a
laptop's CPU, nearly all of it spent by Inductor.
"""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import StaticCache
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

import fx_fusion

LAYERS, STEPS, PROMPT, BATCH, VOCABULARY = 4, 16, 12, 2, 512

console = Console()


def build(device: torch.device) -> Qwen3VLTextModel:
    config = Qwen3VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    )
    torch.manual_seed(0)
    return Qwen3VLTextModel(config).to(device).eval()


@torch.no_grad()
def decode(model, step, device: torch.device) -> list[list[int]]:
    """Greedy tokens: prefill by `model`, then one token at a time by `step`."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, PROMPT), generator=generator).to(device)
    cache = StaticCache(config=model.config, max_cache_len=64)
    chosen: list[torch.Tensor] = []
    length = 0
    for i in range(STEPS + 1):
        axis = torch.arange(length, length + tokens.shape[1], device=device).expand(BATCH, -1)
        positions = torch.stack([axis, axis // 2, axis * 2 % 97])
        run = step if i else model
        hidden = run(input_ids=tokens, position_ids=positions, past_key_values=cache).last_hidden_state
        length += tokens.shape[1]
        tokens = (hidden[:, -1] @ model.embed_tokens.weight.t()).argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, 1).tolist()


@contextmanager
def doing(what: str):
    started = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"[green]✓[/] {what} ({time.perf_counter() - started:.1f} s)")


def seconds_in_inductor() -> float:
    return sum(torch._dynamo.utils.compilation_time_metrics.get("compile_fx_inner", [0.0]))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"fx_fusion {fx_fusion.__version__}, {versions}, {device.type}")
    model = build(device)
    with doing(f"eager: {STEPS} tokens for {BATCH} sequences"):
        expected = decode(model, model, device)
    options = {"fx_fusion.kernel": "reference", "fx_fusion.require": LAYERS}
    compiled = torch.compile(model, backend="fx_fusion", fullgraph=True, options=options)
    with doing("compiled with backend='fx_fusion', kernel=reference: the same tokens, compilation included"):
        tokens = decode(model, compiled, device)

    report = fx_fusion.last_report()
    assert report is not None
    console.print()
    console.print(str(report), highlight=False)
    console.print()
    table = Table(show_header=False)
    table.add_row("layers fused", f"{len(report.fused)} of {LAYERS}")
    table.add_row("proof", "; ".join(dict.fromkeys(layer.proof_words for layer in report.fused)))
    table.add_row("tokens equal eager's", "yes" if tokens == expected else "NO")
    table.add_row("seconds in the pass", f"{report.seconds.get('total', 0.0):.2f}")
    table.add_row("seconds in Inductor, the pass included", f"{seconds_in_inductor():.2f}")
    console.print(table)
    assert tokens == expected, (tokens, expected)


if __name__ == "__main__":
    main()

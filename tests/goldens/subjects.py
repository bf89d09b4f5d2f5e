"""The graphs that are looked at: each by a name, and built from a fixed seed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import qwen3_vl_serving as serving
import torch
import two_layers
from models import FAMILIES, FURTHER, VOCABULARY, Run
from mutation.corpus import CASES
from spellings.combination import SIZES, Combination, draw

from goldens import adapter
from goldens.adapter import Passed

SPELLINGS = 200
MUTANTS = 3
TARGET = "gfx942"
#: A quick selection: stores of several kinds, opaque operations, symbols, declines, a real model.
QUICK = (
    "corpus/packed_mrope",
    "corpus/packed_mrope_bfloat16",
    "corpus/stored_at_once",
    "corpus/opaque_store_into_one_tensor",
    "corpus/masked_by_block",
    "explain/two_layers/clamped",
    "mutants/gpt_j_partial",
    "serving/decode",
    "spellings/00[0-3]",
    "transformers/qwen3_vl_text/prefill",
)


@dataclass(frozen=True)
class Subject:
    """`run` builds it from the random state that it finds, and runs the pass over its graphs."""

    name: str
    run: Callable[[], list[Passed]]


def subjects() -> Iterator[Subject]:
    for name in CASES:
        yield Subject(f"corpus/{name}", functools.partial(_corpus, name))
    for name in CASES:
        yield Subject(f"mutants/{name}", functools.partial(adapter.mutated, name, MUTANTS))
    for name in ("good", "clamped", "shorter"):
        yield Subject(f"explain/two_layers/{name}", functools.partial(_two_layers, name))
    for phase in ("prefill", "decode"):
        yield Subject(f"serving/{phase}", functools.partial(_serving, phase))
    for family in (*FAMILIES, *FURTHER):
        yield Subject(f"transformers/{family}/decode", functools.partial(_model, family, 1))
    for family in (*FAMILIES, "gemma3", "glm4v_text"):
        yield Subject(f"transformers/{family}/prefill", functools.partial(_model, family, 7))
    for family in ("qwen3", "qwen3_vl_text"):
        yield Subject(f"transformers/{family}/bfloat16", functools.partial(_model, family, 1, torch.bfloat16))
        yield Subject(f"explain/transformers/{family}", functools.partial(_explained_model, family))
        yield Subject(f"transformers/{family}/dynamic", functools.partial(_model, family, 7, dynamic=True))
    for number in range(SPELLINGS):
        yield Subject(f"spellings/{number:03}", functools.partial(_spelling, number))


def _corpus(name: str) -> list[Passed]:
    fn, args, kwargs = CASES[name]()
    return adapter.compiled(fn, args, kwargs)


def _two_layers(name: str) -> list[Passed]:
    model, args = getattr(two_layers, name)()
    return adapter.explained(model, args, {}, TARGET)


def _serving(phase: str) -> list[Passed]:
    config = serving.DecoderConfig()
    model = serving.Decoder(config).eval()
    steps: list[serving.Batch] = []

    def record(batch: serving.Batch) -> torch.Tensor:
        steps.append(batch)
        return torch.zeros(len(batch.tokens), config.vocab_size)

    serving.generate(record, config, 2, torch.device("cpu"))
    batch = steps[0] if phase == "prefill" else steps[1]
    return adapter.compiled(model, (batch,), {})


def _filled(family: str, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Run, dict[str, Any]]:
    """A model whose cache holds a prompt, and the inputs of its next step."""
    run = Run(family, dtype)
    run.prefill()
    drawn = torch.randint(1, VOCABULARY, (run.batch, tokens), generator=torch.Generator().manual_seed(2))
    return run, run.inputs(drawn)


def _model(family: str, tokens: int, dtype: torch.dtype = torch.float32, *, dynamic: bool = False) -> list[Passed]:
    run, inputs = _filled(family, tokens, dtype)
    if dynamic:
        torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
        if run.is_3d:
            torch._dynamo.mark_dynamic(inputs["position_ids"], 2)
    return adapter.compiled(run.model, (), inputs, dynamic=None if dynamic else False)


def _explained_model(family: str) -> list[Passed]:
    run, inputs = _filled(family, 1, torch.bfloat16)
    return adapter.explained(run.model, (), inputs, TARGET)


def spelling(number: int) -> Combination:
    """One in eight with sizes as drawn: symbols take three times as long to trace."""
    drawn = draw(random.Random(number).choice)
    return drawn if number % 8 == 0 else replace(drawn, sizes="static")


def _spelling(number: int) -> list[Passed]:
    combination = spelling(number)
    with torch.inference_mode() if combination.inference_mode else torch.no_grad():
        model = combination.model()
        args = combination.arguments(model)
    sizes = SIZES[combination.sizes]
    found = adapter.compiled(model, args, {}, dynamic=sizes, inference_mode=combination.inference_mode)
    return [Passed(f"spelling: {combination}"), *found]

"""Meanings of operations of well-known libraries: looked at when a graph holds such an operation, and never before."""

from __future__ import annotations

from fx_fusion.meaning import Meaning
from fx_fusion.meanings import sglang, vllm

#: By qualified name. What the user declares for the same operation comes first.
READY_MADE: dict[str, Meaning] = {meaning.name: meaning for meaning in (*vllm.MEANINGS, *sglang.MEANINGS)}

#: Operations that no meaning can be declared for, and why.
HIDDEN: dict[str, str] = vllm.HIDDEN

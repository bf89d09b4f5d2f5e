"""Meanings of operations of well-known libraries."""

from __future__ import annotations

from fx_fusion.semantics.libraries import sglang, vllm
from fx_fusion.semantics.meaning import Hidden, Meaning

#: By qualified name. What the user declares for the same operation comes first.
READY_MADE: dict[str, Meaning] = {meaning.name: meaning for meaning in (*vllm.MEANINGS, *sglang.MEANINGS)}

#: Stores that no meaning can be declared for, by the name in the schema.
HIDDEN: dict[str, Hidden] = {**vllm.HIDDEN, **sglang.HIDDEN}

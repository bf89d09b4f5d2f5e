"""The exact proof: two programs compared as elements of finite fields (polynomial identity testing)."""

from __future__ import annotations

from fx_fusion.proof.field.comparison import Comparison, compare
from fx_fusion.proof.field.verdict import Differs, NotEvaluable, Proved, Verdict

__all__ = ["Comparison", "Differs", "NotEvaluable", "Proved", "Verdict", "compare"]

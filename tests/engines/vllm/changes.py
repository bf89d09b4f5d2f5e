"""What a test changes in the plug-in or in vLLM before the engine starts: see ``serve.py``."""

from __future__ import annotations

from dataclasses import replace


def exchange_k_and_v() -> None:
    """Keys go where values belong, after the place was checked."""
    from fx_fusion.engines.vllm import operation

    look = operation._look_at

    def exchanged(*args):
        place = look(*args)
        return replace(place, k_cache=place.v_cache, v_cache=place.k_cache, k_layout=place.v_layout,
                       v_layout=place.k_layout)  # fmt: skip

    operation._look_at = exchanged


def exchange_views() -> None:
    """A wrong idea of where the backend stores."""
    from fx_fusion.engines.vllm import layout_check

    views = layout_check.views
    layout_check.views = lambda *args: views(*args)[::-1]


def forget_the_layout() -> None:
    """A backend of which nothing is known."""
    from fx_fusion.engines.vllm import cache_views

    cache_views._LAYOUTS.clear()

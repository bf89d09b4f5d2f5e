"""What a test changes in the plug-in before the engine starts: context managers, by name in ``serve.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock


@contextlib.contextmanager
def exchange_k_and_v() -> Iterator[None]:
    """Keys go where values belong, after the place was checked."""
    from fx_fusion.engines.vllm import operation

    look = operation._look_at

    def exchanged(*args):
        place = look(*args)
        return replace(place, k_cache=place.v_cache, v_cache=place.k_cache, k_layout=place.v_layout,
                       v_layout=place.k_layout)  # fmt: skip

    with mock.patch.object(operation, "_look_at", exchanged):
        yield


@contextlib.contextmanager
def exchange_views() -> Iterator[None]:
    """A wrong idea of where the backend stores."""
    from fx_fusion.engines.vllm import layout_check

    views = layout_check.views
    layout_check._known.clear()
    with mock.patch.object(layout_check, "views", lambda *args: views(*args)[::-1]):
        yield
    layout_check._known.clear()


@contextlib.contextmanager
def forget_the_layout() -> Iterator[None]:
    """A backend of which nothing is known."""
    from fx_fusion.engines.vllm import cache_views

    with mock.patch.dict(cache_views._LAYOUTS, clear=True):
        yield


@contextlib.contextmanager
def read_fresh_keys() -> Iterator[None]:
    """Attention that is taken to read the fresh key, so that it has to be returned."""
    from fx_fusion.engines.vllm import store

    with mock.patch.object(store, "_all_read_cache_only", return_value=False):
        yield


@contextlib.contextmanager
def refuse_fusions() -> Iterator[None]:
    """No candidate is read: every store has to be put back."""
    from fx_fusion.decline import Decline
    from fx_fusion.patterns.qk_norm_rope_cache.fusion import QkNormRopeCache

    def read(*args):
        raise Decline("graph.fuel", "a test refuses every candidate")

    with mock.patch.object(QkNormRopeCache, "read", read):
        yield

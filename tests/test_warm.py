"""What happens once happens before a capture, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments

import fx_fusion
from fx_fusion.graph_capture.warm import refuse_compilation_in_captures
from fx_fusion.kernels.capture_guard import FirstUseInCapture, only_warm
from fx_fusion.report import REPORTS

OPTIONS = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}


@pytest.fixture
def capturing(monkeypatch):
    """Pretend that the current stream is captured, or is not any more."""

    def begin(yes=True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: yes)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: yes)

    return begin


@torch.no_grad()
def test_calls_until_nothing_compiles():
    compiled = torch.compile(Prologue(), backend="fx_fusion", options=OPTIONS)
    args = arguments()
    first = fx_fusion.warmup(compiled, *args)
    assert (first.calls, first.graphs, first.fused) == (3, 1, 1)
    assert "warm after 3 calls" in str(first) and "1 graphs compiled, 1 fused calls" in str(first)
    again = fx_fusion.warmup(compiled, *args)
    assert (again.calls, again.graphs, again.reports) == (2, 0, ())
    assert "it was warm" in str(again)


@torch.no_grad()
def test_the_calls_are_real_ones():
    args, module = arguments(), Prologue()
    expected = [tensor.clone() for tensor in args]
    fx_fusion.warmup(torch.compile(module, backend="fx_fusion", options=OPTIONS), *args)
    module(*expected)
    torch.testing.assert_close(args, tuple(expected))


def test_what_compiles_at_every_call_is_never_warm():
    with torch._dynamo.config.patch(recompile_limit=64):
        count = iter(range(100))

        class Counting(torch.nn.Module):
            step = 0

            def forward(self, x):
                return x + self.step

        module = Counting()
        compiled = torch.compile(module, backend="eager", dynamic=False)

        def call(x):
            module.step = next(count)
            return compiled(x)

        with pytest.raises(fx_fusion.NotWarm, match="8 calls with the same arguments compiled 8 graphs"):
            fx_fusion.warmup(call, torch.ones(3))


def test_warming_up_in_a_capture_is_refused(capturing):
    capturing()
    with pytest.raises(FirstUseInCapture, match=r"fx_fusion\.warmup is called while a graph is being captured"):
        fx_fusion.warmup(lambda: None)


@torch.no_grad()
def test_compiling_in_a_capture_is_refused_and_leaves_nothing_behind(capturing):
    compiled = torch.compile(Prologue(), backend="fx_fusion", options=OPTIONS)
    args = arguments()
    before = [tensor.clone() for tensor in args]
    reports = REPORTS.snapshot()
    refuse_compilation_in_captures()
    capturing()
    with pytest.raises(Exception, match=r"torch\.compile starts to compile while a graph is being captured.*warmup"):
        compiled(*args)
    assert all(map(torch.equal, args, before))
    assert not REPORTS.since(reports)
    capturing(False)
    compiled(*args)
    assert len(fx_fusion.last_report().fused) == 1
    capturing()
    compiled(*args)
    torch._dynamo.reset_code_caches()
    with pytest.raises(Exception, match=r"torch\.compile starts to compile while"):
        compiled(*args)


def test_triton_may_not_compile_in_a_capture(capturing):
    knobs = pytest.importorskip("triton.knobs")
    asked = []
    before = knobs.runtime.jit_cache_hook
    with only_warm("the kernel"):
        assert knobs.runtime.jit_cache_hook is before, "outside of captures there is no hook"
    capturing()
    with only_warm("the kernel"), pytest.raises(FirstUseInCapture, match="the kernel is used for the first time while"):
        knobs.runtime.jit_cache_hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False)
    assert knobs.runtime.jit_cache_hook is before

    import threading

    knobs.runtime.jit_cache_hook = lambda **told: asked.append(told)
    try:
        with only_warm("the kernel"):
            other = threading.Thread(target=lambda: knobs.runtime.jit_cache_hook(key="another thread's"))
            other.start()
            other.join()
    finally:
        knobs.runtime.jit_cache_hook = before
    assert asked == [{"key": "another thread's"}]

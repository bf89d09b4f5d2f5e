"""What must be where, told by the whole pass: graphs of one prologue, on fake tensors that are on a GPU or not."""

from __future__ import annotations

import pytest
import torch
from prologue import SLOTS, Prologue, arguments

from fx_fusion import testing
from fx_fusion.config import Config
from fx_fusion.fusion_pass import apply
from fx_fusion.graph_capture import graphs

POSITIONS, SLOT_MAPPING = 1, 2


def report(module, args=None, on_host=(), mixed=False):
    """What the pass makes of the module on a GPU, but for the arguments at the positions `on_host`."""
    args = args or arguments()
    trace = graphs.trace(module, args, {}, on_host=[args[i] for i in on_host])
    assert trace.error is None and len(trace.graphs) == 1
    devices = {str(node.meta["val"].device) for node in graphs.placeholders(trace.graphs[0].aten)}
    assert devices == ({"cuda:0", "cpu"} if on_host or mixed else {"cuda:0"})
    # The reference serves anywhere: only the placement decides.
    return apply(trace.graphs[0].aten.graph, Config(kernel="reference", strict=True))


def declined(module, code, **kwargs):
    told = report(module, **kwargs)
    assert [layer.code for layer in told.layers] == [code], str(told)
    return told.layers[0]


class Shifted(Prologue):
    """Slots computed in the graph."""

    def store(self, cache, slots, value):
        super().store(cache, (slots + 1) % SLOTS, value)


class Copied(Prologue):
    """Slots that are copied to the GPU in the graph."""

    def store(self, cache, slots, value):
        super().store(cache, slots.to(cache.device), value)


class CopiedTable(Prologue):
    def angles(self, positions):
        cos, sin = self.cos_sin_cache[positions.cpu()].to(positions.device).chunk(2, -1)
        return self.interleave(cos).unsqueeze(1), self.interleave(sin).unsqueeze(1)


class ReadBack(Prologue):
    """Slots that begin at a number which the host reads."""

    def store(self, cache, slots, value):
        super().store(cache, (slots + slots[0].item()) % SLOTS, value)


class Scaled(Prologue):
    """Keys and values are divided by a scale: a number, a literal, a buffer, or a tensor that no one moves."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "buffer":
            self.register_buffer("scale", torch.tensor(0.5))
        elif kind == "plain attribute":
            self.scale = torch.tensor(0.5)

    def store(self, cache, slots, value):
        scale = {"number": 0.5, "literal": torch.tensor(0.5)}.get(self.kind)
        super().store(cache, slots, value / (self.scale if scale is None else scale))


@pytest.mark.parametrize("kind", ["number", "literal"])
def test_a_scale_that_is_known_is_a_number(kind):
    """It is frozen in a captured graph, and the report says so by naming the number."""
    layer = testing.run(Scaled(kind), arguments()).report.layers[0]
    assert (layer.state, layer.reading["k_scale"]) == ("rewritten", 0.5)


def test_a_scale_on_the_gpu_is_read_there_at_every_call():
    layer = report(Scaled("buffer")).layers[0]
    assert layer.state == "rewritten" and isinstance(layer.reading["k_scale"], str)


def test_a_scale_on_the_cpu_is_declined():
    """A plain attribute of a module, which ``to`` leaves behind."""
    layer = declined(Scaled("plain attribute"), "placement.scale_on_host", mixed=True)
    assert "is a tensor on the CPU" in layer.reason and "expected a number, or a tensor there" in layer.reason


@pytest.mark.parametrize("module", [Prologue(), Shifted()], ids=["plain", "shifted"])
def test_all_on_one_gpu_is_fused(module):
    assert [layer.state for layer in report(module).layers] == ["rewritten"]


@pytest.mark.parametrize("position", [POSITIONS, SLOT_MAPPING])
def test_an_index_on_the_cpu_is_declined(position):
    """PyTorch takes it, copies it, and waits for the copy."""
    layer = declined(Prologue(), "placement.on_host", on_host=[position])
    assert "cpu" in layer.reason and "cuda:0" in layer.reason and "move " in layer.reason
    assert "prologue.py" in layer.source


def test_slots_copied_to_the_gpu_are_declined():
    layer = declined(Copied(), "placement.transfer", on_host=[SLOT_MAPPING])
    assert "from cpu to cuda:0" in layer.reason
    assert "test_placement.py" in layer.source


def test_angles_that_went_through_the_cpu_are_declined():
    # The table is a buffer, on the GPU; positions go to the CPU and come back as rows.
    assert "cuda:0 to cpu" in declined(CopiedTable(), "placement.transfer").reason


def test_slots_that_the_host_reads_are_declined():
    layer = declined(ReadBack(), "placement.waits")
    assert "is read back" in layer.reason and "test_placement.py" in layer.source


def test_on_the_cpu_nothing_of_this_is_declined():
    for module in (Copied(), ReadBack()):
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            testing.assert_fuses(module, arguments(), count=1)

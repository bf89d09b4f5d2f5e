"""A few mutants of every region of the corpus; ``tests/mutation/run.py`` makes thousands."""

from __future__ import annotations

import pytest
import torch

from fx_fusion import fusion_pass
from fx_fusion.graph import operations
from fx_fusion.mutation.mutants import rewritten
from fx_fusion.mutation.oracle import judge
from fx_fusion.patterns.qk_norm_rope_cache import match as qk_norm_rope_cache
from fx_fusion.patterns.qk_norm_rope_cache.branch import rotated_heads
from fx_fusion.proof.field import Proved
from mutation import campaign
from mutation.corpus import CASES

aten = torch.ops.aten

MUTANTS, TRIALS = 20, 16


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_mutant_is_rewritten_wrong(name):
    tally = campaign.run(name, MUTANTS, seed=0, trials=TRIALS)
    assert not tally.wrong
    assert tally.mutants == MUTANTS and tally.right


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_region_itself_is_right_on_every_kind_of_input(name):
    """Also says that the oracle accepts two computations that only round differently."""
    original = campaign.mutants_of(name, 0, 0).original
    fused, report = rewritten(original)
    assert report.fused
    assert judge(original, fused, count=100, seed=0) is None


def _nothing(*_):
    return None


def _slots_of_the_key(_, key, *__):
    return key.addresses.slots


NO_PROOF = (rotated_heads, "prove", lambda *_: Proved(bits=64, trials=1, degree=1, literals={}))
NO_CERTIFICATE = (rotated_heads, "certify", _nothing)
#: What no field interprets is then sampled, and samples are enough.
ANY_TRUST = (fusion_pass, "require", _nothing)
#: What is broken, and which operations are changed to show it. One guard alone is no good: most have a second behind.
SABOTAGE = {
    "proof": ([NO_PROOF], aten.mul.Tensor),
    "proof and eps": ([NO_PROOF, (rotated_heads, "read_eps", lambda *_: 1e-6)], aten.add.Tensor),
    "certificate": (
        [NO_CERTIFICATE, ANY_TRUST, (operations, "is_analytic", lambda node: not operations.is_opaque(node))],
        aten.pow.Tensor_Scalar,
    ),
    "slots": ([(qk_norm_rope_cache, "shared_slots", _slots_of_the_key)], aten.index_put.default),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SABOTAGE)
def test_a_broken_matcher_is_found_out(what, monkeypatch):
    broken, target = SABOTAGE[what]
    for module, name, replacement in broken:
        monkeypatch.setattr(module, name, replacement)
    mutants = campaign.mutants_of("packed_mrope", 200, seed=1)
    mutants.where = lambda node: node.target is target
    assert any(fate.wrong is not None for fate in campaign.fates(mutants, trials=24))

"""Each part of the comparison is needed: without it, what is refused is proved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fx_fusion.proof.field import Comparison, Differs, Proved, bounds, comparison, literals, rule
from fx_fusion.proof.field.comparison import compare
from fx_fusion.proof.field.primes import random_prime
from proof.heads import PLANTED
from proof.heads import comparison as heads
from proof.test_comparison import power_of

KNOWN_PRIME = 2**31 - 1


def nothing_compared(monkeypatch):
    monkeypatch.setattr(comparison, "_compare_values", lambda trial: torch.ones_like(trial.expected))


def no_rule(monkeypatch):
    monkeypatch.setattr(comparison, "relate", lambda trial: ())
    monkeypatch.setattr(comparison, "met_in", lambda trial: ())
    monkeypatch.setattr(rule, "met_in", lambda trial: ())


def no_rule_on_divisors(monkeypatch):
    monkeypatch.setattr(rule, "_divisor", lambda met, trial: None)


def undefined_counts_as_equal(monkeypatch):
    def compared(trial):
        equal = (trial.result == trial.expected) | (trial.result < 0)
        if not bool(equal.all()):
            raise comparison.Refused("differs")
        return torch.ones_like(trial.expected)

    no_rule(monkeypatch)
    monkeypatch.setattr(comparison, "_compare_values", compared)


def any_sign_of_a_root(monkeypatch):
    monkeypatch.setattr(comparison._Proof, "_admits", lambda self, trial: True)
    monkeypatch.setattr(comparison, "random_prime", lambda chance, squares: random_prime(chance))
    monkeypatch.setattr(comparison, "agree", lambda one, other: True)
    monkeypatch.setattr(comparison, "check_places", lambda relations, trials: True)


def a_known_prime(monkeypatch):
    monkeypatch.setattr(comparison, "random_prime", lambda chance, squares: KNOWN_PRIME)


def a_known_prime_and_any_degree(monkeypatch):
    a_known_prime(monkeypatch)
    monkeypatch.setattr(bounds, "LARGEST_DEGREE", 2**40)
    monkeypatch.setattr(comparison._Claim, "fields", property(lambda self: 3))


def any_literal_near_another(monkeypatch):
    found = {1 + 2**-52: literals.Number(literals.Fraction(1))}
    monkeypatch.setattr(comparison, "near_misses", lambda *_: found)


POWER = Comparison(lambda i, at: power_of(i["x"], KNOWN_PRIME), lambda i: i["x"], {"x": (4,)})

#: What is broken, and what then passes.
SABOTAGE = {
    "values": (nothing_compared, heads(PLANTED["a factor of 1 + 2**-52"])),
    "the rule, a quotient": (no_rule, heads(PLANTED["S / S"])),
    "the rule, signs": (no_rule, heads(PLANTED["product of 14 signs"])),
    "the rule on divisors": (no_rule_on_divisors, heads(PLANTED["0 * S / S"])),
    "undefined results": (undefined_counts_as_equal, heads(PLANTED["a root of a negative"])),
    "signs of roots": (any_sign_of_a_root, heads(PLANTED["negative by a root of 169"])),
    "primes": (a_known_prime, Comparison(lambda i, at: i["x"] + 2147483647.0 * i["x"], lambda i: i["x"], {"x": (4,)})),
    "degrees": (a_known_prime_and_any_degree, POWER),
    "literals": (any_literal_near_another, heads(PLANTED["a factor of 1 + 2**-52"])),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_broken_comparison_proves_what_is_not_so(what, monkeypatch):
    sabotage, planted = SABOTAGE[what]
    assert not isinstance(compare(planted), Proved)
    sabotage(monkeypatch)
    # Each prime decides whether a constant has the wrong sign; all of four do once in sixteen times.
    assert any(isinstance(compare(replace(planted, text=str(n))), Proved) for n in range(200))


def test_an_honest_comparison_is_not_sabotaged():
    assert isinstance(compare(heads()), Proved)
    assert isinstance(compare(heads(PLANTED["S / S"])), Differs)

"""Residues that are multiples of others, whatever their order and number."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from fx_fusion.proof.field.multiples import belong, find_multiple, small_fraction
from fx_fusion.proof.field.primes import random_prime
from fx_fusion.proof.field.residues import UNDEFINED, random_residues

CHANCE = random.Random(5)
P = random_prime(CHANCE)
BASE = random_residues(P, (40,), torch.Generator().manual_seed(1))


def times(values, constant):
    return values * (constant.numerator * pow(constant.denominator, -1, P) % P) % P


FRACTIONS = [Fraction(1), Fraction(27), Fraction(1, 128), Fraction(-3, 7), Fraction(16384, 16383), Fraction(121)]


@pytest.mark.parametrize("constant", FRACTIONS, ids=str)
def test_found(constant):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for values in (BASE, BASE[order], BASE[order].repeat(3), BASE[order][:7]):
        found = find_multiple(times(values, constant), BASE, P)
        assert found is not None and found.constant == constant and found.size == 40


def test_what_is_undefined_is_left_out():
    values = torch.cat([times(BASE[:5], Fraction(3)), torch.tensor([UNDEFINED] * 4)])
    found = find_multiple(values, torch.cat([BASE, torch.tensor([UNDEFINED, 0])]), P)
    assert found is not None and found.constant == 3


def test_not_found():
    other = random_residues(P, (40,), torch.Generator().manual_seed(9))
    assert find_multiple(other, BASE, P) is None
    assert find_multiple(torch.cat([times(BASE, Fraction(3)), other[:1]]), BASE, P) is None
    assert find_multiple(torch.cat([BASE[:5], times(BASE[5:9], Fraction(2))]), BASE, P) is None
    assert find_multiple(BASE, BASE[:0], P) is None


def test_more_complicated_statements_may_hold_more_often():
    one, other = (find_multiple(times(BASE, constant), BASE, P) for constant in (Fraction(1), Fraction(5, 3)))
    assert one is not None and other is not None and one.choices == 40 < other.choices


@pytest.mark.parametrize("fraction", FRACTIONS, ids=str)
def test_small_fraction(fraction):
    assert small_fraction(int(times(torch.tensor(1), fraction)), P) == fraction


def test_no_small_fraction():
    assert small_fraction(int(times(torch.tensor(1), Fraction(1 << 15, 32771))), P) != Fraction(1 << 15, 32771)


def test_places():
    """In each field alone the values are members; across fields they are of changing ones."""
    primes = [P, random_prime(CHANCE), random_prime(CHANCE)]
    generator = torch.Generator().manual_seed(4)
    bases = [random_residues(p, (10,), generator) for p in primes]
    order = torch.randperm(10, generator=generator)
    constant = Fraction(2, 3)
    values = [base[order] * (2 * pow(3, -1, p) % p) % p for base, p in zip(bases, primes, strict=True)]
    assert belong(values, bases, constant, primes)
    assert belong([each[:3] for each in values], bases, constant, primes)
    values[2] = values[2].roll(1)
    assert not belong(values, bases, constant, primes)


def test_members_that_coincide_in_one_field():
    primes = [P, random_prime(CHANCE)]
    bases = [torch.tensor([5, 5, 7]), torch.tensor([1, 2, 3])]
    assert belong([torch.tensor([5, 5]), torch.tensor([2, 1])], bases, Fraction(1), primes)
    assert not belong([torch.tensor([7, 5]), torch.tensor([2, 1])], bases, Fraction(1), primes)

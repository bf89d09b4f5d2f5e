"""Random primes of 31 bits in which chosen integers are squares.

A prime that is known beforehand can be written into a program: ``x + 2147483647.0 * x * x`` is ``x`` modulo that
number. So each comparison draws its own, from the region and from what the operating system gave this process.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable

import sympy

#: Bounds of the primes: the product of two residues must fit an int64.
LOWER, UPPER = 1 << 30, 1 << 31

#: Primes between the bounds modulo which 2, 3, 5 and 7 are squares and -1 is none: the six classes below.
COUNT = 1_584_536

#: 2, 3, 5, 7: squares modulo every prime that is drawn.
ALWAYS_SQUARES = frozenset({2, 3, 5, 7})

_PERIOD = 840
_CLASSES = tuple(r for r in range(_PERIOD) if r % 8 == 7 and r % 3 == 2 and r % 5 in (1, 4) and r % 7 in (3, 5, 6))

_ENTROPY = os.urandom(32)


def unforeseeable(region: str) -> random.Random:
    """A source of random numbers that nobody knows who writes a region: of the region's text and this process."""
    digest = hashlib.sha256(_ENTROPY + region.encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def is_square(number: int, prime: int) -> bool:
    return pow(number, (prime - 1) // 2, prime) == 1


def random_prime(chance: random.Random, squares: Iterable[int] = ()) -> int:
    """A prime modulo which -1 is no square, and 2, 3, 5, 7 and all of `squares` are; each such prime alike."""
    wanted = [number for number in squares if number not in ALWAYS_SQUARES]
    while True:
        start = _PERIOD * chance.randrange(LOWER // _PERIOD, UPPER // _PERIOD + 1)
        prime = start + chance.choice(_CLASSES)
        if LOWER < prime < UPPER and all(is_square(n, prime) for n in wanted) and sympy.isprime(prime):
            return prime


def count_with(squares: Iterable[int]) -> float:
    """How many primes :func:`random_prime` draws from, at least: each further prime that must be a square halves them,
    up to a few in a hundred.
    """
    further = len(set(squares) - ALWAYS_SQUARES)
    return COUNT if not further else 0.9 * COUNT / 2**further

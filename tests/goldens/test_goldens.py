"""The pass does with every subject what it did when the digests were written.

A change of behaviour that is meant is written with ``run.py --write``.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest

from goldens.run import DIGESTS, environment
from goldens.snapshot import digest, text
from goldens.subjects import QUICK, subjects

GOLDEN = json.loads(DIGESTS.read_text())
SUBJECTS = {subject.name: subject for subject in subjects()}

pytestmark = pytest.mark.skipif(
    environment() != GOLDEN["environment"], reason=f"the digests were written with {GOLDEN['environment']}"
)


def pytest_generate_tests(metafunc):
    """The quick selection; all others only where ``-m slow`` asks for them: they take minutes."""
    if "name" not in metafunc.fixturenames:
        return
    quick = [name for name in SUBJECTS if any(fnmatchcase(name, glob) for glob in QUICK)]
    rest = [name for name in SUBJECTS if name not in quick] if "slow" in metafunc.config.option.markexpr else []
    metafunc.parametrize("name", [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in rest)])


def test_the_pass_does_what_it_did(name):
    found = text(SUBJECTS[name])
    assert digest(found) == GOLDEN["digests"].get(name), f"run.py --check with --only {name!r} shows it:\n{found}"


def test_every_digest_has_its_subject():
    assert set(GOLDEN["digests"]) == set(SUBJECTS)

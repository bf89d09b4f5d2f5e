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


def marked(name):
    quick = any(fnmatchcase(name, glob) for glob in QUICK)
    return pytest.param(name, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", map(marked, SUBJECTS))
def test_the_pass_does_what_it_did(name):
    found = text(SUBJECTS[name])
    assert digest(found) == GOLDEN["digests"].get(name), f"run.py --check with --only {name!r} shows it:\n{found}"


def test_every_digest_has_its_subject():
    assert set(GOLDEN["digests"]) == set(SUBJECTS)

"""Other versions of Triton emit other instructions, which the strict simulator does not know."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

KNOWN = "3.6."
OF_COMPILED_CODE = {"test_aot.py", "test_execution.py", "test_resources.py", "test_strictness.py"}


def pytest_collection_modifyitems(items):
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return
    if found.startswith(KNOWN):
        return
    skip = pytest.mark.skip(reason=f"made for the machine code of Triton {KNOWN}x, found {found}")
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in OF_COMPILED_CODE:
            item.add_marker(skip)

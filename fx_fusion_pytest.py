"""pytest plugin: what fx_fusion did in a test, and its report beside every failure.

PyTorch is not imported here: in a run that does not use fx_fusion, the plugin costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fx_fusion import FusionReport

_BEFORE: pytest.StashKey[dict[str, int]] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember what was compiled before the test."""
    item.stash[_BEFORE] = _snapshot()


@pytest.fixture
def fusion_report(request: pytest.FixtureRequest) -> Callable[[], FusionReport]:
    """``fusion_report()`` is the report of all graphs that this test compiled with fx_fusion so far, merged."""

    def report() -> FusionReport:
        found = _report(request.node)
        if found is None:
            pytest.fail('fusion_report: nothing was compiled with backend="fx_fusion" in this test so far')
        return found

    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails after a compilation shows the report."""
    outcome = yield
    if outcome.failed:
        report = _report(item)
        if report is not None:
            outcome.sections.append(("fx_fusion", str(report)))
    return outcome


def _snapshot() -> dict[str, int]:
    reports = _reports()
    return reports.snapshot() if reports is not None else {}


def _report(item: pytest.Item) -> FusionReport | None:
    reports = _reports()
    found = reports.since(item.stash.get(_BEFORE, {})) if reports is not None else []
    if not found:
        return None
    from fx_fusion.trace import merge

    return merge(found)


def _reports() -> Any:
    module = sys.modules.get("fx_fusion.report")
    return module and module.REPORTS

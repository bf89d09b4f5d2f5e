"""The pytest plugin: the fixture, the report beside a failure, and that it leaves other runs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

ROOT = Path(__file__).parents[1]

TESTS = """
import torch

def relu(x):
    return torch.relu(x) + 1

def compile_it():
    torch._dynamo.reset()
    options = {"fx_fusion.inner": "eager"}
    with torch.no_grad():
        torch.compile(relu, backend="fx_fusion", options=options)(torch.ones(2))

def test_fixture(fusion_report):
    compile_it()
    assert fusion_report().declined[0].code == "store.missing"

def test_shows_the_report():
    compile_it()
    assert False

def test_nothing_compiled(fusion_report):
    fusion_report()

def test_unrelated():
    assert False
"""


def test_fixture_and_failures(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("import fx_fusion\n" + TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(["*test_shows_the_report*", "*- fx_fusion -*", "*store.missing*"])
    result.stdout.fnmatch_lines(["*fusion_report: nothing was compiled*"])
    text = result.stdout.str()
    assert text.count("- fx_fusion -") == 1, "shown with a test that compiled nothing"


def test_torch_is_not_imported():
    code = "import fx_fusion_pytest, sys; assert 'torch' not in sys.modules and 'fx_fusion' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["pytest11"])
def test_the_entry_point_is_declared(name):
    text = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points.{name}]\nfx_fusion = "fx_fusion_pytest"' in text

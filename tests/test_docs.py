"""What is written down is still true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fx_fusion
from fx_fusion import fusion_pass
from fx_fusion.decline import CODES, markdown
from fx_fusion.graph_capture import hazards

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_table_of_declines_is_generated():
    assert (ROOT / "docs" / "declines.md").read_text() == markdown(), "run `make docs`"


def test_the_table_of_hazards_is_generated():
    assert (ROOT / "docs" / "hazards.md").read_text() == hazards.markdown(), "run `make docs`"


def test_every_hazard_can_be_found():
    source = "".join(
        (ROOT / "fx_fusion" / "graph_capture" / name).read_text() for name in ("hazards.py", "hazard_rules.py")
    )
    for code in hazards.HAZARDS:
        assert source.count(f'"{code}"') >= 2, f"{code} is never found"


def test_every_code_in_the_table_can_be_raised():
    source = "\n".join(path.read_text() for path in fusion_pass._sources())
    for code in CODES:
        assert source.count(f'"{code}"') >= 2, f"{code} is never raised"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_options_in_the_docs_exist():
    text = (ROOT / "docs" / "backend.md").read_text()
    named = set(re.findall(r"`fx_fusion\.(\w+)`", text)) - {"explain", "last_report", "register_fusion", "testing"}
    assert named == {field for field in fx_fusion.Config.__dataclass_fields__}


def test_layout_of_the_package():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    allowed = {
        "fx_fusion_pytest.py", "fx_fusion_vllm.py", "fx_fusion_vllm_pass.py", "__pycache__",
        "fx_fusion", "patterns", "kernels", "tests", "examples", "docs", "pyproject.toml", "README.md", "LICENSE",
        "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "fx_fusion.egg-info", "build", "dist",
    }  # fmt: skip
    assert names <= allowed
    for folder in ("patterns", "kernels"):
        assert (ROOT / "fx_fusion" / folder).is_symlink()
        assert not (ROOT / folder / "__init__.py").exists(), "it would shadow the PyPI package 'kernels'"


def test_public_names_are_documented():
    """In words of their own: a dataclass without a docstring gets its signature for one."""
    for name in fx_fusion.__all__:
        value = getattr(fx_fusion, name)
        if callable(value):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name

"""Pages for mkdocs: the repository's own Markdown, where its links lead, and a reference of the public names.

    python docs/site.py      # stages the pages; mkdocs build then makes the site (make site)

The order of the pages is here. One that is not there yet is left out, and one that is not listed comes last.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "site-pages"
#: A copy of the package in which no folder is a link and each has an ``__init__``: the reader of docstrings wants both.
SOURCES = ROOT / "build" / "site-sources"

SECTIONS: dict[str, list[str]] = {
    "Start": [
        "README.md",
        "docs/concepts.md",
        "docs/proof.md",
        "docs/backend.md",
        "docs/coverage.md",
        "docs/compared.md",
    ],
    "See what happens": ["docs/explain.md", "docs/reports.md", "docs/declines.md", "docs/doctor.md", "docs/patch.md"],
    "Your own": ["docs/own_fusions.md", "docs/own_kernels.md", "docs/meanings.md", "docs/testing.md"],
    "In production": ["docs/vllm.md", "docs/capture.md", "docs/hazards.md", "docs/kernels.md", "docs/tuning.md"],
    "Contributing": [
        "CONTRIBUTING.md",
        "docs/contributing/layers.md",
        "docs/contributing/style.md",
        "docs/contributing/vocabulary.md",
    ],
    "Reference": ["reference.md", "docs/verification.md", "docs/mutation.md", "CHANGELOG.md"],
}
_SUFFIXES = (".md", ".py", ".json", ".svg", ".png", ".txt")


# --- staging --------------------------------------------------------------------------------------------------------


def stage() -> None:
    """Copy pages and what they link to, each where it lies in the repository."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        _copy(ROOT / name)
    for folder in ("docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in _SUFFIXES and "__pycache__" not in path.parts:
                _copy(path)
    (PAGES / "reference.md").write_text(reference())
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(ROOT / "fx_fusion", SOURCES / "fx_fusion", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (SOURCES / "fx_fusion").rglob("*/"):
        if folder.is_dir():
            (folder / "__init__.py").touch()


def _copy(path: Path) -> None:
    target = PAGES / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def reference() -> str:
    """A page on which mkdocstrings puts the docstring of each public name."""
    import fx_fusion
    from fx_fusion import testing

    names = [f"fx_fusion.{name}" for name in fx_fusion.__all__ if name not in ("CODES", "__version__")]
    tests = [
        f"fx_fusion.testing.{name}"
        for name, value in vars(testing).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == testing.__name__ and callable(value)
    ]
    return "# Reference\n\n" + "\n\n".join(f"::: {name}" for name in [*names, *tests]) + "\n"


# --- hooks of mkdocs ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The pages that are there, in order."""
    there = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    listed = {page for pages in SECTIONS.values() for page in pages}
    nav = [{title: [page for page in pages if page in there]} for title, pages in SECTIONS.items()]
    more = sorted(page for page in there - listed if page.startswith("docs/"))
    config["nav"] = [*nav, {"More": more}] if more else nav
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name what they refer to as Sphinx does."""
    return re.sub(r":(?:class|func|meth|data|mod|attr):<code>~?([\w.]+)</code>", r"<code>\1</code>", html)


if __name__ == "__main__":
    stage()

"""Run by tests/packaging.sh with the installed package, away from the sources: is all of it there, and does it work?"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
import tarfile
from pathlib import Path

import torch

import fx_fusion

HOME = Path(fx_fusion.__file__).parent
WORK = Path(sys.argv[1])


def check(what: str, holds: object) -> None:
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


check(f"imported from the wheel, {HOME}", HOME.is_relative_to(WORK))
check("versions agree", importlib.metadata.version("fx_fusion") == fx_fusion.__version__)
check("py.typed", (HOME / "py.typed").exists())
check("the page's style", (HOME / "reporting" / "html.css").read_text().strip())

source = next(path for path in (WORK / "source").iterdir() if path.name == "fx_fusion")
wanted = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
wanted |= {
    path.relative_to(source.parent).as_posix()
    for name in ("patterns", "kernels")
    for path in (source.parent / name).rglob("*.py")
}
found = {path.relative_to(HOME).as_posix() for path in HOME.rglob("*.py")}
check(f"all {len(wanted)} modules are packaged, missing: {sorted(wanted - found)}", wanted <= found)

#: What needs a package that the clean environment may lack.
OPTIONAL = ("pytest", "aiter", "vllm", "sglang")
for module in pkgutil.walk_packages([str(HOME)], "fx_fusion."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        check(f"{module.name} needs only optional packages ({error.name})", error.name in OPTIONAL)
check("every module can be imported", True)

with tarfile.open(next((WORK / "dist").glob("*.tar.gz"))) as sdist:
    names = {name.partition("/")[2] for name in sdist.getnames()}
check("the sdist holds licence, readme and sources", {"LICENSE", "README.md", "pyproject.toml"} <= names)


def scale(x: torch.Tensor) -> torch.Tensor:
    return x * 2


options = {"fx_fusion.inner": "eager"}
compiled = torch.compile(scale, backend="fx_fusion", options=options)
check("the entry point is torch.compile's", "fx_fusion" in torch._dynamo.list_backends(None))
check("a function compiles", torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0)))

from fx_fusion.__main__ import main  # noqa: E402

check("python -m fx_fusion doctor", main(["doctor", "--kernel", "reference"]) == 0)

"""Each arrow of the house goes down: what imports what, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from fx_fusion.decline import CODES

ROOT = Path(__file__).parents[1]

#: Rooms of the package (modules and packages at its root), the lowest first. A room imports from lower layers only;
#: those that share a layer know nothing of each other.
LAYERS = (
    ("version", "decline"),
    ("graph",),
    ("cache_folder", "fingerprint"),
    ("report",),
    ("kernels", "proof"),
    ("graph_capture",),
    ("placement",),
    ("semantics",),
    ("fusion",),
    ("patterns", "function_fusions"),
    ("observer", "config"),
    ("fusion_pass",),
    ("trace",),
    ("backend",),
    ("mutation", "reporting", "engines"),
    ("kernel_registration", "registration", "testing", "cli"),
    ("__init__",),
    ("__main__",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def _modules() -> Iterator[tuple[str, Path]]:
    """Every module by its full name; `patterns` and `kernels` lie beside the package, which links to them."""
    for folder, prefix in (("fx_fusion", ""), ("patterns", "fx_fusion."), ("kernels", "fx_fusion.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] not in (("fx_fusion", "patterns"), ("fx_fusion", "kernels")):
                yield prefix + ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(_modules())


def _imports(module: str) -> Iterator[tuple[str, int]]:
    """(module imported, line)"""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}:{node.lineno}: write the module's full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in MODULES else node.module, node.lineno) for name in names)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_a_layer():
    rooms = {_room(module) for module in MODULES}
    assert rooms <= set(LAYER), f"say in LAYERS on what {sorted(rooms - set(LAYER))} may build"


@pytest.mark.parametrize("room", LAYER)
def test_a_room_imports_from_lower_layers_only(room):
    wrong = [
        f"{module}:{line} imports {imported}"
        for module in MODULES
        if _room(module) == room
        for imported, line in _imports(module)
        if imported.split(".")[0] == "fx_fusion" and _room(imported) != room and LAYER[_room(imported)] >= LAYER[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_in_a_cycle():
    arrows = nx.DiGraph()
    arrows.add_edges_from((module, imported) for module in MODULES for imported, _ in _imports(module))
    cycle = next((cycle for cycle in nx.strongly_connected_components(arrows) if len(cycle) > 1), set())
    assert not cycle, sorted(cycle)


def test_the_package_is_imported_by_its_full_name():
    """``import kernels`` would be a second copy, which registers every operation twice."""
    for module in MODULES:
        strange = [imported for imported, _ in _imports(module) if imported.split(".")[0] in ("kernels", "patterns")]
        assert not strange, f"{module} imports {strange}"


@pytest.mark.parametrize("module", ["fusion", "fusion_pass", "report", "observer", "trace", "backend"])
def test_the_engine_names_no_code_of_a_fusion(module):
    source = MODULES[f"fx_fusion.{module}"].read_text()
    named = [code for code in CODES if f'"{code}"' in source]
    assert {code.split(".")[0] for code in named} <= {"graph", "report", "internal"}, named


def _private_names(module: str) -> Iterator[str]:
    """What of PyTorch lies behind an underscore, or is called experimental; operations have names of their own."""
    tree = ast.parse(MODULES[module].read_text())
    chains = [_dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    imported = [name for node in ast.walk(tree) for name in _names_imported(node)]
    for name in (*chains, *imported):
        parts = name.split(".")
        inner = [part for part in parts[1:] if not part.startswith("__")]
        is_private = any(part.startswith("_") or part == "experimental" for part in inner)
        if parts[0] == "torch" and parts[1:2] != ["ops"] and is_private:
            yield name


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _names_imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_only_torch_compat_names_what_pytorch_keeps_private():
    found = {module: sorted(set(_private_names(module))) for module in MODULES}
    named = {module: names for module, names in found.items() if names}
    assert list(named) == ["fx_fusion.graph.torch_compat"], named
    assert len(named["fx_fusion.graph.torch_compat"]) > 40

"""The import graph: no cycle anywhere, and packages import only what lies below them.

Every import statement counts: at the top of a module, inside a function, and under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"npqwen": ROOT / "npqwen", "npqwen_quant": ROOT / "quant" / "npqwen_quant"}

LAYERS = (
    "npqwen.__main__ npqwen.ray",
    "npqwen.commands",
    "npqwen.terminal",
    "npqwen.server",
    "npqwen.reports",
    "npqwen",  # the names that users import
    "npqwen.reports.evaluation npqwen.reports.verification",
    "npqwen.reports.evaluation_report",
    "npqwen.model npqwen.hub",
    "npqwen_quant",
    "npqwen.retrieval",
    "npqwen.chat",
    "npqwen.tools",
    "npqwen.generation",
    "npqwen.structure",
    "npqwen.engine",
    "npqwen.kernels",
    "npqwen.simd",
    "npqwen.tokenizer",
    "npqwen.format",
    "npqwen.hardware npqwen.atomic_file npqwen.cache_directory npqwen.file_lock",
    "npqwen.checks npqwen.progress npqwen.text_file",
    "npqwen.errors npqwen.wording",
)
"""From top to bottom. A package or module imports from its own entry and from those below."""

SHARED = {
    "npqwen.atomic_file", "npqwen.checks", "npqwen.errors", "npqwen.file_lock", "npqwen.format", "npqwen.hardware",
    "npqwen.progress", "npqwen.wording",
}  # fmt: skip
"""What npqwen_quant uses of npqwen, beside `npqwen.kernels.compiled`, the cache of machine code, and
`npqwen.engine.rope`, which is plain NumPy."""

Graph = Mapping[str, frozenset[str]]


def module_name(package: str, file: Path) -> str:
    parts = file.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imported(tree: ast.AST, modules: Container[str | None]) -> Iterator[str]:
    """Names of those of `modules` that the code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module in modules:
                    yield str(node.module)


def import_graph() -> Graph:
    """Every module of both packages, and the modules it imports."""
    files = {module_name(package, file): file for package, top in SOURCES.items() for file in sorted(top.rglob("*.py"))}
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: frozenset(imported(tree, files)) - {name} for name, tree in trees.items()}


def reachable(graph: Graph, start: str) -> set[str]:
    """All modules that `start` imports, directly or not."""
    found: set[str] = set()
    rest = [start]
    while rest:
        for name in graph[rest.pop()]:
            if name not in found:
                found.add(name)
                rest.append(name)
    return found


def cycles(graph: Graph) -> set[frozenset[str]]:
    """The groups of modules that import each other."""
    below = {name: reachable(graph, name) for name in graph}
    return {
        frozenset(other for other in below[name] if name in below[other]) for name in graph if name in below[name]
    }


def layer(module: str) -> int:
    """The index in LAYERS of the longest entry that the module belongs to."""
    entries = [(name, i) for i, names in enumerate(LAYERS) for name in names.split()]
    name, i = max((entry for entry in entries if f"{module}.".startswith(f"{entry[0]}.")), key=lambda e: len(e[0]))
    assert name != "npqwen" or module == name, f"{module} has no layer"
    return i


GRAPH = import_graph()


def test_no_modules_import_each_other() -> None:
    assert cycles(GRAPH) == set()


def test_imports_go_down() -> None:
    assert {(name, other) for name in GRAPH for other in GRAPH[name] if layer(other) < layer(name)} == set()


def test_the_converter_uses_only_what_is_shared() -> None:
    used = {other for name in GRAPH if name.startswith("npqwen_quant") for other in GRAPH[name]}
    foreign = {
        name
        for name in used
        if not name.startswith("npqwen_quant")
        and ".".join(name.split(".")[:2]) not in SHARED
        and name not in ("npqwen.kernels.compiled", "npqwen.engine.rope")
    }
    assert foreign == set()


def test_every_kind_of_import_is_seen() -> None:
    code = """
from a import b, name
import c.d
if TYPE_CHECKING:
    from e import f
def g():
    from h import i
"""
    modules = {"a", "a.b", "c.d", "e", "h.i"}
    assert sorted(imported(ast.parse(code), modules)) == ["a", "a.b", "c.d", "e", "h.i"]
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b"), "d": frozenset("a")}
    assert cycles(graph) == {frozenset("bc")}

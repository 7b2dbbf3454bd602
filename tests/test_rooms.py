"""The rooms of the package: who may import whom, read from the sources without importing any."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What each room may import of the others.
MAY_IMPORT = {
    "method": set(),
    "objectives": {"method"},
    "evaluation": {"method"},
    "run": {"method", "objectives", "evaluation"},
    "cli": {"method", "objectives", "evaluation", "run"},
}
# Flax is a dependency as well, but its import takes long: only those who use eupmu_jax.flax wait for it.
CORE = {"jax", "jaxlib", "optax", "chex", "numpy"} | sys.stdlib_module_names


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted((ROOT / "eupmu_jax").rglob("*.py"))}


def statements(node: ast.AST, inside_functions: bool):
    """All nodes below, of functions only where they are asked for: those run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from statements(child, inside_functions)


def imports(module: str, inside_functions: bool = False) -> set[str]:
    """The modules that a module names in its import statements."""
    found = set()
    for node in statements(ast.parse(SOURCES[module].read_text()), inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by the full name"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | (names & SOURCES.keys())
    return found


def imported_with(module: str) -> set[str]:
    """The package's modules and all other top-level packages that `import module` runs."""
    seen, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if name in SOURCES:
            parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
            waiting |= (imports(name) | parents) - seen
        else:
            seen.add(name.partition(".")[0])
    return {name for name in seen if name in SOURCES or "." not in name}


def room(module: str) -> str | None:
    """`method` of `eupmu_jax.method.state`; None for a module that stands beside the rooms."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return name if package == "eupmu_jax" and name in MAY_IMPORT else None


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_rooms_import_only_what_lies_below_them(name):
    modules = [module for module in SOURCES if room(module) == name]
    assert modules
    for module in modules:
        of_rooms = {room(imported) for imported in imports(module, inside_functions=True)}
        assert of_rooms - {None, name} <= MAY_IMPORT[name], module


@pytest.mark.parametrize(
    "name", ["eupmu_jax", "eupmu_jax.objectives", "eupmu_jax.evaluation", "eupmu_jax.flax"]
)
def test_import_needs_no_extra(name):
    others = {module for module in imported_with(name) if module not in SOURCES}
    assert "jax" in others
    assert others <= CORE | ({"flax"} if name == "eupmu_jax.flax" else set())


@pytest.mark.parametrize("name", ["method", "run", "cli"])
def test_a_room_holds_nothing_but_its_modules(name):
    """One name for each function: no second one through the room."""
    (docstring,) = ast.parse((ROOT / "eupmu_jax" / name / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)


def test_files_are_named_without_underscores_in_front():
    folders = ("eupmu_jax", "experiments", "tests")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.startswith("_")} <= {"__init__.py", "__main__.py"}

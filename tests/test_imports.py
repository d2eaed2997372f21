"""The import rule of the layout and the form of a script, read from the source files."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.support import ROOT

# A package may import itself and those listed here; "moco" stands for the modules directly in moco/.
MAY_IMPORT = {
    "moco": set(),
    "moco.networks": {"moco"},
    "moco.data": {"moco"},
    "moco.videos": {"moco", "moco.data"},
    "moco.training": {"moco", "moco.networks", "moco.data"},
    "moco.analysis": {"moco", "moco.networks", "moco.data"},
}
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("moco/**/*.py"))}
MODULES = {name.removesuffix(".__init__"): path for path, name in MODULES.items() if ".venv" not in path.parts}
SCRIPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TOOLS = {f"scripts.{path.stem}": path for path in sorted((ROOT / "scripts").glob("*.py"))}
PROGRAM = MODULES | SCRIPTS | TOOLS


def imports(path):
    """The names of all modules, of this project and others, that the file at path imports anywhere."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path} has a wildcard import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(PROGRAM)
            imported |= inner or {node.module}
    return imported


def package(module):
    """The package that a module of moco is in."""
    return module if module in MAY_IMPORT else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_packages_below_it(module):
    own = package(module)
    for other in imports(MODULES[module]) & set(PROGRAM):
        assert other in MODULES, f"{module} imports the script {other}"
        allowed = MAY_IMPORT[own] | {own} | ({"moco.networks"} if module == "moco.builder" else set())
        assert package(other) in allowed, f"{module} imports {other}"


def test_there_are_no_circular_imports():
    TopologicalSorter({name: imports(path) & set(PROGRAM) for name, path in PROGRAM.items()}).prepare()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_other_script(script):
    allowed = {"moco_utils"} if script in ("moco_img", "moco_temp") else set()
    assert not imports(SCRIPTS[script]) & (set(SCRIPTS) | set(TOOLS)) - allowed


@pytest.mark.parametrize("module", [*MODULES, *SCRIPTS])
def test_only_plots_imports_matplotlib(module):
    assert module == "moco.plots" or not any(name.startswith("matplotlib") for name in imports(PROGRAM[module]))


@pytest.mark.parametrize("module", PROGRAM)
def test_no_file_is_longer_than_400_lines(module):
    """A longer one has two subjects."""
    assert len(PROGRAM[module].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "moco_utils"])
def test_a_script_has_its_command_in_its_docstring_and_the_usual_last_line(script):
    text = SCRIPTS[script].read_text(encoding="utf-8")
    assert f"python {script}.py" in ast.get_docstring(ast.parse(text))
    assert text.endswith('if __name__ == "__main__":\n    cli.run(main)\n')


def test_the_map_lists_every_module():
    """moco/__init__.py has one line a module, below the name of its package."""
    package, listed = "moco", set()
    for line in ast.get_docstring(ast.parse(MODULES["moco"].read_text(encoding="utf-8"))).splitlines():
        if match := re.fullmatch(r"    (\w+)/( .*)?", line):
            package = f"moco.{match[1]}"
        elif match := re.fullmatch(r"    (    )?(\w+) {2,}\S.*", line):
            assert bool(match[1]) == (package != "moco"), line
            listed.add(f"{package}.{match[2]}")
    assert listed == set(MODULES) - set(MAY_IMPORT)

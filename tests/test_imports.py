"""Who may import whom, and what a script looks like: the rule of the layout, read from the source files."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.support import ROOT

# A package may import itself and those named here; "moco" stands for the modules directly in moco/.
MAY_IMPORT = {
    "moco": set(),
    "moco.data": {"moco"},
    "moco.videos": {"moco", "moco.data"},
    "moco.training": {"moco", "moco.data"},
    "moco.analysis": {"moco", "moco.data", "moco.videos"},
}
MODULES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("moco/**/*.py"))}
MODULES = {name.removesuffix(".__init__"): path for path, name in MODULES.items() if ".venv" not in path.parts}
SCRIPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TOOLS = {f"scripts.{path.stem}": path for path in sorted((ROOT / "scripts").glob("*.py"))}
PROGRAM = MODULES | SCRIPTS | TOOLS


def imports(path):
    """The names of all modules of this project that the file at path imports, anywhere in it, and of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path} has a wildcard import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(PROGRAM)
            found |= inner or {node.module}
    return found


def package(module):
    """The package that a module of moco is in."""
    return module if module in MAY_IMPORT else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_what_it_may(module):
    own = package(module)
    for other in imports(MODULES[module]) & set(PROGRAM):
        assert other in MODULES, f"{module} imports the script {other}"
        assert package(other) in MAY_IMPORT[own] | {own}, f"{module} imports {other}"


def test_no_imports_go_in_circles():
    TopologicalSorter({name: imports(path) & set(PROGRAM) for name, path in PROGRAM.items()}).prepare()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_other(script):
    allowed = {"moco_utils"} if script in ("moco_img", "moco_temp") else set()
    assert not imports(SCRIPTS[script]) & (set(SCRIPTS) | set(TOOLS)) - allowed


@pytest.mark.parametrize("module", [*MODULES, *SCRIPTS])
def test_only_plots_draws_with_matplotlib(module):
    assert module == "moco.plots" or not any(name.startswith("matplotlib") for name in imports(PROGRAM[module]))


@pytest.mark.parametrize("module", PROGRAM)
def test_a_file_has_one_subject(module):
    """A file above 400 lines has two."""
    assert len(PROGRAM[module].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "moco_utils"])
def test_a_script_says_what_it_does_and_ends_the_usual_way(script):
    text = SCRIPTS[script].read_text(encoding="utf-8")
    assert f"python {script}.py" in ast.get_docstring(ast.parse(text))
    assert text.endswith('if __name__ == "__main__":\n    cli.run(main)\n')

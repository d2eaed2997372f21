"""The house: who may import whom, how long a file may be, what a script looks like."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(["cli", "files"], 0),
    **dict.fromkeys(["distributed", "models", "augment", "index", "manifest", "cpu"], 1),
    **dict.fromkeys(["video", "film", "folders", "parallel"], 1),
    **dict.fromkeys(["loader", "builder", "checkpoint", "splits", "totals", "reader"], 2),
    **dict.fromkeys(["engine", "run", "features", "evaluation"], 3),
    **dict.fromkeys(["plots", "units", "clip"], 4),
    "report": 5,
}
MODULES = sorted(path for path in (ROOT / "moco").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(ROOT.glob("*.py"))
EVERYTHING = sorted([*MODULES, *SCRIPTS, *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").glob("*.py")])


def name(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """The names of all modules that the file at path imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path} has a wildcard import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def moco_modules(path):
    return {found.split(".")[1] for found in imports(path) if found.startswith("moco.")} & set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_imports_only_from_floors_below(path):
    assert path.stem in FLOORS, f"{path.stem} stands on no floor"
    assert all(FLOORS[other] < FLOORS[path.stem] or FLOORS[other] == 0 for other in moco_modules(path))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name)
def test_nobody_imports_a_script_and_only_plots_imports_matplotlib(path):
    allowed = {"moco_utils"} if path.stem in ("moco_img", "moco_temp") else set()
    assert not imports(path) & ({script.stem for script in SCRIPTS} - allowed)
    assert path.stem == "plots" or not any(found.startswith("matplotlib") for found in imports(path))


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_no_file_is_longer_than_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem != "moco_utils"], ids=name)
def test_a_script_says_what_it_does_and_ends_the_usual_way(path):
    text = path.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text))
    assert f"python {path.name}" in doc
    assert text.endswith('if __name__ == "__main__":\n    cli.run(main)\n')

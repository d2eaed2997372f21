"""The shell scripts: installation, errors as one line, flags that exist."""

import importlib
import os
import re
import shutil
import subprocess

import pytest

from tests.support import ROOT
from tests.support.shell import run_bash, write_program

SHELL = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / "tests" / "scripts" / "slurm.sh", ROOT / ".ci" / "run"])

# A Python that records its calls in calls.txt and creates virtual environments of itself.
FAKE_PYTHON = """
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv .venv") [ -z "$NO_VENV" ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) exit "${PIP_STATUS:-0}" ;;
    *version_info*) exit "${TOO_OLD:-0}" ;;
    -V) echo "Python 3.9.2" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A project that has only its requirements and setup.sh, in a folder whose name has a space."""
    project = tmp_path / "a project"
    for name in ("scripts/setup.sh", "requirements.txt", "tests/requirements.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    write_program(tmp_path / "python", FAKE_PYTHON)
    return project


def setup(project, *arguments, **environment):
    """Run setup.sh from another folder; returns its result and the calls of pip."""
    calls = project.parent / "calls.txt"
    calls.write_text("")
    environment = {"PYTHON": project.parent / "python", "CALLS": calls} | environment
    done = run_bash(project / "scripts" / "setup.sh", *arguments, cwd=project.parent, **environment)
    return done, [line for line in calls.read_text().splitlines() if " pip " in line]


def test_setup_installs_a_file_again_only_after_it_changed(project):
    done, pip = setup(project)
    assert done.returncode == 0, done.stderr
    assert len(pip) == 1 and pip[0].endswith("--requirement=requirements.txt")
    assert setup(project)[1] == []
    assert setup(project, "tests/requirements.txt")[1][0].endswith("--requirement=tests/requirements.txt")
    assert setup(project, "tests/requirements.txt")[1] == []
    with open(project / "requirements.txt", "a") as file:
        file.write("another==1.0\n")
    assert setup(project, "tests/requirements.txt")[1][0].endswith("pip-version-check --requirement=requirements.txt")
    assert setup(project)[1] == []


def test_a_failed_installation_is_retried(project):
    done, _ = setup(project, PIP_STATUS="1")
    assert done.returncode == 2 and "could not install requirements.txt" in done.stderr
    assert len(setup(project)[1]) == 1


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"TOO_OLD": "1"}, "is Python 3.9.2; Python 3.11 or newer is needed"),
        ({"PYTHON": "no-such-python"}, "there is no no-such-python; install"),
        ({"NO_VENV": "1"}, "cannot create a virtual environment"),
    ],
)
def test_an_unsuitable_python_is_one_line(project, environment, message):
    done, pip = setup(project, **environment)
    assert done.returncode == 2 and not pip
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (project / ".venv").exists()


def test_a_broken_environment_is_named(project):
    write_program(project / ".venv" / "bin" / "python", "exit 1")
    done, _ = setup(project)
    assert done.returncode == 2 and ".venv has no working Python" in done.stderr


def test_a_missing_requirements_file_is_named(project):
    done, pip = setup(project, "other.txt")
    assert done.returncode == 2 and "other.txt" in done.stderr and not pip


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_well_formed_and_stop_at_the_first_mistake(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


@pytest.mark.skipif(not (shutil.which("shellcheck") or os.environ.get("CI")), reason="needs shellcheck")
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(["shellcheck", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_ends_with_the_tests():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "bash scripts/test.sh"


def test_the_demo_names_a_missing_folder_before_any_work(tmp_path):
    done = run_bash("demo.sh", "no/videos", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == ["demo.sh: error: there is no folder no/videos; give a folder of videos"]


def flags_of(words):
    """The flags in a command line."""
    return {word for word in words if word.startswith("--")}


def known_flags(script, capsys):
    """The flags in the help of a script, of the top level or of scripts/."""
    name = script.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name if "." in name or (ROOT / script).exists() else f"scripts.{name}")
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    return flags_of(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_every_flag_of_the_demo_exists(capsys):
    """Each flag that demo.sh passes to a script is in the script's help."""
    lines = [line.strip() for line in (ROOT / "scripts" / "demo.sh").read_text().replace("\\\n", " ").splitlines()]
    arrays = dict(re.findall(r"^(\w+)=\((.*)\)$", "\n".join(lines), re.MULTILINE))
    calls = [line.split()[1:] for line in lines if re.match(r'"\$python" \S+\.py ', line)]
    assert len(calls) > 10
    for script, *words in calls:
        for name in re.findall(r'"\$\{(\w+)\[@\]\}"', " ".join(words)):
            words += arrays.get(name, "").split()
        assert flags_of(words) <= known_flags(script, capsys), script

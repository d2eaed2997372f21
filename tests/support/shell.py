"""Shell scripts of the project, and programs that stand in for others."""

import os
import subprocess

from tests.support import ROOT


def write_program(path, text):
    """Write an executable of the text of a shell script; returns path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def run_bash(script, *arguments, cwd, **variables):
    """Run a script by its name in scripts/, or by its path, outside of SLURM and with further environment variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)

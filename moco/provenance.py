"""The origin of a result: args.json with the flags, versions, commit and checkpoints of a run."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from moco import files
from moco.cli import UserError, program

NOT_RECORDED = ("override", "overwrite")  # flags about earlier results


def flags(args):
    """The flags in args, an argparse.Namespace, as a dict of plain values."""
    recorded = {flag: value for flag, value in vars(args).items() if flag not in NOT_RECORDED}
    return {flag: str(value) if isinstance(value, Path) else value for flag, value in recorded.items()}


def write(folder, flags, checkpoints=None):
    """Write args.json into folder: flags, versions, commit and, if given, checkpoints as {name: SHA-256}.

    If another script has left its args.json there, such as the training whose folder an analysis writes into, the file
    is called args_SCRIPT.json.
    """
    path, script = Path(folder) / "args.json", Path(program()).stem
    if path.exists() and _is_of_another(path, script):
        path = path.with_name(f"args_{script}.json")
    record = {**flags, "script": script, "versions": versions(), "commit": commit()}
    if checkpoints:
        record["checkpoints"] = checkpoints
    files.write_json(path, record)


def _is_of_another(path, script):
    """Whether the record at path is that of another script; an old or damaged one is not known to be."""
    try:
        return files.read_json(path).get("script", script) != script
    except UserError:
        return False


def versions():
    """The versions of Python, torch and NumPy."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def commit():
    """The git commit of this code; None without git or outside a repository."""
    git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def sha256(path):
    """The SHA-256 digest of the file at path, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where a result comes from: args.json, with the flags, versions, commit and checkpoints of a run."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from moco import files

NOT_RECORDED = ("override", "overwrite")  # flags that say what to do with an earlier result


def flags(args):
    """The flags of a run as a dict of plain values."""
    recorded = {flag: value for flag, value in vars(args).items() if flag not in NOT_RECORDED}
    return {flag: str(value) if isinstance(value, Path) else value for flag, value in recorded.items()}


def write(folder, flags, checkpoints=None):
    """Write args.json into folder: the flags, the versions, the commit, and {name: SHA-256} of checkpoints used."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {**flags, "versions": versions, "commit": commit()}
    if checkpoints:
        record["checkpoints"] = checkpoints
    files.write_json(Path(folder) / "args.json", record)


def commit():
    """The commit of this code, or None where git does not know it."""
    git = ["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def sha256(path):
    """The SHA-256 of the file at path, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

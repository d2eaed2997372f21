"""The origin of a result: args.json with the flags, versions, commit and checkpoints of a run."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from moco import files

NOT_RECORDED = ("override", "overwrite")  # flags about earlier results


def flags(args):
    """The flags in args, an argparse.Namespace, as a dict of plain values."""
    recorded = {flag: value for flag, value in vars(args).items() if flag not in NOT_RECORDED}
    return {flag: str(value) if isinstance(value, Path) else value for flag, value in recorded.items()}


def write(folder, args, checkpoints=None):
    """Write args.json into folder: flags, versions, commit and, if given, checkpoints as {name: SHA-256}."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {**flags(args), "versions": versions, "commit": commit()}
    if checkpoints:
        record["checkpoints"] = checkpoints
    files.write_json(Path(folder) / "args.json", record)


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

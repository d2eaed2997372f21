"""Checkpoints: read without running anything in them, and written atomically."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from moco import files
from moco.cli import UserError


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or unsafe, or does not fit; the message names the file and the reason."""


def read(path):
    """The content of the checkpoint at path, its tensors on the CPU; no code in it is ever run.

    path: a file, or a folder as Hugging Face's libraries write it. Safetensors give a flat dict of tensors. Objects
    that are neither torch's nor NumPy's are not created, and a line names what they would have been. CheckpointError
    for a file that is missing, damaged (zip files are checked byte for byte) or refused.
    """
    content = {}
    for part in (parts := _parts(Path(path))):
        content = _read_file(part) if len(parts) == 1 else content | _read_file(part)
    return content


def sha256(path):
    """The SHA-256 of a checkpoint; of those of its files one after the other, if it is a folder with several."""
    digests = [files.sha256(part) for part in _parts(Path(path))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _parts(path):
    """The files of the checkpoint at path: path itself, or those with the weights in a folder."""
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{name}.index.json").is_file():
            return [path / part for part in sorted(set(files.read_json(index)["weight_map"].values()))]
        if (path / name).is_file():
            return [path / name]
    found = sorted(
        each.name for each in path.iterdir() if each.suffix in (".tar", ".pth", ".pt", ".ckpt", ".safetensors")
    )
    raise CheckpointError(f"{path} is a folder; give a checkpoint in it: {', '.join(found[:5]) or 'it has none'}")


def _read_file(path):
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; check the path (README.md links released ones)")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read checkpoint {path}; change its permissions") from error
    except Exception as error:  # torch raises anything from struct.error to IndexError for damaged files
        text = str(error).strip()
        if refused := re.search(r"(?<=unsupported GLOBAL )\S+|NumPy array .*", text):
            raise CheckpointError(f"checkpoint {path} is refused: it contains {refused[0]}") from error
        if "torchscript" in text.lower():
            raise CheckpointError(f"{path} is a TorchScript archive; save the state_dict() of its module") from error
        is_clear = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
        if not is_clear or text.startswith("Weights only load failed"):  # torch then advises to run the file's code
            text = "not a file that torch.save writes"
        reason = text.split("\n")[0][:100]
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({reason}); download or create it again"
        ) from error


def _read_safetensors(path):
    import safetensors.torch  # here, as few checkpoints need it

    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}); download it again") from error


def _read_pickle(path):
    """The content of a file of torch.save.

    torch.load(weights_only=True) calls nothing but what it knows and what it is told to allow, and refuses a file by an
    error that names anything else. A stand-in is then allowed for this name, and the file is loaded again.
    """
    stand_ins = {}  # (name, kind of the stand-in) -> what to allow
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"checkpoint {path} is damaged (in {damaged}); download or create it again")
        with torch.serialization.safe_globals(_NUMPY):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = {(name, object): _stand_in(name, object) for name in names}
    while True:
        allowed = [*_NUMPY, *(pair for pairs in stand_ins.values() for pair in pairs)]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from torch's own storage classes, which the legacy format needs
                content = torch.load(path, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            refused = _refused(str(error))
            if refused is None or refused in stand_ins:
                raise
            stand_ins.pop((refused[0], object), None)
            stand_ins[refused] = _stand_in(*refused)
    if stand_ins:
        names = sorted(name for name, _ in stand_ins)
        print(f"{path}: ignored objects that are not data: {', '.join(names[:5])}{', ...' if names[5:] else ''}")
    return _plain(content)


def _refused(message):
    """What torch refuses with this message: (name, kind of stand-in that it needs); None for another message."""
    if match := re.search(r"Unsupported global: GLOBAL (\S+)", message):
        return match[1] if "." in match[1] else f"builtins.{match[1]}", object
    if match := re.search(r"Can only (append|SETITEM).* but got <class '([\w.]+)'>", message):
        return match[2], list if match[1] == "append" else OrderedDict
    return None


def _stand_in(name, kind):
    """[(object, name)] to allow for a class or function of this name: when called, it returns itself.

    kind: list or OrderedDict return an empty one instead, as torch fills no others. The stand-in has a metaclass of its
    own, because torch checks the type of what it changes and gives it in errors; it ignores any state.
    """
    if kind is not object:
        return [(type(name, (), {"__new__": lambda cls, *args: kind()}), name)]
    ignore = {"__module__": "builtins", "__call__": lambda self, *args: self, "__setstate__": lambda self, state: None}
    metaclass = type(name, (type,), ignore)
    return [(metaclass(name, (), {"__new__": lambda cls, *args: cls}), name), (metaclass, f"type of {name}")]


# --- NumPy arrays, which NumPy itself must not create: it trusts flags of a pickled dtype that make numbers pointers


class _Dtype:
    """A pickled dtype of numbers or text."""

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and re.fullmatch(r"[bifc?u]\d*|[SU]\d+", code)):
            raise ValueError(f"a NumPy array of dtype {code}, not of numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self):
        """The dtype itself."""
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """A pickled array, until _plain makes it a NumPy array."""

    def __init__(self, subtype, shape, code):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.value = np.ndarray(shape, dtype.numpy(), data, order="F" if is_fortran else "C").copy(order="K")


def _scalar(dtype, data):
    """A pickled NumPy scalar."""
    return np.ndarray((), dtype.numpy(), data)[()]


def _empty_bytes():
    """bytes(), which is how empty bytes are pickled."""
    return b""


_NUMPY = [
    (_empty_bytes, "builtins.bytes"),
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),  # an argument of _reconstruct
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # NumPy 1's and 2's names
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def _plain(value):
    """value with NumPy arrays in place of _Arrays, and None in place of stand-ins."""
    if isinstance(value, dict):
        for key in value:
            value[key] = _plain(value[key])
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, _Array):
        return value.value
    return None if isinstance(value, _Dtype | type) else value


# --- writing


def write(path, content):
    """Write content (a dict of plain types and tensors) to path atomically; UserError on a full disk.

    Tensors of all devices are written as CPU tensors, so that the file opens on a machine without a GPU.
    """
    with files.atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(_to_cpu(content), file)
        except RuntimeError as error:  # torch hides the disk's own error, or Ctrl-C, behind one about positions
            raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def _to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_to_cpu, value))
    return value


def past_records(content):
    """The accuracies of past epochs in a published file, as records."""
    records = [{"epoch": epoch, "acc1": float(acc1)} for epoch, acc1 in enumerate(content.get("acc1_list", []))]
    for record, val_acc1 in zip(records, content.get("val_acc1_list", []), strict=False):
        record["val_acc1"] = float(val_acc1)
    return records

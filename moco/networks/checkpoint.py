"""Checkpoints: read without running anything in them, and written atomically."""

import hashlib
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from moco import files
from moco.cli import UserError


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or unsafe, or does not fit; the message names the file and the reason."""


class _Refused(Exception):
    """What a checkpoint contains that none should."""


def read(path):
    """The content of the checkpoint at path, its tensors on the CPU; no code in it is ever run.

    path: a file, or a folder as Hugging Face's libraries write it. Safetensors give a flat dict of tensors. Objects
    that are neither torch's nor NumPy's are not created; a line names what they would have been. CheckpointError
    for a file that is missing, damaged (zip files are checked byte for byte) or refused.
    """
    return reduce(or_, map(_read_file, _parts(Path(path))))


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
        others = [each.name for each in path.absolute().parent.glob("*")]
        near = get_close_matches(path.name, [*others, "random", "imagenet"], 3)
        hint = f"did you mean {', '.join(near)}?" if near else "check the path (README.md links released ones)"
        raise CheckpointError(f"there is no checkpoint {path}; {hint}")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(f"checkpoint {path} is refused: it contains {error}") from error
    except PermissionError as error:
        raise CheckpointError(f"cannot read checkpoint {path}; change its permissions") from error
    except Exception as error:  # torch raises anything from struct.error to IndexError for damaged files
        is_clear = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
        reason = str(error).strip().split("\n")[0][:100] if is_clear else "not a file that torch.save writes"
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
    """The content of a file of torch.save."""
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is an archive of files; extract the checkpoint in it")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"checkpoint {path} is damaged (in {damaged}); download or create it again")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointError(f"{path} is a TorchScript archive; save the state_dict() of its module")
    ignored = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's own storage classes, which the legacy format needs
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_pickle_module(ignored))
    if names := sorted(ignored):
        print(f"{path}: ignored objects that are not data: {', '.join(names[:5])}{', ...' if names[5:] else ''}")
    return _map(_plain, content)


# --- pickles, of which nothing is run: an unpickler calls nothing but what find_class returns


class _StandIn(type):
    """Stands for any class, function or object; when called it returns another one, and it ignores any state.

    It is a class itself, because pickles create objects of what they take for a class. content: its items, as some of
    these classes are dictionaries or lists with further methods: a dict, a list or None.
    """

    def __new__(cls, *arguments, **_):
        self = super().__new__(cls, "StandIn", (), {"__new__": lambda _, *args, **options: cls(*args, **options)})
        self.content = arguments[0] if list(map(type, arguments)) in ([dict], [list]) else None
        return self

    def __init__(self, *arguments, **options):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        self.content = (self.content or {}) | {key: value}

    def append(self, value):
        self.content = [*(self.content or ()), value]


class _Dtype:
    """A pickled dtype of numbers or text.

    NumPy itself must create neither dtypes nor arrays: it trusts flags in a pickle that make numbers pointers.
    """

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and re.fullmatch(r"[bifc?u]\d*|[SU]\d+", code)):
            raise _Refused(f"a NumPy array of dtype {code}, not of numbers")
        self.code = code

    def __setstate__(self, state):
        self.code = {"<": "<", ">": ">"}.get(state[1], "=") + self.code


class _Array:
    """A pickled array, until _plain makes it a NumPy array."""

    def __init__(self, subtype, shape, code):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.value = np.ndarray(shape, dtype.code, data, order="F" if is_fortran else "C").copy(order="K")


_DATA = {  # names in pickles, and what builds the data
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.complex": complex,
    "builtins.bytes": lambda: b"",  # how empty bytes are pickled
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # and others
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,  # an argument of _reconstruct
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},  # NumPy 1's and 2's names
    **{f"numpy.{core}.multiarray.scalar": lambda dtype, data: np.ndarray((), dtype.code, data)[()]
       for core in ("core", "_core")},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{f"torch._utils.{name}": getattr(torch._utils, name) for name in
       ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")},
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}  # fmt: skip


def _pickle_module(ignored):
    """What torch.load takes of the module pickle; the names of what has a stand-in are added to the set ignored."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):  # torch finds the classes of its storages itself
            if module in ("os", "posix", "nt", "sys", "subprocess"):
                raise _Refused(f"{module}.{name}")
            name = f"{module}.{name}".replace("__builtin__.", "builtins.")  # the module's name in Python 2
            if name not in _DATA:
                ignored.add(name)
            return _DATA.get(name) or _StandIn()

    return SimpleNamespace(
        __name__="pickle", Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
    )


def _plain(value):
    """value, no container, as a NumPy array if it is an _Array, as its content or None if it is a stand-in."""
    if isinstance(value, _StandIn):
        return _map(_plain, value.content)
    return value.value if isinstance(value, _Array) else None if isinstance(value, _Dtype) else value


def _map(function, value):
    """value with function(item) in place of each item of its dictionaries, lists and tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(function, item) for item in value)
    return function(value)


# --- writing


def write(path, content):
    """Write content (a dict of plain types and tensors) to path atomically; UserError on a full disk.

    Tensors of all devices are written as CPU tensors, so that the file opens on a machine without a GPU.
    """
    with files.atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(_map(lambda item: item.cpu() if isinstance(item, torch.Tensor) else item, content), file)
        except RuntimeError as error:  # torch hides the disk's own error, or Ctrl-C, behind one about positions
            raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def past_records(content):
    """The accuracies of past epochs in a published file, as records."""
    records = [{"epoch": epoch, "acc1": float(acc1)} for epoch, acc1 in enumerate(content.get("acc1_list", []))]
    for record, val_acc1 in zip(records, content.get("val_acc1_list", []), strict=False):
        record["val_acc1"] = float(val_acc1)
    return records

"""What a checkpoint may contain besides tensors and plain types: NumPy arrays, namespaces, paths, configurations.

torch.load(weights_only=True) creates instances of allowed classes only. These are classes of this module instead of
NumPy's, because NumPy trusts the state of a pickled dtype, in which flags can turn numbers into pointers.
"""

import re
from argparse import Namespace
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

NUMBER = re.compile(r"[bifc?u]\d*|[SU]\d+")  # dtypes of numbers and of text, which hold no objects


class UnsafeError(Exception):
    """A file asks for something that could run code; the message names it."""


class _Ndarray:
    """Stands for the class numpy.ndarray, which a pickled array names."""


class _Dtype:
    """A pickled dtype of numbers or text."""

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and NUMBER.fullmatch(code)):
            raise UnsafeError(f"a NumPy array of dtype {code}, not of numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def numpy(self):
        """The dtype itself."""
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """A pickled array, until plain makes it a NumPy array."""

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


class _Config:
    """Stands for the parts of an OmegaConf configuration, which Lightning stores; not used."""

    def __init__(self, *arguments):
        pass


def _config_dict(*arguments):
    """A defaultdict without its default."""
    return {}


_CONFIG_PARTS = [
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "typing.Any"),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool")),
]

GLOBALS = [
    (_empty_bytes, "builtins.bytes"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # NumPy 1's and 2's names
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Dtype, "numpy.dtype"),
    (_Ndarray, "numpy.ndarray"),
    *((_Config, name) for name in _CONFIG_PARTS),
    (_config_dict, "collections.defaultdict"),
    Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),  # Python 3.13's name
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


def refused_code(message):
    """The name of the class or function for which torch refuses a file; None for another UnpicklingError."""
    if match := re.search(r"GLOBAL (\S+)|unrecognized function <\w+ '?([\w.]+)|but got <class '([\w.]+)'>", message):
        return next(name for name in match.groups() if name)
    return None


def plain(value):
    """value with NumPy arrays instead of their stand-ins; UnsafeError for a stand-in without a value."""
    if isinstance(value, dict):
        for key in value:
            value[key] = plain(value[key])
        return value
    if isinstance(value, Namespace):
        vars(value).update(plain(dict(vars(value))))
        return value
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, _Array | _Dtype | _Ndarray):
        raise UnsafeError("an incomplete NumPy array")
    return value

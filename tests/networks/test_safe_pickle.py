"""Data in checkpoints besides tensors: NumPy arrays and scalars, namespaces, paths; anything else is refused."""

import io
import pickle
import struct
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from moco.networks import checkpoint
from moco.networks.checkpoint import CheckpointError

DTYPES = ["?", "i1", "u1", "<i2", ">i4", "<i8", "u8", "f2", "<f4", ">f4", "f8", "c8", "c16", "U4", "S3"]


def saved(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def renamed(path, old, new):
    """The legacy checkpoint at path with another module's name in its pickle."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"], ids=["NumPy 1", "NumPy 2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_scalars_of_numbers_and_text(tmp_path, core, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    content = {
        "array": array,
        "columns": np.asfortranarray(array),
        "empty": array[:0],
        "0-d": np.array(array[1, 1]),
        "scalar": array[1, 2],
        "list": [array[0, 0]],
    }
    path = saved(tmp_path / "a.tar", content, legacy=True)
    loaded = checkpoint.read(renamed(path, np.empty(0).__reduce__()[0].__module__.encode(), core))
    for name in ("array", "columns", "empty", "0-d"):
        assert type(loaded[name]) is np.ndarray and loaded[name].dtype == content[name].dtype
        np.testing.assert_array_equal(loaded[name], content[name])
    assert loaded["columns"].flags.f_contiguous
    loaded["array"][0, 0] = loaded["array"][0, 1]  # writable
    for value, expected in ((loaded["scalar"], content["scalar"]), (loaded["list"][0], content["list"][0])):
        assert type(value) is type(expected) and value == expected


def test_what_published_linear_decoding_writes(tmp_path):
    content = {
        "acc1_list": [np.float32(71.5), np.array(72.5, np.float32)],
        "val_acc1_list": [np.float64(70.0)],
        "preds": np.arange(5),
        "target": np.arange(5, dtype=np.int64),
        "images": np.zeros((2, 3, 4, 4), np.float32),
    }
    loaded = checkpoint.read(saved(tmp_path / "a.tar", content))
    assert checkpoint.past_records(loaded)[1] == {"epoch": 1, "acc1": 72.5}
    assert loaded["target"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("legacy", [False, True])
def test_namespaces_and_paths_are_data(tmp_path, legacy):
    args = Namespace(lr=0.1, out=Path("runs") / "a", betas=(0.9, np.float32(0.5)), inner=Namespace(scale=np.arange(3)))
    loaded = checkpoint.read(saved(tmp_path / "a.tar", {"args": args}, legacy))["args"]
    assert (loaded.lr, loaded.betas, loaded.inner.scale.tolist()) == (0.1, (0.9, 0.5), [0, 1, 2])
    assert str(loaded.out) == str(args.out) and isinstance(loaded.out, PurePosixPath | PureWindowsPath)


def test_configurations_of_omegaconf_are_skipped(tmp_path, monkeypatch):
    """With the structure that Lightning stores for Hydra's users; OmegaConf itself is not installed."""

    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))

    def fake(name):
        module, _, attribute = f"omegaconf.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, module, made := sys.modules.get(module, ModuleType(module)))
        kind = type(attribute, (), {"__module__": module})
        setattr(made, attribute, kind)
        return kind()

    config, values = fake("dictconfig.DictConfig"), fake("listconfig.ListConfig")
    values.__dict__.update(_metadata=fake("base.ContainerMetadata"), _content=[1, "x", None])
    config.__dict__.update(_metadata=fake("base.Metadata"), _content={"lr": fake("nodes.AnyNode"), "values": values})
    config._metadata.__dict__.update(ref_type=Any, key_type=dict, resolver_cache=defaultdict(dict, {"a": {}}))
    for legacy in (False, True):
        content = {"hyper_parameters": config, "hparams_type": type(config), "state_dict": {"a": torch.ones(1)}}
        assert checkpoint.read(saved(tmp_path / "a.ckpt", content, legacy))["state_dict"]["a"] == 1


class Calls:
    """Pickled as a call of function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class AsDtype:
    """Pickled as numpy.dtype(code) with any state."""

    def __init__(self, code, state):
        self.call = np.dtype, (code, False, True), state

    def __reduce__(self):
        return self.call


def array_with(dtype, data):
    """Pickled as an array of two elements with this dtype and these bytes."""
    reconstruct, arguments, _ = np.zeros(2).__reduce__()
    return Calls(reconstruct, *arguments, state=(1, (2,), dtype, False, data))


REFUSED = {
    "a function": (Calls(eval, "1"), "would run code .*eval"),
    "a method": (Calls(getattr, {}, "clear"), "would run code .*getattr"),
    "a command": (Calls(__import__("os").system, "true"), "would run code .*system"),
    "a NumPy function": (Calls(np.load, "x.npy"), "would run code .*load"),
    "a memory map": (Calls(np.memmap, "x", "u1", "w+"), "would run code .*memmap"),
    "a class with other methods": (Calls(pickle.Unpickler, io.BytesIO), "would run code"),
    "a module": (torch.nn.Linear(2, 2), "would run code .*Linear"),
    "a class of a configuration's module": (Calls(__import__("collections").namedtuple, "A", "b"), "would run code"),
    "a type with a state": (Calls(type, "A", (), {}), "would run code .*type"),
    "an array of objects": (np.array([{}, []], dtype=object), "dtype O8"),
    "a scalar object": (np.array({}, dtype=object), "dtype O8"),
    "an array of records": (np.zeros(2, [("a", "f4"), ("b", "O")]), "dtype V12"),
    "records of numbers": (np.zeros(2, [("a", "f4"), ("b", "i4")]), "dtype V8"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), "dtype M8"),
    "a dtype of fields": (Calls(np.dtype, [("a", "O")]), "not of numbers"),
    "an array without values": (Calls(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b"), "incomplete"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(tmp_path, monkeypatch, case, legacy):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    content, reason = REFUSED[case]
    path = saved(tmp_path / "bad.tar", {"model": {"fc.weight": torch.zeros(2)}, "args": [content]}, legacy)
    with pytest.raises(CheckpointError, match=f"bad.tar is refused: .*{reason}"):
        checkpoint.read(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tar"]


@pytest.mark.parametrize("flags", [1, 63], ids=["references", "all"])
def test_flags_that_turn_numbers_into_pointers_have_no_effect(tmp_path, flags):
    """NumPy itself would take the eight bytes of a float for the address of an object."""
    dtype = AsDtype("f8", (3, "<", None, None, None, -1, -1, flags))
    loaded = checkpoint.read(saved(tmp_path / "a.tar", [array_with(dtype, struct.pack("<2d", 0.5, 2))]))[0]
    assert not loaded.dtype.hasobject and loaded.tolist() == [0.5, 2]


@pytest.mark.parametrize("data", [b"", b"1234567", [1.0, 2.0]], ids=["empty", "short", "list"])
def test_an_array_reads_no_memory_beyond_its_bytes(tmp_path, data):
    dtype = AsDtype("f8", (3, "<", None, None, None, -1, -1, 0))
    with pytest.raises(CheckpointError, match="a.tar is damaged or not a checkpoint"):
        checkpoint.read(saved(tmp_path / "a.tar", [array_with(dtype, data)]))

"""Checkpoints are read safely and written atomically."""

import io
import os
import pickle
import random
import re
import struct
import tarfile
from argparse import Namespace
from collections import Counter, defaultdict, deque, namedtuple
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from moco.cli import UserError
from moco.networks import architectures, checkpoint, opening
from moco.networks.checkpoint import CheckpointError
from tests import support
from tests.support.inputs import save_network
from tests.support.networks import saved

LEGACY = support.GOLDEN / "legacy_tiny.tar"  # written by torch 1.5.1


def test_legacy_file_of_torch_1_5():
    content = checkpoint.read(LEGACY)
    assert torch.equal(content["model_state_dict"]["module.classifier.weight"], torch.arange(12.0).view(3, 4))
    assert content["model_state_dict"]["module.classifier.bias"].tolist() == [0.5, -1, 2]
    assert [float(acc1) for acc1 in content["acc1_list"]] == [71.5]


def test_published_snippet_loads_what_we_write(tmp_path):
    ours = architectures.build("resnet18", 6)
    save_network(tmp_path / "a.tar", ours)
    model = torchvision.models.resnet18()
    model.fc = nn.Linear(512, 6)
    model = nn.DataParallel(model)
    model.load_state_dict(torch.load(tmp_path / "a.tar", weights_only=True)["model_state_dict"])
    assert torch.equal(model.module.fc.weight, ours.fc.weight)


class OnGpu(torch.Tensor):
    """Stands for a tensor on another device, which only cpu() brings here."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def detach(self):
        return super().detach().as_subclass(OnGpu)


def test_tensors_of_other_devices_are_written_as_cpu_tensors(tmp_path):
    def on_gpu():
        return torch.ones(2).as_subclass(OnGpu)

    content = {"weight": on_gpu(), "optimizer": {0: {"exp_avg": on_gpu()}, "groups": [(on_gpu(), 2)]}}
    checkpoint.write(tmp_path / "a.tar", content | {"plain": [1, "a", None, (2, 3)]})
    loaded = torch.load(tmp_path / "a.tar", weights_only=True)  # refuses an OnGpu, which read() would not
    ((in_tuple, beside),) = loaded["optimizer"]["groups"]
    for tensor in (loaded["weight"], loaded["optimizer"][0]["exp_avg"], in_tuple):
        assert type(tensor) is torch.Tensor and tensor.tolist() == [1, 1]
    assert loaded["plain"] == [1, "a", None, (2, 3)] and beside == 2
    assert type(content["weight"]) is OnGpu


def test_damaged_files_are_one_error_that_names_the_file(tmp_path):
    """Empty, cut at many lengths, flipped in a zip, HTML, a folder, no file."""
    intact = saved(tmp_path / "whole.tar", {"state_dict": {"fc.weight": torch.randn(100, 100)}}).read_bytes()
    draws = random.Random(0)
    cuts = [LEGACY.read_bytes()[: draws.randrange(1500)] for _ in range(20)]
    cuts += [intact[: draws.randrange(40000)] for _ in range(10)]
    flipped = bytearray(intact)
    flipped[20000] ^= 4  # in the tensor
    path = tmp_path / "damaged.tar"
    for data in [b"", b"<html>404</html>", *cuts, flipped]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged.tar"):
            checkpoint.read(path)
    hints = {"missing": "check the path", "damagd.tar": "did you mean damaged.tar", "randm": "did you mean random"}
    for name, hint in hints.items():
        with pytest.raises(CheckpointError, match=f"there is no checkpoint .*{name}; .*{hint}"):
            checkpoint.read(tmp_path / name)
    with tarfile.open(tmp_path / "folder.tar", "w") as archive:
        archive.add(tmp_path / "whole.tar")
    with pytest.raises(CheckpointError, match="folder.tar is an archive of files; extract the checkpoint in it"):
        checkpoint.read(tmp_path / "folder.tar")


def one_number(shape, start, end):
    """A file of safetensors with the four bytes of one number, and these entries of its header."""
    header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}}' % (shape, start, end)
    return (80).to_bytes(8, "little") + header.ljust(80) + b"1234"


SAFETENSORS = {
    "empty": b"",
    "a pickle": b"\x80\x02}q\x00.",
    "huge header": (10**15).to_bytes(8, "little") + b"{}",
    "no JSON": (2).to_bytes(8, "little") + b"{]",
    "cut": one_number(4, 0, 16),
    "shape beyond the data": one_number(9, 0, 4),
    "offsets beyond the file": one_number(1, 4, 8),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_damaged_and_malicious_safetensors_are_refused(tmp_path, case):
    path = tmp_path / "a.safetensors"
    path.write_bytes(SAFETENSORS[case])
    with pytest.raises(CheckpointError, match="a.safetensors is damaged or not a safetensors file"):
        opening.open_model(path)


def test_full_disk_is_a_clear_error_and_keeps_the_last_good_file(small_disk):
    disk = small_disk("1m")
    checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000)})
    with pytest.raises(UserError, match=r"cannot write .*a\.tar: No space left on device"):
        checkpoint.write(disk / "a.tar", {"x": torch.zeros(1000000)})
    assert checkpoint.read(disk / "a.tar")["x"].shape == (1000,)
    assert [path.name for path in disk.iterdir()] == ["a.tar"]


def test_ctrl_c_while_saving_is_ctrl_c_and_keeps_the_previous_file(tmp_path, monkeypatch):
    def save_until_ctrl_c(content, file):
        class Interrupted:
            writes = 0

            def write(self, part):
                self.writes += 1
                if self.writes == 3:  # by then torch hides it behind an error of its own
                    raise KeyboardInterrupt
                return file.write(part)

            def flush(self):
                file.flush()

        save(content, Interrupted())

    checkpoint.write(tmp_path / "a.tar", {"epoch": 1})
    save = torch.save
    monkeypatch.setattr(torch, "save", save_until_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "a.tar", {"epoch": 2, "weights": torch.zeros(100_000)})
    assert checkpoint.read(tmp_path / "a.tar") == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


# --- what is no tensor

DTYPES = ["?", "i1", "u1", "<i2", ">i4", "<i8", "u8", "f2", "<f4", ">f4", "f8", "c8", "c16", "U4", "S3"]


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
    before, module, after = path.read_bytes().partition(np.empty(0).__reduce__()[0].__module__.encode())
    path.write_bytes(before + core + after.replace(module, core))
    loaded = checkpoint.read(path)
    for name in ("array", "columns", "empty", "0-d"):
        assert type(loaded[name]) is np.ndarray
        np.testing.assert_array_equal(loaded[name], content[name], strict=True)
    assert loaded["columns"].flags.f_contiguous and loaded["array"].flags.writeable
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


class Attributes(dict):
    """A dictionary with attributes, such as Lightning's AttributeDict."""

    class Color(Enum):
        RED = 1

    def __init__(self, **values):
        super().__init__(values)
        vars(self).update(values)


class Shapes(list):
    pass


class Slots:
    """A class with slots and keyword-only arguments, such as those of omegaconf and attrs."""

    __slots__ = ("size",)

    def __new__(cls, *, size):
        self = super().__new__(cls)
        self.size = size
        return self

    def __getnewargs_ex__(self):
        return (), {"size": self.size}


WEIGHTS = {"a": torch.ones(1)}
OBJECTS = {  # what a file may hold besides its network -> the names of its classes and functions, what is read
    "a namespace": (Namespace(lr=0.1), "argparse.Namespace", None),
    "another namespace": (SimpleNamespace(lr=0.1), "types.SimpleNamespace", None),
    "a path": (Path("runs"), "pathlib.PosixPath", None),
    "a version": (torch.__version__, "torch.torch_version.TorchVersion", None),
    "a date": (datetime(2020, 1, 1), "datetime.datetime", None),
    "an enumeration in a class": (Attributes.Color.RED, "Attributes", None),
    "slots": (Slots(size=3), "Slots", None),
    "a partial function": (partial(print, 3), "builtins.print, functools.partial", None),
    "a generator of random numbers": (np.random.default_rng(0), "numpy.random._pickle", None),
    "an older one": (np.random.RandomState(0), "numpy.random._pickle", None),
    "an optimizer": (torch.optim.SGD([torch.zeros(1)], 0.1), "torch.optim.sgd.SGD", None),
    "a dictionary with attributes": (Attributes(lr=0.1), "Attributes", {"lr": 0.1}),
    "weights in one": (Attributes(**WEIGHTS), "Attributes", WEIGHTS),
    "a list": (Shapes([1, 2]), "Shapes", [1, 2]),
    "a dictionary with a default": (defaultdict(dict, {"a": {}}), "collections.defaultdict", {"a": {}}),
    "a counter": (Counter("aab"), "collections.Counter", {"a": 2, "b": 1}),
    "a queue": (deque([1, 2], 4), "collections.deque", [1, 2]),
}


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 5}, {"legacy": True}], ids=["zip", "protocol 5", "legacy"])
@pytest.mark.parametrize("case", OBJECTS)
def test_objects_of_any_class_are_ignored_and_named_and_keep_their_items(tmp_path, capsys, case, options):
    content, names, read = OBJECTS[case]
    path = saved(tmp_path / "a.ckpt", {"hyper_parameters": [content], "state_dict": {"a": torch.ones(1)}}, **options)
    loaded = checkpoint.read(path)
    assert loaded["state_dict"]["a"] == 1 and loaded["hyper_parameters"] == [read]
    assert re.search(f"a.ckpt: ignored objects that are not data: .*{names}", capsys.readouterr().out)


def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a.pt is a TorchScript archive; save the state_dict\(\)"):
        checkpoint.read(tmp_path / "a.pt")


class Calls:
    """Pickled as a call of function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def array_of(data, flags=0):
    """Pickled as an array of two float64 with these bytes, and with these flags in its dtype."""
    dtype = Calls(np.dtype, "f8", False, True, state=(3, "<", None, None, None, -1, -1, flags))
    reconstruct, arguments, _ = np.zeros(2).__reduce__()
    return Calls(reconstruct, *arguments, state=(1, (2,), dtype, False, data))


HARMLESS = {  # what would do harm when called -> its name
    "a function": (Calls(eval, "1"), "builtins.eval"),
    "a method": (Calls(getattr, {}, "clear"), "builtins.getattr"),
    "a NumPy function": (Calls(np.load, "x.npy"), "numpy.*load"),
    "a memory map": (Calls(np.memmap, "x", "u1", "w+"), "numpy.memmap"),
    "a class with other methods": (Calls(pickle.Unpickler, io.BytesIO), "_io.BytesIO, _?pickle.Unpickler"),
    "a factory of classes": (Calls(namedtuple, "A", "b"), "collections.namedtuple"),
    "a type with a state": (Calls(type, "A", (), {}), "builtins.type"),
}
REFUSED = {
    "a command": (Calls(os.system, "true"), "posix.system"),
    "an array of objects": (np.array([{}, []], dtype=object), "dtype O8"),
    "a scalar object": (np.array({}, dtype=object), "dtype O8"),
    "an array of records": (np.zeros(2, [("a", "f4"), ("b", "O")]), "dtype V12"),
    "records of numbers": (np.zeros(2, [("a", "f4"), ("b", "i4")]), "dtype V8"),
    "dates": (np.array(["2020-01-01"], "M8[D]"), "dtype M8"),
    "a dtype of fields": (Calls(np.dtype, [("a", "O")]), "not of numbers"),
}


def test_a_pickle_that_torch_did_not_write_runs_nothing(tmp_path):
    (tmp_path / "bad.tar").write_bytes(pickle.dumps(Calls(os.mkdir, str(tmp_path / "made")), protocol=2))
    with pytest.raises(CheckpointError, match="bad.tar"):
        checkpoint.read(tmp_path / "bad.tar")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", [*HARMLESS, *REFUSED])
def test_nothing_is_executed(tmp_path, monkeypatch, capsys, case, legacy):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    content, name = (HARMLESS | REFUSED)[case]
    path = saved(tmp_path / "bad.tar", {"model": {"fc.weight": torch.zeros(2)}, "args": [content]}, legacy)
    if case in HARMLESS:
        assert checkpoint.read(path)["args"] == [None]
        assert re.search(f"bad.tar: ignored objects that are not data: {name}", capsys.readouterr().out)
    else:
        with pytest.raises(CheckpointError, match=f"bad.tar is refused: it contains .*{name}"):
            checkpoint.read(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tar"]


def test_a_whole_module_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"a.tar contains no weights \(no state_dict\(\)\)"):
        opening.find(saved(tmp_path / "a.tar", nn.Linear(2, 2)))


@pytest.mark.parametrize("flags", [1, 63], ids=["references", "all"])
def test_flags_that_turn_numbers_into_pointers_have_no_effect(tmp_path, flags):
    """NumPy itself would take the eight bytes of a float for the address of an object."""
    loaded = checkpoint.read(saved(tmp_path / "a.tar", [array_of(struct.pack("<2d", 0.5, 2), flags)]))[0]
    assert not loaded.dtype.hasobject and loaded.tolist() == [0.5, 2]


@pytest.mark.parametrize("data", [b"", b"1234567", [1.0, 2.0]], ids=["empty", "short", "list"])
def test_an_array_reads_no_memory_beyond_its_bytes(tmp_path, data):
    with pytest.raises(CheckpointError, match="a.tar is damaged or not a checkpoint"):
        checkpoint.read(saved(tmp_path / "a.tar", [array_of(data)]))

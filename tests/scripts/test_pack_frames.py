"""Packing and unpacking: restarts, mistakes as one line, and names that lead outside."""

import errno
import json
import os
from itertools import chain, islice

import pytest

from moco import files
from moco.cli import UserError
from moco.data import tars
from moco.data.folders import FrameFolder
from scripts import pack_frames
from tests.data.test_folders import make_folder
from tests.support.inputs import make_frames


def pack(data, folder, *flags):
    pack_frames.main([str(data), "--save-dir", str(folder), *flags])
    return folder


def tree(folder):
    """{relative path: bytes} of the files of folder that are not hidden, nor an index, which has times of files."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file() and path.name != tars.INDEX]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def videos(tmp_path):
    """A frame folder of four videos, with its manifest."""
    return make_folder(tmp_path / "videos", [7, 15, 8, 12], missing={9})


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_packing_and_unpacking_restore_every_byte(kind, request, tmp_path, capsys):
    data = request.getfixturevalue(kind)
    pack(data, tmp_path / "packed", "--verify")
    assert set(tars.list_tars(tmp_path / "packed")) < set(os.listdir(tmp_path / "packed"))
    pack(tmp_path / "packed", tmp_path / "unpacked", "--unpack")
    assert tree(tmp_path / "unpacked") == tree(data)
    lines = capsys.readouterr().out.splitlines()
    n, tasks = len(FrameFolder(data)), ("pack", "verify", "unpack")
    progress = [line for line in lines if "images/s" in line]
    assert [line.split(" in ")[0] for line in progress] == [f"{task}: {n}/{n} images" for task in tasks]
    assert [line for line in lines if line not in progress] == [
        f"{tmp_path / 'packed'} has {n} images, byte for byte those of {data}",
        f"{tmp_path / 'unpacked'} has {n} images",
    ]
    again = tree(tmp_path / "packed")
    pack(data, tmp_path / "packed")
    assert tree(tmp_path / "packed") == again


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_a_packing_that_is_interrupted_is_resumed(kind, request, tmp_path, monkeypatch):
    """Every tar is interrupted once; until the last one is complete, the folder is refused. A kill leaves a file."""
    data = request.getfixturevalue(kind)
    pack(data, tmp_path / "undisturbed")
    write_tar, tried = tars.write, set()

    def interrupt_once(path, members):
        if path.name not in tried:
            tried.add(path.name)
            members = chain(islice(members, 2), interrupt())
        return write_tar(path, members)

    def interrupt():
        raise InterruptedError
        yield

    monkeypatch.setattr(tars, "write", interrupt_once)
    names = tars.list_tars(tmp_path / "undisturbed")
    for n in range(len(names)):
        with pytest.raises(InterruptedError):
            pack(data, tmp_path / "packed")
        assert tars.list_tars(tmp_path / "packed") == names[:n]
        with pytest.raises(
            UserError, match=f"packed is not complete; to finish it: python .*pack_frames.py .*{kind} --"
        ):
            FrameFolder(tmp_path / "packed")
    left = files.temporary_path(tmp_path / "packed" / names[0])
    left.touch()
    pack(data, tmp_path / "packed", "--verify")
    assert tree(tmp_path / "packed") == tree(tmp_path / "undisturbed") and not left.exists()


def test_an_interrupted_unpacking_is_resumed(frames, tmp_path):
    pack(frames, tmp_path / "packed")
    pack(tmp_path / "packed", tmp_path / "out", "--unpack")
    (tmp_path / "out" / "class_0000" / "img_0003.jpeg").unlink()
    cut = tmp_path / "out" / "class_0001" / "img_0002.jpeg"
    os.truncate(cut, 100)
    pack(tmp_path / "packed", tmp_path / "out", "--unpack")
    assert tree(tmp_path / "out") == tree(frames)
    cut.write_bytes(b"mine")
    with pytest.raises(UserError, match="img_0002.jpeg exists and is another file"):
        pack(tmp_path / "packed", tmp_path / "out", "--unpack")
    assert cut.read_bytes() == b"mine"


def test_verify_names_what_differs(frames, tmp_path):
    pack(frames, tmp_path / "packed")
    with open(tmp_path / "packed" / "class_0001.tar", "r+b") as file:
        file.seek(600)
        file.write(b"rot")
    with pytest.raises(UserError, match=r"1 images? .*class_0001/img_0000.jpeg"):
        pack(frames, tmp_path / "packed", "--verify")
    (tmp_path / "packed" / "class_0001.tar").unlink()
    pack(frames, tmp_path / "packed", "--verify")


def test_a_packed_folder_is_verified_by_itself(frames, tmp_path, capsys):
    pack(frames, tmp_path / "packed")
    pack_frames.main([str(tmp_path / "packed"), "--verify"])
    assert "packed has 24 images, which can all be decoded" in capsys.readouterr().out
    path = tmp_path / "packed" / "class_0001.tar"
    offset, size = tars.scan(path)[0]["class_0001/img_0002.jpeg"]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    with pytest.raises(UserError, match=r"1 of 24 images cannot be decoded, the first is .*class_0001/img_0002.jpeg"):
        pack_frames.main([str(tmp_path / "packed"), "--verify"])


def test_names_that_webdataset_cuts_are_counted(tmp_path, capsys):
    pack(make_frames(tmp_path / "a.b"), tmp_path / "packed")
    assert "note" not in capsys.readouterr().out
    (tmp_path / "a.b" / "class_0001" / "img_0002.jpeg").rename(tmp_path / "a.b" / "class_0001" / "img.2.jpeg")
    pack(tmp_path / "a.b", tmp_path / "again")
    assert "note: 1 names have several dots" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_left_out_by_name(videos, tmp_path, capsys):
    (videos / "class_0001" / "img_0003.jpeg").unlink()
    pack(videos, tmp_path / "packed", "--verify")
    assert capsys.readouterr().out.count("class_0001/img_0003.jpeg: No such file or directory; left out") == 1
    frames = FrameFolder(tmp_path / "packed")
    assert len(frames) == 41
    with pytest.raises(FileNotFoundError):
        frames.read(12)
    pack(tmp_path / "packed", tmp_path / "out", "--unpack")
    assert tree(tmp_path / "out") == tree(videos)
    assert "class_0001/img_0003.jpeg: cannot be read; left out" in capsys.readouterr().out


def test_unpacking_writes_nothing_outside(tmp_path, capsys):
    names = ["../out.jpeg", "/tmp/packed_out.jpeg", "c/../../out.jpeg", "c/1.jpeg"]
    (tmp_path / "packed").mkdir()
    tars.write(tmp_path / "packed" / "x.tar", [(name, 0, b"x") for name in names])
    pack(tmp_path / "packed", tmp_path / "in" / "out", "--unpack")
    assert tree(tmp_path / "in") == {"out/c/1.jpeg": b"x"}
    assert f"{tmp_path / 'packed'}: left out of its tars: names outside of the folder (3)" in capsys.readouterr().out
    assert not os.path.exists("/tmp/packed_out.jpeg")


def test_a_manifest_that_leads_outside_is_refused(videos, tmp_path):
    pack(videos, tmp_path / "packed")
    path = tmp_path / "packed" / "manifest.json"
    plan = json.loads(path.read_text())
    plan |= {"per_class": None, "classes": [{"name": "../../evil", "first_slot": 0}]}
    for video in plan["videos"]:
        video |= {"class": "../../evil", "prefix": "img"}
    path.write_text(json.dumps(plan))
    name = "../../evil/img_0000.jpeg"
    for tar in tars.list_tars(tmp_path / "packed"):
        tars.write(tmp_path / "packed" / tar, [(name, 0, b"x")])
    (tmp_path / "packed" / tars.INDEX).unlink()
    with pytest.raises(UserError, match="outside"):
        pack(tmp_path / "packed", tmp_path / "in" / "deep" / "out", "--unpack")
    assert not (tmp_path / "in" / "evil").exists()


def test_two_runs_at_once_are_refused(frames, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EAGAIN, "locked")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="another run is writing to .*packed"):
        pack(frames, tmp_path / "packed")
    assert not tars.list_tars(tmp_path / "packed")


def test_mistakes_are_one_line(frames, videos, tmp_path):
    pack(frames, tmp_path / "packed")
    for data, folder, flags, message in (
        (tmp_path / "packed", tmp_path / "again", (), "packed is packed already; to unpack it, give --unpack"),
        (frames, tmp_path / "again", ("--unpack",), "frames has no tars to unpack"),
        (frames, tmp_path, (), "has folders or images; choose a new --save-dir"),
        (frames, frames / "packed", (), "is inside the data folder"),
        (tmp_path / "no", tmp_path / "again", (), "there is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            pack(data, folder, *flags)
    pack(videos, tmp_path / "packed videos")
    more = make_folder(tmp_path / "more", [7, 16, 8, 12])
    with pytest.raises(UserError, match="has the manifest.json of other frames"):
        pack(more, tmp_path / "packed videos")
    make_frames(tmp_path / "fewer", n=3)
    with pytest.raises(UserError, match="class_0000.tar has other images"):
        pack(tmp_path / "fewer", tmp_path / "packed")
    (tmp_path / "packed" / "class_0000.tar").rename(tmp_path / "packed" / "class_0000-0000.tar")
    with pytest.raises(UserError, match="has class_0000-0000.tar, which is none of the tars of"):
        pack(frames, tmp_path / "packed")

"""Images in tars: those of the files in class and order, whatever is in the tars, and named where it is damaged."""

import errno
import io
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hog_baseline
from moco import files
from moco.cli import UserError
from moco.data import augment, loader, manifest, tars
from moco.data.folders import FrameFolder
from moco.data.recordings import Selection
from tests.data.test_folders import NAMES as VIDEOS
from tests.data.test_folders import make_folder
from tests.data.test_manifest import make
from tests.scripts.test_pack_frames import pack
from tests.support.inputs import make_frames
from tests.support.training import everything, same, train

pytestmark = pytest.mark.usefixtures("empty_figures")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(a folder of files, the same packed) for frames with a manifest, a class tree and a flat folder."""
    folder = tmp_path_factory.mktemp("pairs")
    make_folder(folder / "videos", [7, 15, 3, 12], missing={9, 22, 23, 24, 36}, size=64)
    make_frames(folder / "tree")
    make_frames(folder / "flat", ["."])
    kinds = ("videos", "tree", "flat")
    return {kind: (folder / kind, pack(folder / kind, folder / f"{kind} packed")) for kind in kinds}


KINDS = pytest.mark.parametrize("kind", ["videos", "tree", "flat"])


def contents(frames):
    return [(frames.name(i), frames.label(i), frames.read(i)) for i in range(len(frames))]


def make_tar(path, members, form=tarfile.PAX_FORMAT):
    """Write a tar of {name: bytes}; of a name with a str, a hard link to it or, after "->", a symbolic one."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                info.linkname, content = content.removeprefix("->"), b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@KINDS
def test_a_packed_folder_has_the_images_classes_and_neighbors_of_the_files(pairs, kind):
    files, packed = map(FrameFolder, pairs[kind])
    assert contents(packed) == contents(files)
    assert (packed.classes, packed.counts) == (files.classes, files.counts)
    assert all(packed.neighbors(i, 3) == files.neighbors(i, 3) for i in range(len(files)))
    names = {"videos": [VIDEOS[number].replace("mp4", "tar") for number in (0, 1, 3)], "flat": ["flat.tar"],
             "tree": ["class_0000.tar", "class_0001.tar", "class_0002.tar"]}  # fmt: skip
    assert tars.list_tars(pairs[kind][1]) == names[kind]


def test_selections_and_several_folders(pairs):
    files, packed = pairs["videos"]
    selection = Selection(ages=(6, 12))
    assert contents(FrameFolder(packed, selection)) == contents(FrameFolder(files, selection))
    both = FrameFolder([packed, files])
    assert [both.read(i) for i in range(len(both))] == 2 * [each[2] for each in contents(FrameFolder(files))]


@KINDS
def test_tar_and_webdataset_read_the_tars(pairs, kind, tmp_path):
    files, folder = pairs[kind]
    expected = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*.jpeg")}
    for tar in tars.list_tars(folder):
        subprocess.run(["tar", "xf", folder / tar, "-C", tmp_path], check=True)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpeg")} == expected
    assert webdataset_images([str(folder / tar) for tar in tars.list_tars(folder)]) == expected


def webdataset_images(paths):
    import webdataset

    samples = webdataset.WebDataset(paths, shardshuffle=False)
    return {f"{sample['__key__']}.jpeg": sample["jpeg"] for sample in samples}


@pytest.mark.parametrize("by", ["name", "video", "time"])
def test_videos_with_colons_and_dots_in_their_names_are_packed_for_tar_and_webdataset(tmp_path, monkeypatch, by):
    name = "0022_GX0{}0001_02.05.2024-02.11.2024_02.05.2024-5:1{}pm.mp4"
    names = [name.format(1, 1), name.format(1, 1).replace(":", "-"), name.format(2, 9), "a/" + name.format(1, 1)]
    plan = make([5] * 4, names=names, **{"class-by": by})
    images = manifest.Manifest(plan)
    for tar, numbers in images.tars().items():
        tars.write(tmp_path / tar, [(images.path(i), 0, str(i).encode()) for i in numbers])
    manifest.write(tmp_path, plan)
    expected = {images.path(i): str(i).encode() for i in range(20)}
    assert {frames[0]: frames[2] for frames in contents(FrameFolder(tmp_path))} == expected
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    for tar in tars.list_tars("."):
        subprocess.run(["tar", "xf", tar, "-C", "out"], check=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in expected} == expected
    assert webdataset_images(tars.list_tars(".")) == expected


@KINDS
def test_a_missing_damaged_or_old_index_is_made_again(pairs, kind, capsys):
    expected, path = contents(FrameFolder(pairs[kind][1])), pairs[kind][1] / tars.INDEX
    intact, old = path.read_bytes(), b'{"version": 1, "complete": true, "classes": null, "images": 2, "tars": []}\n'
    for damaged in (None, b"", b"{}\n", b"[]", intact[:-3], intact[:100], old + bytes(16)):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert contents(FrameFolder(pairs[kind][1])) == expected
        assert path.read_bytes() == intact
    out = capsys.readouterr().out
    assert out.count("tars.index is damaged, of an earlier version, or older than the tars; it is made again") == 6


def test_an_index_that_cannot_be_stored_is_kept_in_memory(pairs, tmp_path):
    folder = shutil.copytree(pairs["tree"][1], tmp_path / "tars")
    (folder / tars.INDEX).unlink()
    (folder / tars.INDEX).mkdir()  # nothing can be written there
    frames = FrameFolder(folder)
    assert contents(pickle.loads(pickle.dumps(frames))) == contents(frames) == contents(FrameFolder(pairs["tree"][0]))


def test_folders_that_an_earlier_version_packed_open(tmp_path):
    """Classes were in parts of 1 GB, the first folder in the names named the class or else the tar did."""
    make_tar(tmp_path / "flat-0000.tar", {"a.png": b"a", "b.png": b"b"})
    make_tar(tmp_path / "flat-0001.tar", {"c.png": b"c"})
    (tmp_path / tars.INDEX).write_bytes(b'{"version": 1, "complete": true}\n' + bytes(24))
    frames = FrameFolder(tmp_path)
    assert frames.classes == ["flat"] and frames.counts == [3]
    assert [content for _, _, content in contents(frames)] == [b"a", b"b", b"c"] and frames.name(2) == "c.png"
    (tmp_path / tars.INDEX).write_bytes(b'{"version": 1, "complete": false, "command": "python x.py"}\n')
    with pytest.raises(UserError, match="is not complete; to finish it: python x.py"):
        FrameFolder(tmp_path)


TOPS = st.sampled_from(["", "a", "a-", "a.b", "Z", "é"])
INSIDE = st.sampled_from(["", "in/", "in-2/", "in/d/", "long/" * 60])
STEMS = st.text("ab-_.Z0é", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.tuples(TOPS, INSIDE, STEMS), min_size=1, max_size=12))
def test_the_order_of_packed_images_is_that_of_the_files(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("order")
    for top, inside, name in tree:
        path = folder / "files" / top / inside / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 300)
    try:
        files = FrameFolder(folder / "files")
    except UserError:  # hidden ones only
        return
    packed = FrameFolder(pack(folder / "files", folder / "tars"))
    assert contents(packed) == contents(files) and packed.classes == files.classes


# --- tars of others


def test_any_tars_are_read_in_the_order_of_imagefolder(tmp_path, capsys):
    """GNU and PAX headers, long names and names that are not UTF-8, ./ before names, unsorted, twice the same name."""
    long, non_utf8 = f"a/{'deep/' * 30}x.png", os.fsdecode(b"b/\xff.png")
    first = [("./b/2.png", b"old"), ("b/10.png", b"10"), (long, b"long"), (non_utf8, b"bytes"), ("c/.x.png", b"")]
    first += [("./b/2.png", b"2")]
    second = {"b/é.png": b"e", "a/1.png": b"1", "b/n.json": b"{}", "b/m.json": b"{}", "root.png": b"r"}
    second |= {"../out.png": b"x", "/abs.png": b"x", "a/../../out.png": b"x"}
    make_tar(tmp_path / "one.tar", first, tarfile.GNU_FORMAT)
    make_tar(tmp_path / "two.tar", second, tarfile.PAX_FORMAT)
    frames = FrameFolder(tmp_path)
    assert (frames.classes, frames.counts) == (["a", "b"], [2, 4])
    names = ["a/1.png", long, "b/10.png", "b/2.png", "b/é.png", non_utf8]
    assert [frames.relative_path(i) for i in range(6)] == names
    assert [frames.read(i) for i in range(6)] == [b"1", b"long", b"10", b"2", b"e", b"bytes"]
    assert capsys.readouterr().out == (
        f"{tmp_path}: left out of its tars: earlier ones of the same name (1), files that are no images (2), "
        "names outside of the folder (3), images beside the class folders (1)\n"
    )
    assert contents(FrameFolder(tmp_path)) == contents(frames) and not capsys.readouterr().out  # from the index


def test_links_have_the_content_of_what_they_are_to(tmp_path, capsys):
    members = {"b/far.jpg": "->near.jpg", "a/0.jpg": b"0", "a/1.jpg": b"1", "b/hard.jpg": "a/1.jpg"}
    members |= {"b/soft.jpg": "->../a/0.jpg", "b/near.jpg": "->hard.jpg", "b/nowhere.jpg": "->c.jpg", "b/dir": "->a"}
    members |= {"b/out.jpg": "->/etc/x.jpg", "b/self.jpg": "->self.jpg"}
    frames = FrameFolder(make_tar(tmp_path / "x.tar", members).parent)
    expected = dict(zip(["a/0.jpg", "a/1.jpg", "b/far.jpg", "b/hard.jpg", "b/near.jpg"], b"01111", strict=True))
    expected = {name: bytes([content]) for name, content in expected.items()} | {"b/soft.jpg": b"0"}
    assert {name: content for name, _, content in contents(frames)} == expected
    assert "links to what is not there (3)" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_counted_and_what_follows_them_is_read(tmp_path, capsys, form):
    (tmp_path / "0.bmp").touch()
    os.truncate(tmp_path / "0.bmp", 500_000)
    (tmp_path / "1.bmp").write_bytes(b"1")
    subprocess.run(["tar", "-cSf", "x.tar", f"--format={form}", "0.bmp", "1.bmp"], cwd=tmp_path, check=True)
    for path in tmp_path.glob("*.bmp"):
        path.unlink()
    assert contents(FrameFolder(tmp_path)) == [("1.bmp", 0, b"1")]
    assert capsys.readouterr().out == f"{tmp_path}: left out of its tars: sparse files (1)\n"


def test_webdatasets_members_cls_are_the_labels(tmp_path, capsys):
    """Of shards in any order, with names up to the first dot, numbers by value, and one label without an image."""
    one = {"00.cls": b"10", "00.jpg": b"00", "07.seg.png": b"07", "07.cls": b"2\n", "99.cls": b"3"}
    two = {"in/00.jpg": b"in", "in/00.cls": b"2", "00.jpg": b"twice", "00.cls": b"10"}
    make_tar(tmp_path / "s_1.tar", one)
    make_tar(tmp_path / "s_0.tar", two)
    frames = FrameFolder(tmp_path)
    assert frames.classes == ["2", "10"] and frames.counts == [2, 2]
    assert contents(frames) == [
        ("2/07.seg.png", 0, b"07"), ("2/in/00.jpg", 0, b"in"),
        ("10/s_0/00.jpg", 1, b"twice"), ("10/s_1/00.jpg", 1, b"00"),
    ]  # fmt: skip
    assert not capsys.readouterr().out
    make_tar(tmp_path / "s_2.tar", {"1.jpg": b"1", "1.cls": b"cup/red", "2.jpg": b"2"})
    frames = FrameFolder(tmp_path)
    assert frames.classes == ["10", "2", "cup-red"]
    out = capsys.readouterr().out
    assert "older than the tars; it is made again" in out and "images beside the class folders (1)" in out


def test_equal_names_in_several_tars_are_several_images(tmp_path):
    for name in ("a", "b"):
        make_tar(tmp_path / f"{name}.tar", {"img_0.jpg": f"{name}0".encode(), "img_1.jpg": f"{name}1".encode()})
    frames = FrameFolder(tmp_path)
    assert frames.classes == ["a", "b"] and [name for name, *_ in contents(frames)] == [
        "a/img_0.jpg", "a/img_1.jpg", "b/img_0.jpg", "b/img_1.jpg",
    ]  # fmt: skip
    assert [content for *_, content in contents(frames)] == [b"a0", b"a1", b"b0", b"b1"]
    pack(tmp_path, tmp_path.parent / "out", "--unpack")
    assert contents(FrameFolder(tmp_path.parent / "out")) == contents(frames)
    for name in ("a", "b"):
        make_tar(tmp_path / f"{name}.tar", {"cup/0.jpg": name.encode(), f"cup/{name}.jpg": name.encode()})
    assert contents(FrameFolder(tmp_path)) == [
        ("cup/a/0.jpg", 0, b"a"), ("cup/b/0.jpg", 0, b"b"), ("cup/a.jpg", 0, b"a"), ("cup/b.jpg", 0, b"b"),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"<html>" * 99, b"", b"PK\3\4" + bytes(2000), b"\x1f\x8b" + bytes(700), b"cut"])
def test_what_is_no_tar_is_named(tmp_path, content):
    make_tar(tmp_path / "a.tar", {"a/1.png": b"1"})
    (tmp_path / "z.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"z.tar is not an uncompressed tar; if it is a checkpoint, give a folder of"):
        FrameFolder(tmp_path)


def test_tars_beside_images_are_not_read_and_named(tmp_path, capsys):
    make_frames(tmp_path / "tree")
    (tmp_path / "tree" / "last.tar").write_bytes(b"checkpoint")
    assert len(FrameFolder(tmp_path / "tree")) == 24
    assert "tree has images or folders: last.tar and other tars in it are not read" in capsys.readouterr().out
    make_frames(tmp_path / "run", ["."], n=1)
    (tmp_path / "run" / "last.tar").write_bytes(b"checkpoint")
    with pytest.raises(UserError, match="last.tar is not a tar of images; give a folder of images, not of checkpoints"):
        FrameFolder(tmp_path / "run")


def test_an_index_older_than_its_tars_is_made_again(tmp_path, capsys):
    make_tar(tmp_path / "all.tar", {"a/0.jpg": b"0", "b/0.jpg": b"1"})
    assert FrameFolder(tmp_path).counts == [1, 1]
    subprocess.run(["tar", "rf", "all.tar", "--transform", "s,^,c/,", "all.tar"], cwd=tmp_path, check=True)
    make_tar(tmp_path / "more.tar", {"c/0.jpg": b"2"})
    frames = FrameFolder(tmp_path)
    assert frames.counts == [1, 1, 1] and frames.read(2) == b"2"
    assert "older than the tars; it is made again" in capsys.readouterr().out
    times = os.stat(tmp_path / "more.tar")
    make_tar(tmp_path / "more.tar", {"c/0.jpg": b"3", "d/0.jpg": b"4"})
    os.utime(tmp_path / "more.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    make_tar(tmp_path / "all.tar", {"a/0.jpg": b"5", "b/0.jpg": b"6"})
    assert [content for *_, content in contents(FrameFolder(tmp_path))] == [b"5", b"6", b"3", b"4"]


# --- damage


def unreadable(frames):
    """The names of the images that cannot be read, with the reasons."""
    failed = {}
    for i in range(len(frames)):
        try:
            frames.read(i)
        except OSError as error:
            failed[frames.name(i)] = error.strerror
    return failed


def test_images_behind_the_cut_of_a_tar_are_unreadable(pairs, tmp_path, capsys):
    folder, intact = shutil.copytree(pairs["videos"][1], tmp_path / "tars"), FrameFolder(pairs["videos"][1])
    tar, before = folder / VIDEOS[1].replace("mp4", "tar"), FrameFolder(folder)
    inside = list(tars.scan(tar)[0])
    os.truncate(tar, tar.stat().st_size // 2)
    for frames, reason in ((before, f"{tar.name} has been cut"), (FrameFolder(folder), "No such file or directory")):
        failed = unreadable(frames)
        assert len(frames) == len(intact) and frames.counts == intact.counts
        assert 3 < len(failed) < 12 and list(failed) == inside[-len(failed) :]
        assert all(each.startswith(reason) for each in failed.values())
    assert f"{tar} is cut or damaged at byte" in capsys.readouterr().out


def test_what_follows_damage_or_the_end_is_said(tmp_path, capsys):
    path = make_tar(tmp_path / "x.tar", {f"a/{k}.png": bytes([k]) * 700 for k in range(5)})
    content, headers = path.read_bytes(), [512 * 3 * k for k in range(5)]
    for position in (headers[2], headers[3] + 130):  # a name; in a size
        path.write_bytes(content[:position] + b"7" + content[position + 1 :])
        n = headers.index(position // 512 * 512)
        assert FrameFolder(tmp_path).counts == [n]
        assert f"x.tar is cut or damaged at byte {headers[n]}; what follows is left out" in capsys.readouterr().out
    end = 512 * 3 * 5
    for tail, message in (
        (b"", ""), (bytes(20000), ""),
        (bytes(1024) + content[:end], f"x.tar ends at byte {end}; {1024 + end} bytes behind that are left out"),
    ):  # fmt: skip
        path.write_bytes(content[:end] + tail)
        assert FrameFolder(tmp_path).counts == [5]
        out = capsys.readouterr().out
        assert message in out and bool(message) == ("left out" in out)


@pytest.mark.parametrize("kind", ["videos", "tree"])
def test_a_renamed_tar_is_read_and_a_missing_one_named(pairs, kind, tmp_path, capsys):
    folder = shutil.copytree(pairs[kind][1], tmp_path / "tars")
    name = tars.list_tars(folder)[0]
    (folder / name).rename(folder / "other.tar")
    assert contents(FrameFolder(folder)) == contents(FrameFolder(pairs[kind][1]))
    (folder / "other.tar").unlink()
    if kind == "videos":
        with pytest.raises(UserError, match=f"has no {name}, one of 1 missing tars"):
            FrameFolder(folder)
    else:
        assert FrameFolder(folder).classes == ["class_0001", "class_0002"]
        assert capsys.readouterr().out.count("older than the tars; it is made again") == 2


def test_corrupt_images_are_replaced_and_counted(tmp_path, capsys):
    """One image is no image, another is cut off later: batches are those of files with the same faults."""
    files = make_frames(tmp_path / "files", ["a", "b"], n=120, size=16)
    (files / "b" / "img_0004.jpeg").write_bytes(b"no image")
    folder = pack(files, tmp_path / "tars")
    frames = [FrameFolder(each) for each in (files, folder, folder)]
    (files / "b" / "img_0119.jpeg").unlink()
    os.truncate(folder / "b.tar", tars.scan(folder / "b.tar")[0]["b/img_0119.jpeg"][0] + 9)
    batches = [
        loader.FrameLoader(each, augment.RECIPES["none"], 32, loader.EpochSampler(240, 20), "cpu", workers)
        for each, workers in zip(frames, (0, 0, 2), strict=True)
    ]
    for each in zip(*(each.epoch(0) for each in batches), strict=True):
        for expected, *tensors in zip(*each, strict=True):
            assert all(torch.equal(tensor, expected) for tensor in tensors)
    assert all(sorted(each.bad) == [124, 239] for each in batches)
    out = "".join(capsys.readouterr())
    assert out.count("b.tar/b/img_0004.jpeg: ") == 2
    assert out.count("b.tar/b/img_0119.jpeg: b.tar has been cut since it was indexed; replaced") == 2


# --- open files and processes


def test_few_tars_are_open_at_a_time_and_threads_share_them(pairs, monkeypatch):
    monkeypatch.setattr("moco.files.raise_open_file_limit", lambda: 4)
    frames = FrameFolder(pairs["tree"][1])
    before = set(os.listdir("/proc/self/fd"))
    expected = contents(FrameFolder(pairs["tree"][0]))
    order = np.random.default_rng(0).integers(len(frames), size=3000).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(frames.read, order)) == [expected[i][2] for i in order]
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    del frames
    assert not set(os.listdir("/proc/self/fd")) - before


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_disk_that_fails_for_a_moment_changes_nothing(pairs, monkeypatch, is_packed):
    """A tar that is open would stay stale: it is opened again."""
    frames, failures, opened = FrameFolder(pairs["tree"][is_packed]), [], []
    expected, states = contents(frames), [frames.state(i) for i in range(24)]
    monkeypatch.setattr(files, "WAITS", (0,))

    def fail_first(function):
        def call(*arguments, **options):
            if failures:
                raise OSError(failures.pop(), "Stale file handle")
            return function(*arguments, **options)

        return call

    def count_and_open(*path, **how):
        opened.append(path)
        return open(*path, **how)  # noqa: SIM115

    for owner, name in ((os, "pread"), (Path, "read_bytes"), (Path, "stat")):
        monkeypatch.setattr(owner, name, fail_first(getattr(owner, name)))
    monkeypatch.setattr(tars, "open", count_and_open, raising=False)
    frames = pickle.loads(pickle.dumps(frames))  # without open tars
    assert frames.name(0) == expected[0][0]  # maps the index, in which an error would be ignored
    failures.append(errno.ESTALE)
    assert contents(frames) == expected and not failures
    failures.append(errno.EIO)
    assert [frames.state(i) for i in range(24)] == states and not failures
    assert len(opened) == 4 * is_packed  # once for each of three tars, and again


def test_a_copy_in_another_process_maps_the_same_index(pairs):
    frames = FrameFolder(pairs["tree"][1])
    content = pickle.dumps(frames)
    assert len(content) < 4000 and contents(pickle.loads(content)) == contents(frames)


# --- the same training


@pytest.mark.usefixtures("handlers")
def test_a_training_on_tars_that_is_interrupted_is_bitwise_an_undisturbed_one_on_files(pairs, tmp_path):
    files, folder = pairs["videos"]
    train(files, tmp_path / "files")
    train(folder, tmp_path / "tars", "--epochs", 1, "--workers", 2)
    train(folder, tmp_path / "tars", "--resume")
    assert same(everything(tmp_path / "files"), everything(tmp_path / "tars"))


def test_hogs_of_packed_images_are_those_of_files(pairs, tmp_path):
    rows = []
    for k, data in enumerate(pairs["videos"]):
        (tmp_path / str(k)).mkdir()
        rows.append(hog_baseline.all_features(FrameFolder(data), np.arange(6), 0, tmp_path / str(k)))
    assert rows[0].shape[0] == 6 and not np.isnan(rows[0]).any() and np.array_equal(*rows)

"""Packed folders: the same images, classes and order as the files, damage that is named, and one scan for the index."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import highly_activating_imgs
import hog_baseline
import moco_img
import moco_temp
import temporal_classification
from moco.analysis import features, film
from moco.cli import UserError
from moco.data import archive, augment, loader, packed
from moco.data.frame_folder import FrameFolder
from moco.data.recordings import Selection
from scripts import pack_frames
from tests import support
from tests.data.test_frame_folder import NAMES as VIDEOS
from tests.data.test_frame_folder import make_folder
from tests.support.inputs import make_frames
from tests.support.training import SMALL, everything, same, train, wait_for_step
from tests.test_moco_img import SMALL as SMALL_MOCO

pytestmark = pytest.mark.usefixtures("empty_figures")


def pack(data, folder, *flags):
    pack_frames.main([str(data), "--save-dir", str(folder), *flags])
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(a folder of files, the same packed) for frames with a manifest, a class tree and a flat folder."""
    folder = tmp_path_factory.mktemp("pairs")
    make_folder(folder / "videos", [7, 15, 3, 12], missing={9, 22, 23, 24, 36}, size=64)
    make_frames(folder / "tree")
    make_frames(folder / "flat", ["."])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_frames, "PART_BYTES", 5000)
        return {kind: (folder / kind, pack(folder / kind, folder / f"{kind} packed")) for kind in
                ("videos", "tree", "flat")}  # fmt: skip


def names_in(tar):
    with tarfile.open(tar) as file:
        return file.getnames()


KINDS = pytest.mark.parametrize("kind", ["videos", "tree", "flat"])


def contents(frames):
    return [(frames.name(i), frames.label(i), frames.read(i)) for i in range(len(frames))]


@KINDS
def test_a_packed_folder_has_the_images_classes_and_neighbors_of_the_files(pairs, kind):
    files, tars = map(FrameFolder, pairs[kind])
    assert contents(tars) == contents(files)
    assert (tars.classes, tars.counts) == (files.classes, files.counts)
    assert all(tars.neighbors(i, 3) == files.neighbors(i, 3) for i in range(len(files)))
    assert all(tars.path(i).read_bytes() == files.path(i).read_bytes() for i in range(len(files)))
    assert len(list(pairs[kind][1].glob("*.tar"))) > 1


def test_tars_are_named_after_videos_and_parts_of_classes(pairs):
    names = {kind: packed.list_tars(tars) for kind, (_, tars) in pairs.items()}
    assert names["videos"] == [f"{VIDEOS[number].removesuffix('.mp4')}.tar" for number in (0, 1, 3)]
    assert names["tree"][:2] == ["class_0000-0000.tar", "class_0000-0001.tar"]
    assert names["flat"][0] == "flat-0000.tar"


def test_videos_of_one_name_get_tars_of_their_own(tmp_path):
    files = make_folder(tmp_path / "files", [3, 4, 5], names=["a/v.mp4", "b/v.mp4", "v.2.mp4"])
    tars = pack(files, tmp_path / "tars")
    assert packed.list_tars(tars) == ["v.2.tar", "v.3.tar", "v.tar"]
    assert contents(FrameFolder(tars)) == contents(FrameFolder(files))


def test_selections_and_several_folders(pairs, tmp_path):
    files, tars = pairs["videos"]
    selection = Selection(ages=(6, 12))
    assert contents(FrameFolder(tars, selection)) == contents(FrameFolder(files, selection))
    both = FrameFolder([tars, files])
    assert [both.read(i) for i in range(len(both))] == 2 * [each[2] for each in contents(FrameFolder(files))]


@pytest.mark.parametrize("kind", ["videos", "tree"])
def test_tar_tarfile_and_webdataset_read_the_tars(pairs, kind, tmp_path):
    files, folder = pairs[kind]
    expected = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*.jpeg")}
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True)
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpeg")} == expected
    assert {name for tar in tars for name in names_in(tar)} == expected.keys()
    import webdataset

    samples = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    assert {f"{sample['__key__']}.jpeg": sample["jpeg"] for sample in samples} == expected


@KINDS
def test_a_missing_or_damaged_index_is_made_again(pairs, kind, tmp_path):
    frames = FrameFolder(pairs[kind][1])
    expected, path = contents(frames), pairs[kind][1] / packed.NAME
    intact = path.read_bytes()
    for damaged in (None, b"", b"{}\n", intact[:-3], intact.replace(b'"version": 1', b'"version": 0')):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert contents(FrameFolder(pairs[kind][1])) == expected
        assert path.read_bytes() == intact


def test_an_index_that_cannot_be_stored_beside_the_tars_is_in_the_cache(pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in pairs["tree"][1].glob("*.tar"):
        (folder / tar.name).symlink_to(tar)
    (folder / packed.NAME).mkdir()  # nothing can be written there
    expected = contents(FrameFolder(pairs["tree"][0]))
    for _ in range(2):
        assert contents(FrameFolder(folder)) == expected
        monkeypatch.setattr(archive, "scan", None)  # the second time it is there
    (tmp_path / "cache" / "baby-vision").rename(tmp_path / "gone")
    (tmp_path / "cache" / "baby-vision").touch()
    with pytest.raises((UserError, TypeError)):
        FrameFolder(folder)


TOPS = st.sampled_from(["", "a", "a-", "a.b", "Z", "é"])
STEMS = st.text("ab-_.Z0é", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.tuples(TOPS, st.sampled_from(["", "in/", "in-2/", "in/d/"]), STEMS), min_size=1, max_size=12))
def test_the_order_of_packed_images_is_that_of_the_files(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("order")
    for top, inside, name in tree:
        path = folder / "files" / top / inside / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    try:
        files = FrameFolder(folder / "files")
    except UserError:  # hidden ones only
        return
    tars = FrameFolder(pack(folder / "files", folder / "tars"))
    assert contents(tars) == contents(files) and tars.classes == files.classes
    (folder / "tars" / packed.NAME).unlink()
    assert contents(FrameFolder(folder / "tars")) == contents(files)


# --- tars of others


def test_any_tars_are_read_in_the_order_of_imagefolder(tmp_path, capsys):
    """GNU and PAX headers, long names and names that are not UTF-8, ./ before names, unsorted, twice the same name."""
    long = "deep/" * 30 + "x.png"
    non_utf8 = os.fsdecode(b"b/\xff.png")
    first = [
        ("./b/2.png", b"old"),
        ("b/10.png", b"10"),
        (f"a/{long}", b"long"),
        (non_utf8, b"bytes"),
        ("c/.x.png", b""),
    ]
    second = [("b/é.png", b"e"), ("a/1.png", b"1"), ("b/2.png", b"2"), ("b/n.json", b"{}"), ("root.png", b"r")]
    second += [("../out.png", b"x"), ("/abs.png", b"x"), ("a/../../out.png", b"x")]
    for name, members, form in (("one", first, tarfile.GNU_FORMAT), ("two", second, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=form) as tar:
            for kind, link in ((tarfile.DIRTYPE, "a"), (tarfile.SYMTYPE, "a/link.png")):
                info = tarfile.TarInfo(link)
                info.type, info.linkname = kind, "1.png"
                tar.addfile(info)
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    frames = FrameFolder(tmp_path)
    assert (frames.classes, frames.counts) == (["a", "b"], [2, 4])
    assert [frames.relative_path(i) for i in range(6)] == [
        "a/1.png", f"a/{long}", "b/10.png", "b/2.png", "b/é.png", non_utf8,
    ]  # fmt: skip
    assert [frames.read(i) for i in range(6)] == [b"1", b"long", b"10", b"2", b"e", b"bytes"]
    assert capsys.readouterr().out.count("left out") == 3


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("ab-_.Z0é", min_size=1, max_size=120), st.binary(max_size=1500), max_size=5))
def test_what_is_written_is_scanned_and_read_by_tarfile(tmp_path_factory, members):
    members = {f"c/x{name}": content for name, content in members.items()}
    path = tmp_path_factory.mktemp("written") / "x.tar"
    written = archive.write(path, [(name, 1.5, content) for name, content in members.items()])
    assert list(archive.scan(path)) == written
    with tarfile.open(path) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == members


# --- damage


def copy(pairs, kind, folder):
    folder.mkdir()
    for path in pairs[kind][1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def unreadable(frames):
    """The names of the images that cannot be read, with the reasons."""
    failed = {}
    for i in range(len(frames)):
        try:
            frames.read(i)
        except OSError as error:
            failed[frames.name(i)] = error.strerror
    return failed


@pytest.mark.parametrize("has_index", [True, False])
def test_images_behind_the_cut_of_a_tar_are_unreadable(pairs, tmp_path, capsys, has_index):
    folder = copy(pairs, "videos", tmp_path / "tars")
    tar = folder / VIDEOS[1].replace("mp4", "tar")
    os.truncate(tar, tar.stat().st_size // 2)
    if not has_index:
        (folder / packed.NAME).unlink()
    frames, intact = FrameFolder(folder), FrameFolder(pairs["videos"][1])
    failed = unreadable(frames)
    assert len(frames) == len(intact) and frames.counts == intact.counts
    inside = names_in(pairs["videos"][1] / tar.name)
    assert 3 < len(failed) < 12 and list(failed) == inside[-len(failed) :]
    if has_index:
        assert all(f"{tar.name} is cut, damaged or changed" in reason for reason in failed.values())
    else:
        assert all(reason == "it is in no tar" for reason in failed.values())
        assert f"{tar} is cut or damaged at byte" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["videos", "tree"])
def test_damaged_headers_are_named_and_other_images_read(pairs, kind, tmp_path):
    folder = copy(pairs, kind, tmp_path / "tars")
    tar = packed.list_tars(folder)[0]
    _, second, *_ = archive.scan(folder / tar)
    with open(folder / tar, "r+b") as file:
        file.seek(second[1] + 130)
        file.write(b"7")  # in the size
    failed = unreadable(FrameFolder(folder))
    assert len(failed) == 1 and f"{tar} is cut, damaged or changed since it was indexed" in next(iter(failed.values()))


def test_a_tar_that_has_changed_is_named(pairs, tmp_path):
    folder = copy(pairs, "videos", tmp_path / "tars")
    one, other = packed.list_tars(folder)[:2]
    (folder / one).write_bytes((folder / other).read_bytes())
    failed = unreadable(FrameFolder(folder))
    assert len(failed) == 7 and all(f"{one} is cut, damaged or changed" in reason for reason in failed.values())


@pytest.mark.parametrize("kind", ["videos", "tree"])
@pytest.mark.parametrize("has_index", [True, False])
def test_missing_and_renamed_tars_are_named(pairs, kind, tmp_path, has_index):
    folder = copy(pairs, kind, tmp_path / "tars")
    if not has_index:
        (folder / packed.NAME).unlink()
    name = packed.list_tars(folder)[0]
    (folder / name).rename(folder / "other.tar")
    if kind == "tree" and not has_index:  # the members name the classes
        assert contents(FrameFolder(folder)) == contents(FrameFolder(pairs[kind][1]))
        return
    with pytest.raises(UserError, match=f"has no {name} .is it other.tar, renamed.*1 missing"):
        FrameFolder(folder)
    (folder / "other.tar").unlink()
    with pytest.raises(UserError, match=f"has no {name}, one of 1"):
        FrameFolder(folder)


def test_a_tar_that_was_added_is_indexed(pairs, tmp_path):
    folder = copy(pairs, "tree", tmp_path / "tars")
    archive.write(folder / "more.tar", [("class_0003/x.png", 0, b"x")])
    frames = FrameFolder(folder)
    assert frames.classes[-1] == "class_0003" and frames.counts == [8, 8, 8, 1]


def test_a_tar_that_disappears_while_it_is_used_costs_its_images(pairs, tmp_path):
    folder = copy(pairs, "tree", tmp_path / "tars")
    frames = FrameFolder(folder)
    (folder / packed.list_tars(folder)[0]).unlink()
    with pytest.raises(OSError) as error:
        frames.read(0)
    assert error.value.errno == errno.ENOENT and frames.name(0).startswith("class_0000-0000.tar")


def test_corrupt_images_are_replaced_and_counted(tmp_path, capsys):
    """One image is no image, the header of another is damaged: batches are those of files with the same faults."""
    files = make_frames(tmp_path / "files", ["a", "b"], n=120, size=16)
    (files / "b" / "img_0004.jpeg").write_bytes(b"no image")
    tars = pack(files, tmp_path / "tars")
    frames = [FrameFolder(each) for each in (files, tars, tars)]
    (files / "b" / "img_0007.jpeg").unlink()
    with open(tars / "b-0000.tar", "r+b") as file:
        file.seek(list(archive.scan(tars / "b-0000.tar"))[7][1])
        file.write(b"x")
    batches = [
        loader.FrameLoader(each, augment.RECIPES["none"], 32, loader.EpochSampler(240, 20), "cpu", workers)
        for each, workers in zip(frames, (0, 0, 2), strict=True)
    ]
    for each in zip(*(each.epoch(0) for each in batches), strict=True):
        for expected, *tensors in zip(*each, strict=True):
            assert all(torch.equal(tensor, expected) for tensor in tensors)
    assert all(sorted(each.bad) == [124, 127] for each in batches)
    out = "".join(capsys.readouterr())
    assert out.count("b-0000.tar/b/img_0004.jpeg: ") == 2
    assert out.count("b-0000.tar is cut, damaged or changed since it was indexed; replaced") == 2


# --- open files, processes, memory


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


def test_a_copy_in_another_process_maps_the_same_index(pairs):
    frames = FrameFolder(pairs["tree"][1])
    content = pickle.dumps(frames)
    assert len(content) < 4000 and contents(pickle.loads(content)) == contents(frames)
    assert pickle.loads(pickle.dumps(frames.path(3))).read_bytes() == frames.read(3)


@pytest.mark.parametrize("millions", [1, pytest.param(8, marks=pytest.mark.thorough)])
def test_an_index_of_millions_of_images_is_not_read_into_memory(tmp_path, millions):
    n = millions * 10**6
    packed.write_index(tmp_path / packed.NAME, np.arange(n, dtype=np.uint64), ["x.tar"], classes={"x": n})
    archive.write(tmp_path / "x.tar", [])
    code = f"""
from pathlib import Path
from moco.data import packed
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before = anonymous()
images = packed.load(Path({str(tmp_path)!r}))
assert len(images) == {n} and images.class_sizes() == [{n}]
for i in range(0, {n}, 100):
    images.member(i, "")
print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=support.ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4000  # kB; the index has 8 bytes per image


# --- the same training


@pytest.mark.usefixtures("handlers", "one_thread")
@pytest.mark.parametrize("script, flags", [(moco_img, SMALL_MOCO), (moco_temp, SMALL_MOCO)], ids=["img", "temp"])
def test_moco_on_tars_is_bitwise_that_on_files(pairs, tmp_path, script, flags):
    for data, workers in zip(pairs["videos"], ("0", "2"), strict=True):
        script.main([str(data), "--save-dir", f"{tmp_path}/{workers}", *flags, "--epochs", "1", "--workers", workers])
    assert same(everything(tmp_path / "0"), everything(tmp_path / "2"))


@pytest.mark.usefixtures("handlers", "one_thread")
def test_a_training_on_tars_that_is_interrupted_is_bitwise_an_undisturbed_one_on_files(pairs, tmp_path):
    files, tars = pairs["videos"]
    train(files, tmp_path / "files")
    train(tars, tmp_path / "tars", "--epochs", 1, "--workers", 2)
    train(tars, tmp_path / "tars", "--resume")
    assert same(everything(tmp_path / "files"), everything(tmp_path / "tars"))


@pytest.mark.thorough
@pytest.mark.usefixtures("handlers", "one_thread")
@pytest.mark.parametrize("workers", ["0", "2", "4"])
@pytest.mark.parametrize("kind", ["videos", "tree"])
@pytest.mark.parametrize("script, flags", [
    (temporal_classification, SMALL), (moco_img, SMALL_MOCO), (moco_temp, SMALL_MOCO),
], ids=["tc", "img", "temp"])  # fmt: skip
def test_killed_and_resumed_trainings_with_any_number_of_workers(pairs, tmp_path, script, flags, kind, workers):
    files, tars = pairs[kind]
    flags = [*flags, "--save-minutes", "0"]
    script.main([str(files), "--save-dir", str(tmp_path / "files"), *flags])
    command = [sys.executable, script.__file__, str(tars), "--save-dir", str(tmp_path / "tars"), *flags]
    command += ["--print-freq", "1", "--workers", workers]
    options = dict(
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process = subprocess.Popen(command, **options)
    wait_for_step(tmp_path / "tars", process, 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume"], check=True, **options)
    assert same(everything(tmp_path / "files"), everything(tmp_path / "tars"))


def test_analyses_read_packed_images(pairs, tmp_path):
    folder = make_frames(tmp_path / "files", n=2, size=64)
    rows = []
    for data in (folder, pack(folder, tmp_path / "tars")):
        cache = tmp_path / f"cache of {data.name}"
        cache.mkdir()
        rows.append(hog_baseline.all_features(FrameFolder(data), np.arange(6), 0, cache))
    assert rows[0].shape[0] == 6 and not np.isnan(rows[0]).any() and np.array_equal(*rows)
    files, tars = map(FrameFolder, pairs["tree"])
    shown = [
        film.images_and_maps(lambda images: images, frames, range(len(frames)), 40, torch.device("cpu"), workers=2)[0]
        for frames in (files, tars)
    ]
    assert np.array_equal(*shown)
    shown = [
        highly_activating_imgs.image_row({"unit": 0}, [frames.path(i) for i in (3, 9)], {}, 40)[1]
        for frames in (files, tars)
    ]
    assert np.array_equal(*shown)


def test_features_of_packed_images_are_cached_until_a_tar_changes(pairs, tmp_path):
    folder = copy(pairs, "tree", tmp_path / "tars")
    frames = FrameFolder(folder)
    images = np.arange(len(frames))
    key = features.cache_key(frames, images)
    assert key == features.cache_key(FrameFolder(folder), images)
    os.utime(folder / packed.list_tars(folder)[0], (0, 0))
    assert key != features.cache_key(frames, images)

"""read_saycam.py --pack: the images of the plain reader, in a tar per video."""

import time

import pytest

from moco.cli import UserError
from moco.data import manifest, tars
from moco.data.folders import FrameFolder
from moco.videos import extract
from scripts import pack_frames
from tests.support import videos as support
from tests.support.videos import read, start_reading, write_video, write_videos

SMALL = ("--size", "64", "--seg-len", "2")
PACK = (*SMALL, "--pack")


def tree(folder):
    """{relative path: bytes} of the files in folder without the index, which has times of modification."""
    return {name: content for name, content in support.tree(folder).items() if name != tars.INDEX}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos and a damaged one."""
    counts = {"S_20130417_0600_01": 100, "b": 37, "c": 120, "damaged": 100}
    folder = write_videos(tmp_path_factory.mktemp("videos"), counts)
    content = bytearray((folder / "damaged.mp4").read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - len(content) // 2)
    (folder / "damaged.mp4").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def expected(videos, tmp_path_factory):
    """The files that one uninterrupted run with --pack in one process writes."""
    folder = tmp_path_factory.mktemp("expected")
    assert read(videos, folder, *PACK) is None
    return tree(folder)


def test_tars_have_the_images_of_the_plain_reader(videos, expected, tmp_path):
    assert read(videos, tmp_path / "files", *SMALL) is None
    assert read(videos, tmp_path / "tars", *PACK) is None
    assert tree(tmp_path / "tars") == expected
    assert {"S_20130417_0600_01.tar", "b.tar", "c.tar", "manifest.json", "videos.csv"} < expected.keys()
    assert not [name for name in expected if name.endswith("jpeg")]
    files, packed = (FrameFolder(tmp_path / kind) for kind in ("files", "tars"))
    assert [(files.name(i), files.read(i)) for i in range(len(files))] == [
        (packed.name(i), packed.read(i)) for i in range(len(packed))
    ]
    names = list(tars.scan(tmp_path / "tars" / "c.tar")[0])
    assert names == sorted(names)
    pack_frames.main([str(tmp_path / "tars"), "--save-dir", str(tmp_path / "unpacked"), "--unpack"])
    files = {name: content for name, content in tree(tmp_path / "files").items() if name.endswith("jpeg")}
    assert files.items() <= tree(tmp_path / "unpacked").items()


def test_tars_are_the_same_for_workers_and_shards(videos, expected, tmp_path):
    assert read(videos, tmp_path / "workers", *PACK, workers=2) is None
    assert tree(tmp_path / "workers") == expected
    for shard in ("1/2", "0/2"):
        assert read(videos, tmp_path / "shards", *PACK, "--shard", shard) is None
        if shard == "1/2":
            with pytest.raises(UserError, match="not complete; to finish it: python read_saycam.py .*--pack"):
                FrameFolder(tmp_path / "shards")
    assert tree(tmp_path / "shards") == expected


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.thorough)])
def test_tars_are_the_same_after_kills(tmp_path, kills):
    folder, killed, plain = tmp_path / "videos", tmp_path / "killed", tmp_path / "plain"
    folder.mkdir()
    for k in range(2 + 2 * kills):
        write_video(folder / f"{k:02d}.mp4", 100, options={"preset": "ultrafast"})
    large = ("--fps", "30", "--size", "448", "--pack")
    assert read(folder, plain, *large, workers=2) is None
    killed.mkdir()
    for n in range(kills):
        process = start_reading(folder, killed, *large, "--workers", "2")
        while process.poll() is None and len(tars.list_tars(killed)) <= n:
            time.sleep(0.005)
        assert process.poll() is None, "the process ended before the kill"
        process.kill()
        process.communicate()
        for tar in tars.list_tars(killed):
            assert len(tars.scan(killed / tar)[0]) == 100
    assert not manifest.read(killed)["complete"]
    assert read(folder, killed, *large, workers=2) is None
    assert tree(killed) == tree(plain)


def test_reading_that_is_interrupted_leaves_no_tar(videos, tmp_path):
    """An incomplete tar would be taken for a complete one."""
    read(videos, tmp_path, *PACK, "--plan")
    plan = manifest.read(tmp_path)
    entry = {**plan["videos"][0], "tar": "x.tar"}

    def report(done):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        extract.extract_images(tmp_path, plan, (videos / entry["name"], entry, None), report)
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*.tar"))


def test_files_and_tars_do_not_mix(videos, tmp_path):
    read(videos, tmp_path, *PACK)
    with pytest.raises(UserError, match="--pack was True, not None"):
        read(videos, tmp_path, *SMALL)

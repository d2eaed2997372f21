"""read_saycam.py --pack: the images of the plain reader, in a tar per video."""

import pytest

from moco.cli import UserError
from moco.data import manifest, tars
from moco.data.folders import FrameFolder
from moco.videos import extract
from scripts import pack_frames
from tests.support.videos import damaged, read, tree, write_videos

SMALL = ("--size", "64", "--seg-len", "2")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos and a damaged one."""
    counts = {"S_20130417_0600_01": 100, "b": 37, "c": 120}
    folder = write_videos(tmp_path_factory.mktemp("videos"), counts)
    damaged(folder / "damaged.mp4", 100)
    return folder


def test_tars_have_the_images_of_the_plain_reader(videos, tmp_path):
    assert read(videos, tmp_path / "files", *SMALL) is None
    assert read(videos, tmp_path / "tars", *SMALL, "--pack") is None
    names = tree(tmp_path / "tars").keys()
    assert names == {"S_20130417_0600_01.tar", "b.tar", "c.tar", "damaged.tar", "manifest.json", "videos.csv"}
    files, packed = (FrameFolder(tmp_path / kind) for kind in ("files", "tars"))
    assert [(files.name(i), files.read(i)) for i in range(len(files))] == [
        (packed.name(i), packed.read(i)) for i in range(len(packed))
    ]
    names = list(tars.scan(tmp_path / "tars" / "c.tar")[0])
    assert names == sorted(names)
    pack_frames.main([str(tmp_path / "tars"), "--save-dir", str(tmp_path / "unpacked"), "--unpack"])
    images = {name: content for name, content in tree(tmp_path / "files").items() if name.endswith("jpeg")}
    assert images.items() <= tree(tmp_path / "unpacked").items()
    with pytest.raises(UserError, match="--pack was True, not None"):
        read(videos, tmp_path / "tars", *SMALL)


def test_reading_that_is_interrupted_leaves_no_tar(videos, tmp_path):
    """An incomplete tar would be taken for a complete one."""
    read(videos, tmp_path, *SMALL, "--pack", "--plan")
    plan = manifest.read(tmp_path)
    entry = {**plan["videos"][0], "tar": "x.tar"}

    def report(done):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        extract.extract_images(tmp_path, plan, (videos / entry["name"], entry, range(5)), report)
    assert not list(tmp_path.glob("*.tar")) + list(tmp_path.glob(".*.tar"))

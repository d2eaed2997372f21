"""The files in folders of videos."""

import pytest

from moco.cli import UserError
from moco.videos import listing


def test_names_are_sorted_within_each_folder_without_hidden_files(tmp_path):
    for name in ("S/b.mp4", "S/a.mp4", "S/.hidden.mp4", "S/sub/c.mp4", "A/z.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    roots = [tmp_path / "S", tmp_path / "A"]
    flat = [(0, "a.mp4", 5), (0, "b.mp4", 5), (1, "z.mp4", 5)]
    assert listing.list_videos(roots, False, tmp_path) == (flat, [])
    deep = [(0, "a.mp4", 5), (0, "b.mp4", 5), (0, "sub/c.mp4", 5), (1, "z.mp4", 5)]
    assert listing.list_videos(roots, True, tmp_path) == (deep, [])


def test_files_that_the_program_writes_are_not_listed(tmp_path):
    for name in ("v.mp4", "manifest.json", "filled-host-1.jsonl", "frames/class_0000/img_0000.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    assert listing.list_videos([tmp_path], True, tmp_path / "frames")[0][-1] == (0, "v.mp4", 1)
    assert listing.list_videos([tmp_path], False, tmp_path) == ([(0, "v.mp4", 1)], [])
    with pytest.raises(UserError, match="give another --save-dir"):
        listing.list_videos([tmp_path], True, tmp_path)


def test_control_characters_in_a_name_are_escaped():
    assert listing.printable("ü 赤.mp4") == "ü 赤.mp4"
    assert listing.printable("a\x1b[2J\n\udcff.mp4") == r"a\x1b[2J\n\udcff.mp4"

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
    for name in (
        "v.mp4",
        "manifest.json",
        "times.npy",
        "frames.csv",
        "videos.csv",
        "filled-host-1.jsonl",
        "frames/class_0000/img_0000.jpeg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    listed = listing.list_videos([tmp_path], True, tmp_path / "frames")[0]
    assert (0, "v.mp4", 1) in listed and not any("img" in name for _, name, _ in listed)
    assert listing.list_videos([tmp_path], False, tmp_path) == ([(0, "v.mp4", 1)], [])
    with pytest.raises(UserError, match="give another --save-dir"):
        listing.list_videos([tmp_path], True, tmp_path)


def test_links_are_followed_wherever_they_lead_but_not_in_circles(tmp_path):
    for name in ("store/a.mp4", "store/deep/b.mp4", "S/own.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "S" / "linked.mp4").symlink_to("../store/a.mp4")
    (tmp_path / "S" / "folder").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "deep" / "up").symlink_to(tmp_path / "S")
    (tmp_path / "store" / "deep" / "round").symlink_to(tmp_path / "store" / "deep")
    (tmp_path / "S" / "itself").symlink_to("itself")
    reason = "it cannot be accessed: Too many levels of symbolic links"
    readable, left_out = listing.list_videos([tmp_path / "S"], True, tmp_path / "out")
    assert [name for _, name, _ in readable] == ["folder/a.mp4", "folder/deep/b.mp4", "linked.mp4", "own.mp4"]
    assert left_out == [(0, "itself", reason)]


def test_control_characters_in_a_name_are_escaped():
    assert listing.printable("ü 赤.mp4") == "ü 赤.mp4"
    assert listing.printable("a\x1b[2J\n\udcff.mp4") == r"a\x1b[2J\n\udcff.mp4"

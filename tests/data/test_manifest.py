"""The manifest's arithmetic against a plain list of all images."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco.cli import UserError
from moco.data import manifest

SETTINGS = {"fps": 5.0, "seg-len": 2.0, "class-by": "time", "drop-last": False}


def make(slots, missing=(), names=None, **settings):
    """A filled plan of videos with so many slots each, at 5 per second, in classes of 10; missing: of no image."""
    names = names or [f"v_{k}.mp4" for k in range(len(slots))]
    videos = [
        {"folder": 0, "name": name, "slots": n, "frames": 6 * n, "rate": 30, "step": 6}
        for name, n in zip(names, slots, strict=False)
    ]
    plan = manifest.make({**SETTINGS, **settings}, ["videos"], videos, [])
    for video in plan["videos"]:
        inside = range(video["first_slot"], video["first_slot"] + video["slots"])
        video["missing"] = [[slot, slot + 1] for slot in sorted(missing) if slot in inside]
    return plan | {"complete": True}


def images(plan):
    """[(path, video, slot)] of all images of a plan, one by one."""
    return [
        (manifest.slot_path(plan, video, slot), number, slot)
        for number, video in enumerate(plan["videos"])
        for slot in range(video["first_slot"], video["first_slot"] + video["slots"])
        if [slot, slot + 1] not in video["missing"]
    ]


@given(
    slots=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    missing=st.sets(st.integers(0, 180)),
    by=st.sampled_from(["time", "video", "name"]),
    window=st.integers(0, 12),
)
def test_every_answer_is_that_of_the_plain_list(slots, missing, by, window):
    plan = make(slots, missing, **{"class-by": by})
    plain, found = images(plan), manifest.Manifest(plan)
    assert [path for path, _, _ in plain] == sorted(path for path, _, _ in plain)
    folders = [path.split("/")[0] for path, _, _ in plain]
    assert len(found) == len(plain)
    assert found.classes == sorted(set(folders))
    assert found.counts == [folders.count(name) for name in found.classes]
    assert [found.find(path) for path, _, _ in plain] == list(range(len(plain)))
    everywhere = images({**plan, "videos": [{**video, "missing": []} for video in plan["videos"]]})
    for path in {path for path, _, _ in everywhere} - {path for path, _, _ in plain}:
        assert found.find(path) is None
    for i, (path, video, slot) in enumerate(plain):
        assert (found.path(i), found.video(i), folders[i]) == (path, video, folders[i])
        near = [j for j, (_, v, s) in enumerate(plain) if v == video and abs(s - slot) <= window and j != i]
        assert list(found.neighbors(i, window)) == near
    for outside in (-1, len(plain)):
        with pytest.raises(IndexError):
            found.path(outside)


@pytest.mark.parametrize("name", [
    "class_0001/img_0000.jpg", "class_0001/img_000.jpeg", "class_0001/img_0010.jpeg", "class_0001/img_.jpeg",
    "class_0001/img_٣.jpeg", f"class_0001/img_{'9' * 99}.jpeg", "class_0009/img_0000.jpeg", "img_0001.jpeg", "",
])  # fmt: skip
def test_names_of_no_image_are_not_found(name):
    assert manifest.Manifest(make([35])).find(name) is None


def test_damaged_times_are_named(tmp_path):
    plan = make([10])
    plan["videos"][0] |= {"times_from": 0, "rate": 30.0}
    manifest.write(tmp_path, plan)
    np.save(tmp_path / "times.npy", np.zeros((10, 2)))
    content = (tmp_path / "times.npy").read_bytes()
    for damaged in (content[:-40], b"", b"not an array", None):
        (tmp_path / "times.npy").write_bytes(damaged or b"")
        if damaged is None:
            (tmp_path / "times.npy").unlink()
        with pytest.raises(UserError, match="times.npy is missing or damaged"):
            manifest.load(tmp_path).source(3)


def test_ten_million_frames_open_and_are_selected_in_under_a_second(tmp_path):
    plan = make([2000] * 5000, range(0, 10_000_000, 5000), **{"seg-len": 288.0})
    (tmp_path / "manifest.json").write_text(json.dumps(plan))
    start = time.process_time()
    found = manifest.load(tmp_path)
    assert time.process_time() - start < 1
    assert len(found) == 10_000_000 - 2000
    assert found.path(0) == "class_0000/img_0001.jpeg"
    assert found.path(len(found) - 1) == "class_6944/img_0639.jpeg"
    start = time.process_time()
    assert len(found.select({1: 1, 4999: 0.5})) == 2000 + 1000
    assert time.process_time() - start < 1


def test_numbers_get_wider_only_where_the_plan_needs_it():
    assert manifest.Manifest(make([10_000], **{"seg-len": 1e4})).path(9_999) == "class_0000/img_9999.jpeg"
    assert manifest.Manifest(make([10_001], **{"seg-len": 1e4})).path(9_999) == "class_0000/img_09999.jpeg"
    assert manifest.Manifest(make([100_000])).path(99_999) == "class_9999/img_0009.jpeg"
    assert manifest.Manifest(make([100_001])).path(99_999) == "class_09999/img_0009.jpeg"


def test_names_that_would_mix_or_be_too_long_are_left_out():
    plan = make([1500, 3, 3], names=["a_1.mp4", "a_1_0.mp4", "a_1_.mp4"], **{"class-by": "name"})
    assert [each["name"] for each in plan["videos"]] == ["a_1.mp4", "a_1_.mp4"]
    assert "would mix with those of a_1.mp4" in plan["left_out"][0]["reason"]
    plan = make([3, 3], names=["a.mp4", "ü" * 125 + ".mp4"], **{"class-by": "name"})
    assert plan["left_out"][0]["reason"] == "its name is too long for image names"
    plan = make([3, 3], names=["n" * 255, "n" * 255], **{"class-by": "video"})  # the second class would be n...n.2
    assert [each["class"] for each in plan["videos"]] == ["n" * 255]
    assert plan["left_out"][0]["reason"] == "its name is too long for image names"


def test_image_names_have_one_dot():
    """What follows the first one is no part of the name for WebDataset."""
    names = ["a.b/01_x_2.5.2024-5:19pm.mp4", "c/01_x_2-5-2024-5:19pm.mp4", "02_x.mp4"]
    found = manifest.Manifest(make([2, 1, 1], names=names, **{"class-by": "name"}))
    assert [found.path(i) for i in range(4)] == [
        "01/01_x_2-5-2024-5:19pm-2_0000.jpeg", "01/01_x_2-5-2024-5:19pm_0000.jpeg",
        "01/01_x_2-5-2024-5:19pm_0001.jpeg", "02/02_x_0000.jpeg",
    ]  # fmt: skip


def test_tars_have_no_colon_and_a_name_of_their_own():
    videos = [{"name": name} for name in ("a/v 5:19.mp4", "v 5-19.mp4", "v 5-19.2.mp4", "c.d.mp4")]
    assert manifest.video_tars(videos) == ["v 5-19.tar", "v 5-19.3.tar", "v 5-19.2.tar", "c.d.tar"]


@pytest.mark.parametrize("by", ["name", "video"])
def test_no_class_is_called_like_the_manifest(by):
    plan = make([3, 3], names=["manifest.json.mp4", "filled-a.jsonl.mp4"], **{"class-by": by})
    assert manifest.class_names(plan) == ["filled-a.jsonl", "manifest.json_"]


def test_no_manifest_is_none_and_an_unfinished_one_says_what_finishes_it(tmp_path):
    assert manifest.load(tmp_path) is None
    plan = make([10])
    plan.update(complete=False, folders=["my videos"])
    manifest.write(tmp_path, plan)
    command = f"python read_saycam.py 'my videos' --save-dir {tmp_path} --fps 5.0 --seg-len 2.0 --class-by time"
    with pytest.raises(UserError, match=f"is not complete; to finish it: {command}$"):
        manifest.load(tmp_path)


def damaged(**entries):
    """The text of a manifest with other entries; those with an underscore are of its first video."""
    plan = make([10, 20])
    for key, value in entries.items():
        (plan["videos"][0] if key.startswith("_") else plan)[key.removeprefix("_")] = value
    return json.dumps(plan).encode()


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff", damaged(videos=None), damaged(version=99), damaged(slots=-1),
    damaged(per_class="many"), damaged(_first_slot=99), damaged(_first_slot="0"), damaged(_missing=[[5, 2]]),
    damaged(_missing=5),
], ids=range(13))  # fmt: skip
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        manifest.load(tmp_path)

"""What names and tables say of recordings, and which recordings a selection takes."""

import argparse
import os
import random

import pytest

from moco.cli import UserError
from moco.data import recordings
from moco.data.recordings import Recording, Selection

NAMES = {  # name -> child, date, age_months, age_days, part
    "S_20130417_0600_01.mp4": ("S", "2013-04-17", 6, 183, 1),
    "s_20130417_0600_1.AVI": ("S", "2013-04-17", 6, 183, 1),
    "S_20130417_0600_01_cut.mp4.mkv": ("S", "2013-04-17", 6, 183, 1),
    "S_20130421_0604_001-2": ("S", "2013-04-21", 6.131, 187, 1),
    "Y_20151231_3129_11.mp4": ("Y", "2015-12-31", 31.953, 973, 11),
    "deep/er/A_20130814_0507_02.MOV": ("A", "2013-08-14", 5.23, 159, 2),
    "S_20130131_0531_01.mp4": ("S", "2013-01-31", 5.986, 183, 1),
    "S_20130131_0545_01.mp4": ("S", "2013-01-31", 5.986, 197, 1),
    "B_20160229_0000_01.mp4": ("B", "2016-02-29", 0, 0, 1),
    **dict.fromkeys(["S_20130417_0600.mp4", "S_20131332_0600_01.mp4", "S_20150229_0600_01.mp4", "GOPR0042.MP4", "",
                     "SS_20130417_0600_01.mp4", "S-20130417-0600-01.mp4", "S_2013041_0600_01.mp4", "ü_1.mp4",
                     "S_20130417_600_01.mp4", "S_20130417_06000_01.mp4", "S_20130417_0600_x.mp4"], ()),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_saycams_names_say_child_date_age_and_part_and_others_nothing(name):
    recording = recordings.from_name(name)
    assert recording == Recording(*NAMES[name]) and bool(recording.known()) == bool(NAMES[name])


CHAPTERS = [  # recordings and their chapters, in order
    ["00220001_GX010001_02.05.2024-02.11.2024_02.05.2024-5:19pm.mp4",
     "00220001_GX020001_02.05.2024-02.11.2024_02.05.2024-5:31pm.mp4"],
    ["00220001_GX010001_02.12.2024-02.18.2024_02.12.2024-9:18am.mp4"],
    ["00220001_GX010002_02.05.2024-02.11.2024_02.05.2024-5:19pm.mp4",
     "00220001_GX020002_02.05.2024-02.11.2024_02.05.2024-5:19pm.mp4"],
    ["00220002_GX010001_02.05.2024-02.11.2024_02.05.2024-5:19pm.mp4"],
    ["GH010007.MP4"],
    ["GOPR0007.MP4", "GP010007.MP4", "GP020007.MP4", "GP100007.MP4"],
    ["GX010007.MP4", "GX020007.MP4"],
    ["GX010008.MP4", "GX020008.MP4"],
    ["part_1.mp4"], ["part_2.mp4"], ["part_10.mp4"],
    ["sub/GX010007.MP4", "sub/GX020007.MP4"],
]  # fmt: skip


def test_videos_are_in_natural_order_with_the_chapters_of_a_recording_together():
    names = [name for recording in CHAPTERS for name in recording]
    for seed in range(5):
        assert sorted(random.Random(seed).sample(names, len(names)), key=recordings.sort_key) == names
    own = [{recordings.chapter(name)[0] for name in recording} for recording in CHAPTERS]
    assert all(len(each) == 1 for each in own) and len(set.union(*own)) == len(CHAPTERS)


@pytest.mark.parametrize("name", ["GX01000.MP4", "XGX010007.MP4", "GX0100071.MP4", "MYGOPR0007.MP4", "GXAA0007.MP4"])
def test_other_names_are_no_chapters(name):
    assert recordings.chapter(name) == (name, 0)


def table(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return recordings.read_table(tmp_path / "table.csv")


@pytest.mark.parametrize("row, recording", [
    ("B,2020-02-29,6.5,,3,kitchen", Recording("B", "2020-02-29", 6.5, 198, 3, columns={"room": "kitchen"})),
    ("S,2013-04-17 00:00:00,,384.0,1.0,NA", Recording("S", "2013-04-17", 12.616, 384, 1, columns={"room": "NA"})),
    ("NA,NaT,nan,384,inf,", Recording(None, None, 12.616, 384)),
    ("<NA>,2013-04-17T09:05:00.5Z,NaN,N/A,None,None", Recording(date="2013-04-17", columns={"room": "None"})),
    (",,,,,", Recording()),
])  # fmt: skip
def test_a_table_says_what_it_has(tmp_path, row, recording):
    text = f"file,child,date,age_months,age_days,part,room\nsub/a.mp4,{row}\n"
    assert table(tmp_path, text) == {"sub/a.mp4": recording}
    for name in ("sub/a.mp4", "sub/a", "a.mp4", "a"):
        assert recordings.lookup({name: recording}, "sub/a.mp4") == recording


@pytest.mark.parametrize("text, message", [
    ("name,child\na,b\n", "no column 'file'"),
    ("file,child\na,b\n\na,c\n", "--recordings .*table.csv, line 4: a is there twice"),
    ("file,age_days\na,six\n", "line 2: age_days is six, not a number"),
    ("file,part\na,1\nb,1.5\n", "line 3: part is 1.5, not a whole number"),
    ("file,date\na,17.4.2013\n", "line 2: .*17.4.2013"),
    ("file,rotate\na,180.0\nb,45\n", "line 3: rotate is 45, not one of 0, 90, 180, 270"),
])  # fmt: skip
def test_a_faulty_table_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        table(tmp_path, text)


def test_what_a_manifest_has_of_a_table_wins_over_the_name():
    video = {"name": ALL[0][0], "child": "B", "age_months": 9.0}
    assert recordings.from_entry(video) == Recording("B", age_months=9.0)
    assert recordings.from_entry({"name": ALL[0][0]}).child == "S"


def test_names_that_are_not_utf_8_are_found_in_tables_of_their_encoding():
    name = os.fsdecode("caf\xe9.mp4".encode("cp1252"))
    assert {"café.mp4", "café", name} <= recordings.names_of(f"sub/{name}")


SECONDS = {
    "S_20130417_0600_01.mp4": 3600, "S_20130421_0604_01.mp4": 1800, "S_20131101_1200_01.mp4": 600,
    "A_20130814_0507_02.mp4": 7200, "A_20140101_1131_01.mp4": 60, "room.mp4": 1000,
}  # fmt: skip
ALL = [(name, recordings.from_name(name), seconds) for name, seconds in SECONDS.items()]


@pytest.mark.parametrize("conditions, chosen", [
    (dict(), [0, 1, 2, 3, 4, 5]),
    (dict(children=("A",)), [3, 4]),
    (dict(ages=(6, 12)), [0, 1, 4]),
    (dict(ages=(0, 6)), [3]),
    (dict(ages=(12, 1e9)), [2]),
    (dict(select=("S_2013*",)), [0, 1, 2]),
    (dict(select=("*_01.mp4",), exclude=("A_*", "*_1200_*")), [0, 1]),
    (dict(names=("room", "S_20130421_0604_01.mp4")), [1, 5]),
    (dict(children=("S",), ages=(6, 12), exclude=("*0604*",)), [0]),
])  # fmt: skip
def test_every_condition_is_met(conditions, chosen):
    assert Selection(**conditions).choose(ALL) == {i: ALL[i][2] for i in chosen}


UNKNOWN = ALL[-1:]


@pytest.mark.parametrize("known, conditions, message", [
    (ALL, dict(children=("Q",)), "no recording is of child Q; there are A, S"),
    (ALL, dict(ages=(20, 30)), "leaves no recording"),
    (ALL, dict(names=tuple("abcd")), "there is no recording a, b, c, ...$"),
    (ALL, dict(names=("room", "hall", "attic")), "there is no recording hall, attic$"),
    (ALL, dict(select=("*", "x*")), "matches the pattern x"),
    (ALL, dict(exclude=("x*",)), "matches the pattern x"),
    (ALL, dict(hours=5), "--hours 5: the selected recordings have 3.96"),
    (UNKNOWN, dict(ages=(6, 12)), "the age of no recording is known; give their ages in a table"),
    (UNKNOWN, dict(children=("S",)), "there are none that is known"),
    ([], dict(ages=(6, 12)), "the age of no recording is known; give their ages in a table"),
    ([], dict(children=("S",)), "there are none that is known"),
])  # fmt: skip
def test_a_condition_that_nothing_meets_is_one_line(known, conditions, message):
    with pytest.raises(UserError, match=message):
        Selection(**conditions).choose(known)


@pytest.mark.parametrize("seed", range(5))
def test_hours_are_exact_and_nested(seed):
    previous = {}
    for hours in (0.01, 0.5, 1, 2, 3.5, 3.9):
        taken = Selection(hours=hours, seed=seed).choose(ALL)
        assert sum(taken.values()) == pytest.approx(3600 * hours)
        assert sum(seconds < ALL[i][2] for i, seconds in taken.items()) <= 1
        assert all(taken.get(i, 0) >= seconds for i, seconds in previous.items())
        previous = taken
    draws = [Selection(hours=0.5, seed=each).choose(ALL) for each in (seed, *range(10))]
    assert draws[0] == draws[1 + seed] and len(set(map(tuple, draws))) > 1


def parse(*flags):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.set_defaults(seed=7)
    recordings.add_flags(parser)
    return recordings.selection(parser.parse_args(flags))


def test_the_flags(tmp_path):
    assert parse() is None
    assert parse("--ages", "6-12", "--children", "S", "A") == Selection(("S", "A"), (6, 12), seed=7)
    assert parse("--ages=-12").ages == (0, 12) and parse("--ages", "6.5-").ages == (6.5, 1e9)
    (tmp_path / "list.txt").write_text("a.mp4\r\n\nb c.mp4")
    assert parse("--list", str(tmp_path / "list.txt")).names == ("a.mp4", "b c.mp4")
    for wrong in ("6", "12-6", "-", "a-b", "6-6"):
        with pytest.raises(argparse.ArgumentError, match=f"{wrong} is not a range in months"):
            parse(f"--ages={wrong}")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        parse("--list", str(tmp_path / "list.txt"))


def test_a_selection_is_described():
    assert recordings.describe(ALL, {0: 3600, 3: 3600}) == (
        "2 of 6 recordings, 2.00 hours, children A, S, ages 5.2 to 6.0 months"
    )
    assert recordings.describe(ALL, {5: 900}) == "1 of 6 recordings, 15.00 minutes"

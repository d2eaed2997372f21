"""The page of results, and the chain of steps that reproduce.sh plans for it."""

import json
import os
import re
import subprocess

import cv2
import numpy as np
import pytest

from moco.cli import UserError
from scripts import report
from tests.scripts.test_scripts import flags_of, known_flags
from tests.support import ROOT


@pytest.fixture
def results(tmp_path):
    """Results of a training, linear decoding, a figure, a film and an ImageNet run, as the scripts write them."""

    def write(name, content):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    write("TC-S/args.json", {"model": "resnext50_32x4d", "epochs": 16, "commit": "abc123"})
    line = {"images": 1000, "images_per_second": 10, "waiting": 0.1, "loss": 2.5, "acc1": 41.23}
    write("TC-S/log.jsonl", "\n".join(json.dumps({"epoch": i, **line}) for i in range(2)))
    entry = {"std": 0.01, "each": [0.5, 0.5], "chance": 1 / 12, "majority": 0.1}
    models = {
        "TC-S": {"iid": {**entry, "mean": 0.871, "published": 0.885}},
        "a <b> & | c": {"iid": {**entry, "mean": 0.3}},
    }
    write("decoding-toybox/results.json", {"models": models, "seeds": [0, 1]})
    write("imagenet-part/args.json", {"model_path": "out/TC-SAY/resnext50_32x4d_epoch_15.tar"})
    start = "out/imagenet-part/ft_IN_resnext50_32x4d_epoch_15.tar"
    write("imagenet-part-linear/args.json", {"model_path": start, "freeze_trunk": True})
    write("imagenet-part-linear/log.jsonl", json.dumps({"epoch": 0, "images": 9, "val_acc1": 31.26, "val_acc5": 55.0}))
    for name in ("imagenet-part", "imagenet-part-linear"):
        write(f"{name}/train_list.txt", "".join(f"n{label:04d}/a.jpeg\n" for label in range(1000)))
    for name in ("top_images/best.png", "films/class.mp4"):
        (tmp_path / "out" / name).parent.mkdir()
        (tmp_path / "out" / name).write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    return tmp_path / "out"


def page(results, *names):
    """The page of some folders of results, or of all: its text, and the rows of its tables."""
    folders = [results / name for name in names] or sorted(results.iterdir())
    report.main([*map(str, folders), "--out", str(results.parent / "report.html"), "--overwrite"])
    text = (results.parent / "report.html").read_text()
    rows = re.findall("<tr>(.*?)</tr>", text)
    return text, [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_tables_have_measured_and_published_values(results, capsys):
    text, rows = page(results)
    assert ["resnext50_32x4d", "1000", "2 of 16", "3.3", "2.50", "41.2"] in rows and "commit abc123" in text
    assert ["TC-S", "87.1 ± 1.0 (published 88.5)"] in rows and "2 seeds: 0, 1" in text
    assert "TC-S         87.1 ± 1.0 (published 88.5)" in capsys.readouterr().out.splitlines()
    assert ["31.3", "55.0", "45.6"] in [row[-3:] for row in rows]


def test_the_page_is_a_single_file_and_escapes_names(results):
    text, _ = page(results)
    assert "data:image/png;base64," in text and "data:video/mp4;base64," in text
    assert not re.search(r"(src|href)='(?!data:)", text)
    assert "a &lt;b&gt; &amp; | c" in text


def test_sections_are_in_the_order_of_the_folders_and_say_what_is_missing(results):
    text, _ = page(results, "top_images", "decoding-variants", "TC-S")
    parts = re.split("<h2>", text)[1:]
    assert [part.partition("</h2>")[0] for part in parts] == [
        report.TITLES["top_images"], report.TITLES["decoding-variants"], "TC-S"
    ]  # fmt: skip
    assert ["No results" in part for part in parts] == [False, True, False]


def test_mistakes_are_one_line(results):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        page(results, "nowhere")
    page(results)
    with pytest.raises(UserError, match="report.html exists; give --overwrite"):
        report.main([str(results / "TC-S"), "--out", str(results.parent / "report.html")])


def test_damaged_lines_and_flags_are_skipped_with_a_warning(results, capsys):
    log = results / "TC-S" / "log.jsonl"
    log.write_text(log.read_text() + "\n\0\0\n[3]\n" + '{"epoch": 2, "ima')
    (results / "TC-S" / "args.json").write_text('{"model": "resn')
    _, rows = page(results)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "log.jsonl" in line] == [
        f"warning: line {number} of {log} is damaged and skipped" for number in (3, 4, 5)
    ]
    assert any("args.json is damaged" in line for line in warnings)
    assert ["-", "1000", "2 of ?", "3.3", "2.50", "41.2"] in rows
    log.write_text("")  # before the end of the first epoch
    assert "No results" in page(results, "TC-S")[0]


PUBLISHED = "TC-SAY/resnext50_32x4d_epoch_15.tar"


@pytest.mark.parametrize("change, network, published", [
    ({}, PUBLISHED, "45.6"),  # first trained on a part
    ({"imagenet-part/train_list.txt": None}, "imagenet-part/ft_IN_resnext50_32x4d_epoch_15.tar", "-"),
    ({"args.json": {"model_path": PUBLISHED}}, PUBLISHED, "-"),  # not frozen
    ({"args.json": {"model_path": PUBLISHED, "freeze_trunk": True}}, PUBLISHED, "36.0"),
    ({"train_list.txt": "cat/a.jpeg\ndog/a.jpeg\n"}, PUBLISHED, "-"),
])  # fmt: skip
def test_imagenet_is_compared_with_the_published_protocols_only(results, change, network, published):
    """On images of 1000 classes, from the published network, and in the encoding of any editor."""
    images = results / "imagenet-part-linear" / "train_list.txt"
    images.write_text(images.read_text(), encoding="utf-16")
    for name, content in change.items():
        path = results / ("" if "/" in name else "imagenet-part-linear") / name
        path.unlink()
        if content:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    _, (names, cells) = page(results, "imagenet-part-linear")
    row = dict(zip(names, cells, strict=True))
    assert (row["network"], row["published top-1 (%)"]) == (network, published)


def test_results_follow_the_epochs_that_the_flags_ask_for(tmp_path):
    done = dry_run(S=str(tmp_path), LABELED_S=str(tmp_path), TC_FLAGS="--epochs 3", MOCO_FLAGS="--epochs=3")
    assert done.returncode == 0, done.stderr
    assert "TC-S/resnext50_32x4d_epoch_2.tar" in done.stdout and "_epoch_15" not in done.stdout
    assert "moco_img_checkpoint_0002.pth.tar" in done.stdout and "_0011" not in done.stdout


def dry_run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("S", "A", "Y")} | variables
    command = ["bash", str(ROOT / "scripts" / "reproduce.sh"), *arguments, "--dry-run"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def planned_steps(done):
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w-]+)[^:]*:(.*)$", done.stdout, re.MULTILINE))


def test_the_chain_has_every_experiment_and_only_flags_that_exist(tmp_path, capsys):
    data = {name: str(tmp_path) for name in ("S", "A", "Y", "LABELED_S", "TOYBOX", "IMAGENET")}
    (tmp_path / "car").mkdir()
    (tmp_path / "road").mkdir()
    chain = planned_steps(dry_run(**data))
    folders = {os.path.basename(folder) for folder in re.search("FOLDERS=([^ ]+)", chain["report"])[1].split(":")}
    assert folders - {"films"} < set(chain) and {"film", "class_film", "TC-SAY", "frames-toybox"} < set(chain)
    results = {name for name in chain if not re.match("frames|hog|film|class_film|report", name)}
    assert folders == results | {"films"} and set(report.TITLES) < folders
    for line in chain.values():
        script, flags = re.search(r"/(\w+)\.sh(.*)", line).groups()
        assert flags_of(flags.split()) <= known_flags(f"{script}.py", capsys), script


@pytest.mark.parametrize("given", ["S", "TOYBOX", "LABELED_S"])
def test_experiments_without_data_are_skipped(tmp_path, given):
    chain = planned_steps(dry_run(**{given: str(tmp_path)}))
    assert ("TC-S" in chain) == ("moco_img-S" in chain) == (given == "S")
    assert ("decoding-toybox" in chain) == (given == "TOYBOX")
    assert ("decoding-labeled_S" in chain) == (given == "LABELED_S")
    assert "TC-A" not in chain and "imagenet-linear" not in chain and "maps-others" not in chain


def test_the_tiny_reproduction_has_every_experiment(tmp_path):
    for name in ("S", "A", "Y", "labeled", "imagenet"):
        (tmp_path / "world" / name).mkdir(parents=True)
    chain = planned_steps(dry_run("--tiny", OUT=str(tmp_path)))
    assert {"TC-SAY", "moco_temp-S", "decoding-toybox", "maps-others", "imagenet-part-linear", "report"} < set(chain)


def test_a_folder_that_does_not_exist_is_one_line():
    done = dry_run(S="no/folder")
    assert done.returncode == 2 and done.stderr == "reproduce.sh: error: S: there is no folder no/folder\n"

"""The page of results of reproduce.sh, and the chain of steps that reproduce.sh plans."""

import json
import os
import re
import subprocess

import cv2
import numpy as np
import pytest

from moco.cli import UserError
from scripts import paper_report
from tests.scripts.test_scripts import flags_of, known_flags
from tests.support import ROOT


@pytest.fixture
def results(tmp_path):
    """Results of a training, linear decoding on Toybox, a figure and an ImageNet run, as the scripts write them."""

    def write(name, content):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    write("TC-S/args.json", {"model": "resnext50_32x4d", "epochs": 16, "commit": "abc123"})
    line = {"images": 1000, "images_per_second": 10, "loss": 2.5, "acc1": 41.23}
    write("TC-S/log.jsonl", "\n".join(json.dumps({"epoch": i, **line}) for i in range(2)))
    entry = {"std": 0.01, "each": [0.5, 0.5], "chance": 1 / 12, "majority": 0.1}
    models = {
        "TC-S": {"iid": {**entry, "mean": 0.871, "published": 0.885}},
        "a <b> & | c": {"iid": {**entry, "mean": 0.3}},
    }
    write("decoding-toybox/results.json", {"models": models, "seeds": [0, 1]})
    write("imagenet-part/args.json", {"model_path": "out/TC-SAY/resnext50_32x4d_epoch_15.tar"})
    write("imagenet-linear/args.json", {"model_path": "out/imagenet-part/ft_IN_resnext50_32x4d_epoch_15.tar"})
    write("imagenet-linear/log.jsonl", json.dumps({"epoch": 0, "val_acc1": 31.26, "val_acc5": 55.0}))
    write("imagenet-linear/train_list.txt", "".join(f"n{label:04d}/a.jpeg\n" for label in range(1000)))
    (tmp_path / "out" / "top_images").mkdir()
    cv2.imwrite(str(tmp_path / "out" / "top_images" / "best.png"), np.zeros((8, 8, 3), np.uint8))
    return tmp_path / "out"


def test_tables_have_measured_and_published_values(results):
    paper_report.main([str(results)])
    page = (results / "report.md").read_text()
    assert "| TC-S | resnext50_32x4d | 1000 | 2 of 16 | 3.3 | 2.50 | 41.2 |" in page and "commit abc123" in page
    assert "| TC-S | 87.1 ± 1.0 (published 88.5) |" in page and "2 seeds: 0, 1" in page
    network = "TC-SAY/resnext50_32x4d_epoch_15.tar"
    assert f"| frozen network, new head | {network} | 31.3 | 55.0 | 36.0 |" in page
    (results / "imagenet-linear" / "train_list.txt").write_text("cat/a.jpeg\ndog/a.jpeg\n")
    paper_report.main([str(results)])
    assert f"| frozen network, new head | {network} | 31.3 | 55.0 | - |" in (results / "report.md").read_text()
    assert "![best](<top_images/best.png>)" in page


def test_the_html_page_is_a_single_file_and_escapes_names(results):
    paper_report.main([str(results)])
    page = (results / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)='(?!data:)", page)
    assert "a &lt;b&gt; &amp; | c" in page
    assert r"| a <b> & \| c |" in (results / "report.md").read_text()


def test_missing_results_are_listed(results):
    paper_report.main([str(results)])
    parts = (results / "report.md").read_text().split("\n## ")[1:]
    missing = [part.splitlines()[0] for part in parts if "No results" in part]
    assert len(missing) == 8 and missing[0].startswith("Labeled S, random halves")
    assert not any("Toybox" in title or title in ("Trainings", "ImageNet") for title in missing)


def test_a_training_without_a_finished_epoch_has_no_row(results):
    (results / "TC-S" / "log.jsonl").write_text("")
    assert paper_report.trainings(results)[0][1:] == []


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        paper_report.main([str(tmp_path / "nowhere")])


def test_damaged_lines_and_flags_are_skipped_with_a_warning(results, capsys):
    log = results / "TC-S" / "log.jsonl"
    log.write_text(log.read_text() + "\n\0\0\n[3]\n" + '{"epoch": 2, "ima')
    (results / "TC-S" / "args.json").write_text('{"model": "resn')
    paper_report.main([str(results)])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "log.jsonl" in line] == [
        f"warning: line {number} of {log} is damaged and skipped" for number in (3, 4, 5)
    ]
    assert any("args.json is damaged" in line for line in warnings)
    assert "| TC-S | - | 1000 | 2 of ? | 3.3 | 2.50 | 41.2 |" in (results / "report.md").read_text()


def test_an_imagenet_run_without_flags_is_not_compared_with_the_published_value(results):
    (results / "imagenet-part" / "args.json").unlink()
    paper_report.main([str(results)])
    assert "| frozen network, new head | - | 31.3 | 55.0 | - |" in (results / "report.md").read_text()


def test_a_list_with_a_byte_order_mark_is_read(results):
    path = results / "imagenet-linear" / "train_list.txt"
    path.write_text(path.read_text(), encoding="utf-16")
    paper_report.main([str(results)])
    assert "| 55.0 | 36.0 |" in (results / "report.md").read_text()


@pytest.mark.parametrize("flags", ["--epochs 3", "--epochs=3"])
def test_results_follow_the_epochs_that_the_flags_ask_for(tmp_path, flags):
    done = dry_run(S=str(tmp_path), LABELED_S=str(tmp_path), TC_FLAGS=flags, MOCO_FLAGS=flags)
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
    trainings = {"frames-S", "frames-A", "frames-Y", "TC-S", "TC-A", "TC-Y", "TC-SAY"}
    assert trainings | {"moco_img-S", "moco_temp-S", "frames-toybox"} < set(chain)
    assert {f"decoding-{name}" for name in paper_report.DECODINGS} < set(chain)
    assert set(paper_report.IMAGENET) | set(paper_report.FIGURES) | {"film", "class_film", "report"} < set(chain)
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

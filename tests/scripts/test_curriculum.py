"""The stages of curriculum.sh: their order, and that each starts from the network of the stage before."""

import re

from tests.support.shell import run_bash


def plan(tmp_path, **variables):
    """curriculum.sh --dry-run."""
    (tmp_path / "labeled").mkdir(exist_ok=True)
    variables |= {"STAGES": "6-12 12-18 18-33 33-", "MODEL": "tiny", "EPOCHS": 2}
    return run_bash("curriculum.sh", "frames_S:frames_A", "labeled", "--dry-run", cwd=tmp_path, **variables)


def planned(tmp_path, **variables):
    """The steps that curriculum.sh plans, but for the page at the end: [(name, its command)]."""
    done = plan(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    *steps, (report, command) = re.findall(r"^(\w\S*?)(?:, after .*)?: (.*)$", done.stdout, re.MULTILINE)
    assert report == "report" and "curriculum/decoding OUT=curriculum/report.html" in command
    return steps


def test_each_stage_starts_from_the_one_before(tmp_path):
    (first, one), (second, two), *_, (last, decoding) = planned(tmp_path)
    assert (first, second, last) == ("stage_1_6-12", "stage_2_12-18", "decoding")
    assert "DATA=frames_S:frames_A" in one and "--ages=6-12" in one and "--model-path" not in one
    assert "--ages=12-18 --model-path curriculum/stage_1_6-12/tiny_epoch_1.tar" in two
    assert decoding.count("epoch_1.tar") == 4 and "NAMES=random:stage_1_6-12:stage_2_12-18" in decoding


def ages(tmp_path, **variables):
    return [re.search(r"--ages=(\S+)", command)[1] for _, command in planned(tmp_path, **variables)[:-1]]


def test_the_order_of_the_stages(tmp_path):
    forward = ["6-12", "12-18", "18-33", "33-"]
    assert ages(tmp_path) == forward and ages(tmp_path, ORDER="backward") == forward[::-1]
    orders = [ages(tmp_path, ORDER="shuffled", SEED=str(seed)) for seed in (0, 0, 1, 2, 3, 4)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == sorted(forward) for order in orders)
    done = plan(tmp_path, ORDER="sideways")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ORDER=sideways" in done.stderr

"""The stages of curriculum.sh: their order, and that each starts from the network of the stage before."""

import os
import re
import subprocess

import pytest

from tests.support import ROOT


def planned(tmp_path, **variables):
    """The steps that curriculum.sh plans: [(name, its command)]."""
    (tmp_path / "labeled").mkdir(exist_ok=True)
    command = ["bash", str(ROOT / "scripts" / "curriculum.sh"), "frames_S:frames_A", "labeled", "--dry-run"]
    environment = {**os.environ, "STAGES": "6-12 12-18 18-33 33-", "MODEL": "tiny", "EPOCHS": "2", **variables}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^(\w\S*?)(?:, after .*)?: (.*)$", done.stdout, re.MULTILINE)


def test_each_stage_starts_from_the_one_before(tmp_path):
    (first, one), (second, two), *_, (last, decoding) = planned(tmp_path)
    assert (first, second, last) == ("stage_1_6-12", "stage_2_12-18", "decoding")
    assert "DATA=frames_S:frames_A" in one and "--ages=6-12" in one and "--model-path" not in one
    assert "--ages=12-18 --model-path curriculum/stage_1_6-12/tiny_epoch_1.tar" in two
    assert decoding.count("epoch_1.tar") == 4 and "NAMES=random:stage_1_6-12:stage_2_12-18" in decoding


@pytest.mark.parametrize(
    "order, ages", [("forward", ["6-12", "12-18", "18-33", "33-"]), ("backward", ["33-", "18-33", "12-18", "6-12"])]
)
def test_the_order_of_the_stages(tmp_path, order, ages):
    assert [re.search(r"--ages=(\S+)", command)[1] for _, command in planned(tmp_path, ORDER=order)[:-1]] == ages


def test_a_shuffled_order_depends_on_the_seed_alone(tmp_path):
    orders = [[name for name, _ in planned(tmp_path, ORDER="shuffled", SEED=str(seed))] for seed in (0, 0, 1, 2, 3, 4)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1
    assert all(
        sorted(name.split("_")[-1] for name in order[:-1]) == ["12-18", "18-33", "33-", "6-12"] for order in orders
    )


def test_an_unknown_order_is_one_line(tmp_path):
    (tmp_path / "labeled").mkdir()
    command = ["bash", str(ROOT / "scripts" / "curriculum.sh"), "frames", "labeled", "--dry-run"]
    environment = {**os.environ, "ORDER": "sideways"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ORDER=sideways" in done.stderr

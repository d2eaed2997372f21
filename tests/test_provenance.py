"""The record of a run."""

import json
import sys

import pytest

from moco import provenance


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes the record of a script, and returns the seed in each record in the folder."""

    def write(script, seed):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}.py"])
        provenance.write(tmp_path, {"seed": seed}, {"net.tar": "00ff"})
        return {path.name: json.loads(path.read_text())["seed"] for path in tmp_path.iterdir()}

    return write


def test_the_record_of_another_script_is_kept(written):
    assert written("temporal_classification", 1) == {"args.json": 1}
    assert written("selectivities", 2) == {"args.json": 1, "args_selectivities.json": 2}
    assert written("selectivities", 3) == {"args.json": 1, "args_selectivities.json": 3}
    assert written("temporal_classification", 4) == {"args.json": 4, "args_selectivities.json": 3}


@pytest.mark.parametrize("text", ['{"seed": 0}', '{"seed": 0'])
def test_a_record_of_unknown_origin_is_replaced(written, tmp_path, text):
    """One of an older version, or cut off."""
    (tmp_path / "args.json").write_text(text)
    assert written("selectivities", 5) == {"args.json": 5}

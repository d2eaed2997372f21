"""What the scripts that show what one network learned have in common."""

import importlib
import json
import os

import pytest

from moco import files
from moco.cli import UserError
from moco.networks import architectures, checkpoint
from tests.support.inputs import run_small

pytestmark = pytest.mark.usefixtures("empty_figures")

SCRIPTS = {  # flags that small networks and images need, and an output
    "linear_combination_maps": ("--batch-size 2 --class-idx 1", "linear_combination_maps_class_1.pdf"),
    "highly_activating_imgs": ("--top 2 --neuron_idx 276 3", "highly_activating_imgs_neuron_276_3.json"),
    "selectivities": ("--layer 1 2", "selectivity_2.npy"),
    "feature_animation": ("--frames 2 --feature-idx 3", "intphys_feature_animation_3.mp4"),
    "feature_animation_class": ("--frames 2 --class-idx class_0002", "computers_feature_animation_2.mp4"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_published_line_writes_its_output_once_and_records_the_model(script, frames, network, tmp_path, capsys):
    flags, output = SCRIPTS[script]
    module, out = importlib.import_module(script), tmp_path / "new" / "out"
    run_small(module, frames, out, network, *flags.split())
    record, digest = json.loads((out / "args.json").read_text()), files.sha256(network)
    assert record["data"] == str(frames) and record["checkpoints"] == {str(network): digest}
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("model: resnet18 ") and f"{network} (SHA-256 {digest[:12]}" in first_line
    for name in os.listdir(out):
        if name not in (output, "args.json", "features"):
            (out / name).unlink()
    before = (out / output).read_bytes()
    with pytest.raises(UserError, match=f"{output} exists; give --overwrite"):
        run_small(module, frames, out, network, *flags.split())
    assert (out / output).read_bytes() == before
    with pytest.raises(UserError, match="is inside the data folder"):
        run_small(module, frames, frames / "out", network, *flags.split())
    assert not (frames / "out").exists()


@pytest.mark.parametrize("script", ["linear_combination_maps", "feature_animation_class"])
def test_classes_need_a_model_with_a_head(script, frames, network, tmp_path):
    state = architectures.build("resnet18", 8).state_dict()
    encoder = {f"module.encoder_q.{name}": value for name, value in state.items()}
    checkpoint.write(tmp_path / "moco.tar", {"state_dict": encoder, "arch": "resnet18"})
    for model, message in ((tmp_path / "moco.tar", "has no linear head; train one"), (network, "--class-idx 6: the")):
        with pytest.raises(UserError, match=message):
            run_small(importlib.import_module(script), frames, tmp_path / "out", model, "--class-idx", 6)
        assert not list(tmp_path.glob("out/*"))

"""What the scripts that show what one network learned have in common."""

import importlib
import json
import os

import pytest

from moco import files
from moco.cli import UserError

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
    """The folder comes last, as in the published calls."""
    flags, output = SCRIPTS[script]
    main, out = importlib.import_module(script).main, tmp_path / "new" / "out"
    words = f"--model-path {network} --image-size 64 --device cpu --workers 0 {flags}".split()
    main([*words, "--save-dir", str(out), str(frames)])
    record, digest = json.loads((out / "args.json").read_text()), files.sha256(network)
    assert record["data"] == str(frames) and record["checkpoints"] == {str(network): digest}
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("model: resnet18 ") and f"{network} (SHA-256 {digest[:12]}" in first_line
    for name in os.listdir(out):
        if name not in (output, "args.json", "features"):
            (out / name).unlink()
    before = (out / output).read_bytes()
    with pytest.raises(UserError, match=f"{output} exists; give --overwrite"):
        main([*words, "--save-dir", str(out), str(frames)])
    assert (out / output).read_bytes() == before
    with pytest.raises(UserError, match="is inside the data folder"):
        main([*words, "--save-dir", str(frames / "out"), str(frames)])
    assert not (frames / "out").exists()

"""Published networks by name: where their files are, and where to get them."""

import re

import pytest

from moco.cli import UserError
from moco.networks import released


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("TC-SAY", "TC-SAY.tar"),
        ("TC-SAY", "TC-SAY-resnext.tar"),
        ("TC-S-mobilenet", "TC-S-mobilenet.pth"),
        ("moco_img_0011", "moco_img_0011.pth.tar"),
        ("dino_say_vitb14", "dino_say_vitb14.safetensors"),
        ("mae_s_vits16", "mae_s_vits16.pth"),
        ("dino_sfp_resnext50", "dino_sfp_resnext50.pth"),
    ],
)
def test_a_file_is_located_by_name(tmp_path, monkeypatch, name, file):
    (tmp_path / file).touch()
    assert released.locate(name, tmp_path) == tmp_path / file
    monkeypatch.chdir(tmp_path)
    assert released.locate(name).resolve() == tmp_path / file


def test_moco_is_read_from_the_published_folder(tmp_path, monkeypatch):
    (tmp_path / "self_supervised_models").mkdir()
    (tmp_path / "self_supervised_models" / "moco_temp_0011.pth.tar").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert str(released.locate("moco_temp_0011")) == "../self_supervised_models/moco_temp_0011.pth.tar"


@pytest.mark.parametrize("name", [name for name in released.NAMES if name not in ("random", "imagenet")])
def test_a_missing_file_says_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError) as error:
        released.locate(name, tmp_path)
    link, download = r"https://drive.google.com/file/d/[\w-]{33}/view", f"hf download eminorhan/{name} {name}.pth"
    patterns = {
        "TC": link,
        **dict.fromkeys(("dinov2", "dinov3", "clip"), rf"hf download (facebook|openai)/\S+ --local-dir .*/{name}"),
    }
    message = str(error.value)
    assert re.search(rf"there is no {tmp_path}/{name}(\.tar|;)", message) and "\n" not in message
    assert re.search(patterns.get(re.split("[-_]", name)[0], re.escape(download)), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TC-SYA", r"TC-SYA is not published; did you mean TC-SAY.*\? Give other checkpoints with --model-path"),
        ("dino_say_vitb15", "did you mean .*dino_say_vitb14"),
        ("TC-S.tar", "did you mean TC-S"),
    ],
)
def test_an_unknown_name_gives_similar_ones(text, message):
    with pytest.raises(UserError, match=message):
        released.name(text)


def test_the_names_of_the_published_script_are_known(tmp_path):
    for name in ("random", "imagenet", "TC-S", "TC-A", "TC-Y", "TC-SAY", "moco_img_0011", "moco_temp_0005"):
        assert released.name(name) == name
    assert released.locate("random") == "random" and released.locate("imagenet") == "imagenet"
    with pytest.raises(UserError, match="it was not released: train it with moco_temp.py"):
        released.locate("moco_temp_0005", tmp_path)

"""Published networks by name: where their files are, and where to get them."""

import re

import pytest

from moco.cli import UserError
from moco.networks import architectures, released


@pytest.mark.parametrize(
    ("name", "file", "arch"),
    [
        ("TC-SAY", "TC-SAY.tar", "resnext50_32x4d"),
        ("TC-SAY", "TC-SAY-resnext.tar", "resnext50_32x4d"),
        ("TC-S-mobilenet", "TC-S-mobilenet.pth", "mobilenet_v2"),
        ("moco_img_0011", "moco_img_0011.pth.tar", "mobilenet_v2"),
        ("dino_say_vitb14", "dino_say_vitb14.safetensors", "vit_b_14"),
        ("mae_s_vits16", "mae_s_vits16.pth", "vit_s_16"),
        ("dino_sfp_resnext50", "dino_sfp_resnext50.pth", "resnext50_32x4d"),
    ],
)
def test_a_file_is_located_by_name_and_architecture(tmp_path, monkeypatch, name, file, arch):
    (tmp_path / file).touch()
    assert released.locate(name, tmp_path) == (tmp_path / file, arch)
    monkeypatch.chdir(tmp_path)
    assert released.locate(name)[0].resolve() == tmp_path / file


def test_moco_is_read_from_the_published_folder(tmp_path, monkeypatch):
    (tmp_path / "self_supervised_models").mkdir()
    (tmp_path / "self_supervised_models" / "moco_temp_0011.pth.tar").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert str(released.locate("moco_temp_0011")[0]) == "../self_supervised_models/moco_temp_0011.pth.tar"


@pytest.mark.parametrize("name", [name for name in released.NAMES if name not in ("random", "imagenet")])
def test_a_missing_file_says_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError) as error:
        released.locate(name, tmp_path)
    link, download = r"https://drive.google.com/file/d/[\w-]{33}/view", f"hf download eminorhan/{name} {name}.pth"
    patterns = {"TC": link, "moco": "train it with moco_"}
    message = str(error.value)
    assert str(tmp_path / f"{name}.tar") in message and "\n" not in message
    assert re.search(patterns.get(re.split("[-_]", name)[0], re.escape(download)), message)


def test_every_architecture_exists():
    archs = {released._arch(name) for name in released.NAMES if name not in ("random", "imagenet")}
    assert all(map(architectures.is_arch, archs)) and len(archs) == 6
    assert released.locate("random") == ("random", None) and released.locate("imagenet") == ("imagenet", None)

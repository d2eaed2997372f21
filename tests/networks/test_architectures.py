"""Architectures by name, heads, frozen and adapted trunks."""

import re
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from moco import files
from moco.cli import UserError
from moco.networks import architectures, opening

HEADS = {"resnet18": "fc", "vgg11": "classifier.6"} | dict.fromkeys(
    ("mobilenet_v2", "efficientnet_b0", "mnasnet1_0"), "classifier"
)


@pytest.mark.parametrize(("arch", "head"), HEADS.items())
def test_head_is_one_linear_layer(arch, head):
    with torch.device("meta"):
        model = architectures.build(arch, 7)
    assert architectures.head_name(model) == head
    assert architectures.head(model).out_features == 7


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3", "vgg11", "alexnet", "mobilenet_v3_small", "vit_b_32"])
def test_no_architecture_has_dropout(arch):
    with torch.device("meta"):
        model = architectures.build(arch, 3)
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropout and not any(dropout)


def test_unknown_architecture_and_one_without_linear_head():
    with pytest.raises(UserError, match=r"unknown architecture resnet49; did you mean resnet34, resnet50, .*\?"):
        architectures.arch_name("resnet49")
    with pytest.raises(UserError, match="squeezenet1_0 has no linear head"):
        architectures.build("squeezenet1_0", 2)


def test_frozen_module_neither_learns_nor_drifts():
    model = architectures.freeze(architectures.build("resnet18", 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["convnext_tiny", "swin_t", "mobilenet_v3_small", "vit_128x2x2_16", "googlenet"])
def test_a_frozen_trunk_is_in_evaluation_mode_entirely(arch):
    """Also with stochastic depth and dropout: two passes in training mode give the same features."""
    torch.manual_seed(0)
    model = architectures.freeze(architectures.build(arch, 2))
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.5
    architectures.head(model).requires_grad_(True)
    architectures.train_mode_keep_frozen_bn(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), model(images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert architectures.head(model).training


def test_what_learns_is_in_training_mode_with_its_dropout():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()), nn.Dropout(), nn.Linear(4, 2)
    )
    model.eval()
    assert all(module.training for module in architectures.train_mode_keep_frozen_bn(model).modules())
    architectures.freeze(model[0])
    architectures.train_mode_keep_frozen_bn(model)
    training = [name for name, module in model.named_modules() if module.training]
    assert training == ["", "2"]
    model[0][0].requires_grad_(True)  # batch norm alone is frozen
    architectures.train_mode_keep_frozen_bn(model)
    assert [name for name, module in model.named_modules() if module.training] == ["", "0", "0.0", "2"]


@pytest.mark.parametrize(
    ("arch", "good", "bad", "reason"),
    [
        ("vit_b_32", 64, 100, "100x100 is not a multiple of the patch size 32"),
        ("alexnet", 64, 32, ""),
        ("inception_v3", 96, 64, ""),
        ("maxvit_t", 224, 96, ""),
        ("vit_128x2x2_14", 28, 32, "32x32 is not a multiple of the patch size 14"),
    ],
)
def test_image_sizes_that_an_architecture_cannot_take_are_refused(arch, good, bad, reason):
    model = architectures.build(arch, 2).train()
    architectures.check_image_size(model, good)
    with pytest.raises(UserError, match=f"--image-size {bad} does not fit {type(model).__name__} .*{reason}"):
        architectures.check_image_size(model, bad)
    assert model.training


# --- torchvision's weights


@pytest.fixture
def cached_weights(tmp_path, monkeypatch):
    """A function that saves content as an architecture's weights in torch's download cache, and returns the path."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def put(arch, content):
        path = tmp_path / "checkpoints" / Path(torchvision_models.get_model_weights(arch).IMAGENET1K_V1.url).name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    return put


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3", "mobilenet_v3_small", "vit_b_32"])
def test_torchvision_weights_open(cached_weights, arch):
    """GoogLeNet's and Inception's hold auxiliary heads, which are left out, and expect other pixels."""
    torch.manual_seed(0)
    options = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    theirs = torchvision_models.get_model(arch, **options)
    cached_weights(arch, theirs.state_dict())
    model = opening.open_model("imagenet", arch).network
    size = 299 if arch == "inception_v3" else 224
    with torch.no_grad():
        theirs.transform_input = True  # as torchvision sets it for weights
        x = torch.randn(1, 3, size, size)
        assert torch.equal(model.eval()(x), theirs.eval()(x))
        assert not isinstance(model.train()(torch.randn(2, 3, size, size)), tuple)


def test_imagenet_is_the_first_version_of_the_weights(cached_weights):
    """IMAGENET1K_V1, as torchvision's pretrained=True gave them for the paper."""
    theirs = torchvision_models.mobilenet_v2()
    path = cached_weights("mobilenet_v2", theirs.state_dict())
    assert path.name == "mobilenet_v2-b0353104.pth"
    opened = opening.open_model("imagenet", image_size=64)
    assert torch.equal(opened.network.classifier.weight, theirs.classifier[1].weight)
    assert opened.checkpoints == {str(path): files.sha256(path)}
    assert opened.description.startswith(f"mobilenet_v2 with torchvision's IMAGENET1K_V1 from {path} (SHA-256 ")
    with pytest.raises(UserError, match="efficientnet_v2_l has another mean and std of pixels"):
        opening.open_model("imagenet", "efficientnet_v2_l")


DAMAGED = {
    "empty": b"",
    "HTML": b"<html>404</html>",
    "cut": b"PK\x03\x04" + bytes(50),
    "another network": {"a": torch.zeros(1)},
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("arch", ["mobilenet_v2", "googlenet"])
def test_a_damaged_file_in_the_download_cache_is_named(cached_weights, arch, case):
    path = cached_weights(arch, DAMAGED[case])
    with pytest.raises(UserError, match=re.escape(f"the cached weights {path} are damaged (")):
        opening.open_model("imagenet", arch)


def test_imagenet_weights_that_do_not_exist_or_cannot_be_downloaded(cached_weights, monkeypatch):
    with pytest.raises(UserError, match="torchvision has no ImageNet weights for vit_s_16"):
        opening.open_model("imagenet", "vit_s_16")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=urllib.error.URLError("no network")))
    with pytest.raises(UserError, match="cannot download the weights of resnet18 .*no network"):
        opening.open_model("imagenet", "resnet18")


# --- batch norm


def test_adapted_batch_norm_has_the_statistics_of_all_images():
    """With batches of unequal size: the mean over images, not over batches; without dropout; the momentum as it was."""
    model = nn.Sequential(nn.Dropout(0.5), norm := nn.BatchNorm2d(2))
    images = torch.randn(10, 2, 3, 3) * 4 + 1
    architectures.adapt_batch_norm(model, [images[:7], images[7:]])
    parts = [(7, images[:7]), (3, images[7:])]
    mean = sum(n * part.mean((0, 2, 3)) for n, part in parts) / 10
    variance = sum(n * part.var((0, 2, 3), unbiased=True) for n, part in parts) / 10
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, variance, atol=1e-4)
    assert norm.momentum == 0.1 and not norm.training

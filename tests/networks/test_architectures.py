"""Architectures by name, heads, frozen and adapted trunks, inner layers."""

import re
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from moco.cli import UserError
from moco.networks import architectures


@pytest.mark.parametrize(
    ("arch", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier"), ("vgg11", "classifier.6")]
)
def test_head_is_one_linear_layer(arch, head):
    with torch.device("meta"):
        model = architectures.build(arch, 7)
    assert architectures.head_name(model) == head
    assert architectures.head(model).out_features == 7


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_b0", "mnasnet1_0"])
def test_the_head_is_a_single_module(arch):
    with torch.device("meta"):
        assert isinstance(architectures.build(arch, 3).classifier, nn.Linear)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3", "vgg11", "alexnet", "mobilenet_v3_small", "vit_b_32"])
def test_no_architecture_has_dropout(arch):
    with torch.device("meta"):
        model = architectures.build(arch, 3)
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropout and not any(dropout)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "efficientnet_b0", "regnet_x_400mf", "densenet121"])
def test_head_sees_the_mean_of_the_spatial_maps(arch):
    torch.manual_seed(0)
    model = architectures.build(arch, 3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = architectures.spatial_trunk(model)(images)
        logits = model(images)
        assert maps.shape[2:] == (2, 2)
        assert torch.allclose(architectures.head(model)(maps.mean((2, 3))), logits, atol=1e-5)
        assert torch.allclose(architectures.remove_head(model)(images), maps.mean((2, 3)), atol=1e-5)


def test_maps_without_a_linear_head_over_them_are_refused():
    for arch, message in (("vgg11", "VGG has no last spatial maps"), ("vit_b_32", "sees one token; .*--attention")):
        with torch.device("meta"), pytest.raises(UserError, match=message):
            architectures.spatial_trunk(architectures.build(arch, 2))


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
    ("arch", "good", "bad"),
    [
        ("vit_b_32", 64, 100),
        ("alexnet", 64, 32),
        ("inception_v3", 96, 64),
        ("maxvit_t", 224, 96),
        ("vit_128x2x2_14", 28, 32),
    ],
)
def test_image_sizes_that_an_architecture_cannot_take_are_refused(arch, good, bad):
    model = architectures.build(arch, 2).train()
    architectures.check_image_size(model, good)
    with pytest.raises(UserError, match=f"--image-size {bad} does not fit {type(model).__name__} .+"):
        architectures.check_image_size(model, bad)
    assert model.training


# --- torchvision's weights


@pytest.fixture
def cached_weights(tmp_path, monkeypatch):
    """torch's download cache in a folder of the test; returns a function that puts a file into it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def put(arch, write):
        path = tmp_path / "checkpoints" / Path(torchvision_models.get_model_weights(arch).DEFAULT.url).name
        write(path)
        return path

    return put


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3", "mobilenet_v3_small", "vit_b_32"])
def test_torchvision_weights_open(cached_weights, arch):
    """GoogLeNet's and Inception's hold auxiliary heads, which are left out."""
    torch.manual_seed(0)
    options = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    theirs = torchvision_models.get_model(arch, **options)
    cached_weights(arch, lambda path: torch.save(theirs.state_dict(), path))
    model = architectures.build(arch, weights="DEFAULT")
    size = 96 if arch == "inception_v3" else 224
    with torch.no_grad():
        expected = theirs.eval()(models_input(theirs, x := torch.randn(1, 3, size, size)))
        assert torch.equal(model.eval()(x), expected)
        assert not isinstance(model.train()(torch.randn(2, 3, size, size)), tuple)


def models_input(model, x):
    """x as torchvision's transform_input would give it to a network made without weights."""
    if not hasattr(model, "transform_input"):
        return x
    model.transform_input = True
    return x


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"PK\x03\x04" + bytes(50)], ids=["empty", "HTML", "cut"])
@pytest.mark.parametrize("arch", ["mobilenet_v2", "googlenet"])
def test_a_damaged_file_in_the_download_cache_is_named(cached_weights, arch, data):
    path = cached_weights(arch, lambda path: path.write_bytes(data))
    with pytest.raises(UserError, match=re.escape(f"the cached weights {path} are damaged (")):
        architectures.build(arch, weights="DEFAULT")


def test_weights_of_another_network_in_the_download_cache_are_named(cached_weights):
    path = cached_weights("mobilenet_v2", lambda path: torch.save({"a": torch.zeros(1)}, path))
    with pytest.raises(UserError, match=re.escape(f"the cached weights {path} are damaged (")):
        architectures.build("mobilenet_v2", weights="DEFAULT")


def test_imagenet_weights_that_do_not_exist_or_cannot_be_downloaded(cached_weights, monkeypatch):
    with pytest.raises(UserError, match="torchvision has no ImageNet weights for vit_s_16"):
        architectures.build("vit_s_16", weights="DEFAULT")

    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match="cannot download the weights of resnet18 .*no network"):
        architectures.build("resnet18", weights="DEFAULT")


# --- batch norm


def test_adapted_batch_norm_has_the_statistics_of_all_images():
    """With batches of unequal size: the mean over images, not over batches, and the momentum as it was."""
    norm = nn.BatchNorm2d(2)
    images = torch.randn(10, 2, 3, 3) * 4 + 1
    architectures.adapt_batch_norm(norm, [images[:7], images[7:]])
    parts = [(7, images[:7]), (3, images[7:])]
    mean = sum(n * part.mean((0, 2, 3)) for n, part in parts) / 10
    variance = sum(n * part.var((0, 2, 3), unbiased=True) for n, part in parts) / 10
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, variance, atol=1e-4)
    assert norm.momentum == 0.1 and not norm.training


def test_adaptation_uses_neither_dropout_nor_single_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
    images = torch.randn(9, 3, 1, 1) + 5
    architectures.adapt_batch_norm(model, [images[:8], images[8:]])
    torch.testing.assert_close(model[1].running_mean, images[:8].mean((0, 2, 3)))


# --- inner layers


def hooked(model, name, x):
    """The output of the last call of a module."""
    outputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    model(x)
    handle.remove()
    return outputs[-1]


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("resnet18", {"layer3.1.bn1": (2, 3), "layer3.1.bn2": (2, 3), "layer4": (2, 3), "avgpool": (2, 3)}),
        ("mobilenet_v2", {"features.3.conv.1": (2, 3)}),
        ("convnext_tiny", {"features.1": (2, 3), "features.1.2.block.2": (1, 2)}),
        ("swin_t", {"features.3.1": (1, 2), "norm": (1, 2), "permute": None}),
        ("efficientnet_b0", {"features.6": (2, 3)}),
        ("densenet121", {"features.denseblock2": (2, 3)}),
        ("regnet_x_400mf", {"trunk_output.block3": (2, 3)}),
    ],
)
@torch.no_grad()
def test_layers_by_name_are_means_over_space(arch, layers):
    """Also if an in-place rectifier or sum follows."""
    torch.manual_seed(0)
    model, x = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    for name, means in zip(layers, architectures.LayerMeans(model, layers)(x), strict=True):
        if layers[name]:
            torch.testing.assert_close(means, hooked(model, name, x).mean(layers[name]))
        assert means.ndim == 2


@torch.no_grad()
def test_blocks_of_a_transformer_are_means_over_patch_tokens():
    model, x = architectures.build("vit_128x3x2_16", 3).eval(), torch.randn(2, 3, 64, 64)
    expected = [hooked(model, f"encoder.layers.encoder_layer_{i}", x)[:, 1:].mean(1) for i in range(3)]
    layers = [3, 1, "encoder.layers.encoder_layer_1", "conv_proj"]
    third, first, second, patches = architectures.LayerMeans(model, layers)(x)
    torch.testing.assert_close(torch.stack([third, second, first]), torch.stack(expected))
    torch.testing.assert_close(patches, model.conv_proj(x).mean((2, 3)))
    with pytest.raises(UserError, match="no layer 4: VisionTransformer has layers 1 to 3"):
        architectures.LayerMeans(model, [4])


@pytest.mark.parametrize("arch", ["swin_t", "convnext_tiny", "vgg11"])
@torch.no_grad()
def test_layer_1_of_any_network_is_what_its_head_sees(arch):
    torch.manual_seed(0)
    model, x = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    (means,) = architectures.LayerMeans(model, [1])(x)
    torch.testing.assert_close(architectures.head(model)(means), model(x))
    with pytest.raises(UserError, match="there is no layer 2: .* has only layer 1 by number; others go by their names"):
        architectures.LayerMeans(model, [1, 2])


@torch.no_grad()
def test_numbers_and_names_mix_and_keep_their_order():
    model, x = architectures.build("resnet18", 3).eval(), torch.randn(2, 3, 64, 64)
    last, rectified, second = architectures.LayerMeans(model, [1, "layer4.1.relu", 2])(x)
    assert torch.equal(rectified, second)  # the first rectifier of the last block
    torch.testing.assert_close(model.fc(last), model(x))


@pytest.mark.parametrize(
    ("arch", "layer", "message"),
    [
        ("resnet18", "layer5.0.relu", r"ResNet has no layer layer5.0.relu; did you mean layer\d.0.relu, .*\?"),
        ("vit_128x2x2_16", "getitem_1", "layer getitem_1 gives no features of an image"),
    ],
)
def test_layers_that_do_not_exist_or_are_no_features(arch, layer, message):
    with pytest.raises(UserError, match=message):
        architectures.LayerMeans(architectures.build(arch, 3), [layer])(torch.randn(2, 3, 64, 64))

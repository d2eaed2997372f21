"""Architectures by name, heads, cuts, frozen and adapted trunks."""

import pytest
import torch
from torch import nn

from moco import models
from moco.cli import UserError


@pytest.mark.parametrize(
    ("arch", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier"), ("vgg11", "classifier.6")]
)
def test_head_is_one_linear_layer(arch, head):
    with torch.device("meta"):
        model = models.build(arch, 7)
    assert models.head_name(model) == head
    assert models.head(model).out_features == 7


def test_mobilenet_head_has_no_dropout():
    assert isinstance(models.build("mobilenet_v2", 3).classifier, nn.Linear)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_head_sees_the_mean_of_the_spatial_maps(arch):
    torch.manual_seed(0)
    model = models.build(arch, 3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = models.spatial_trunk(model)(images)
        logits = model(images)
        assert maps.shape[2:] == (2, 2)
        assert torch.allclose(models.head(model)(maps.mean((2, 3))), logits, atol=1e-5)
        assert torch.allclose(models.remove_head(model)(images), maps.mean((2, 3)), atol=1e-5)


def test_maps_without_a_linear_head_over_them_are_refused():
    with torch.device("meta"), pytest.raises(UserError, match="VGG has no last spatial maps"):
        models.spatial_trunk(models.build("vgg11", 2))


def test_unknown_architecture_and_one_without_linear_head():
    with pytest.raises(UserError, match="is called resnet49; there are resnet34, resnet50"):
        models.arch_name("resnet49")
    with torch.device("meta"), pytest.raises(UserError, match="no linear head"):
        models.build("squeezenet1_0", 2)


def test_frozen_module_neither_learns_nor_drifts():
    model = models.freeze(models.build("resnet18", 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapted_batch_norm_has_the_statistics_of_all_images():
    """With batches of unequal size: the mean over images, not over batches, and the momentum as it was."""
    norm = nn.BatchNorm2d(2)
    images = torch.randn(10, 2, 3, 3) * 4 + 1
    models.adapt_batch_norm(norm, [images[:7], images[7:]])
    parts = [(7, images[:7]), (3, images[7:])]
    mean = sum(n * part.mean((0, 2, 3)) for n, part in parts) / 10
    variance = sum(n * part.var((0, 2, 3), unbiased=True) for n, part in parts) / 10
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, variance, atol=1e-4)
    assert norm.momentum == 0.1 and not norm.training

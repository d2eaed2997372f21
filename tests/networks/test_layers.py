"""Inner layers: those of a plain hook, by number and by name; spatial trunks."""

import pytest
import torch
from torch import nn

from moco.cli import UserError
from moco.networks import architectures, layers


def hooked(model, name, x):
    """The output of the last call of a module."""
    outputs = []
    with model.get_submodule(name).register_forward_hook(lambda *call: outputs.append(call[-1].clone())):
        model(x)
    return outputs[-1]


def means(model, chosen, x):
    return layers.layer_means(model, [layers.layer_name(model, layer) for layer in chosen], x)


@pytest.mark.parametrize(
    ("arch", "numbered"),
    [
        ("mobilenet_v2", {1: "features.18", 2: "features.17.conv.0", 18: "features.1.conv.0", 19: "features.0"}),
        ("resnet18", {1: "penultimate", 2: "layer4.1.relu", 6: "layer2.1.relu", 10: "relu"}),
        ("resnext50_32x4d", {1: "penultimate", 2: "layer4.2.relu", 17: "layer1.0.relu", 18: "relu"}),
        ("vit_128x3x2_16", {1: "encoder.layers.encoder_layer_2", 3: "encoder.layers.encoder_layer_0"}),
        ("swin_t", {1: "penultimate"}),
    ],
)
def test_the_module_of_a_layer_by_number(arch, numbered):
    with torch.device("meta"):
        model = architectures.build(arch, 3)
    assert {number: layers.layer_name(model, number) for number in numbered} == numbered
    for number in (0, max(numbered) + 1):
        with pytest.raises(UserError, match=f"there is no layer {number}: .* has (only )?layers? 1"):
            layers.layer_name(model, number)


@pytest.mark.parametrize(
    ("arch", "chosen"),
    [
        ("resnet18", {"layer3.1.bn1": (2, 3), "layer3.1.bn2": (2, 3), "layer4": (2, 3), "avgpool": (2, 3)}),
        ("mobilenet_v2", {"features.3.conv.1": (2, 3), "features.3.conv.0.1": (2, 3)}),
        ("convnext_tiny", {"features.1": (2, 3), "features.1.2.block.2": (1, 2)}),
        ("swin_t", {"features.3.1": (1, 2), "norm": (1, 2), "permute": (2, 3)}),
        ("efficientnet_b0", {"features.6": (2, 3)}),
        ("densenet121", {"features.denseblock2": (2, 3)}),
        ("regnet_x_400mf", {"trunk_output.block3": (2, 3)}),
    ],
)
@torch.no_grad()
def test_layers_by_name_are_means_over_space(arch, chosen):
    """Also if an in-place rectifier or sum follows."""
    torch.manual_seed(0)
    model, x = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    for name, found in zip(chosen, means(model, chosen, x), strict=True):
        torch.testing.assert_close(found, hooked(model, name, x).mean(chosen[name]))


@pytest.mark.parametrize(
    ("arch", "norms"),
    [
        ("mobilenet_v2", {2: "features.17.conv.0.1", 19: "features.0.1"}),
        ("resnet18", {2: "layer4.1.bn1", 10: "bn1"}),
        ("resnext50_32x4d", {2: "layer4.2.bn1", 18: "bn1"}),
    ],
)
@torch.no_grad()
def test_numbered_layers_end_in_the_rectifier_of_their_first_unit(arch, norms):
    """Which other units of a ResNet's block call, too."""
    torch.manual_seed(0)
    model, x = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    end, *inner = means(model, [1, *norms], x)
    rectify = nn.ReLU6() if arch == "mobilenet_v2" else nn.ReLU()
    for found, name in zip(inner, norms.values(), strict=True):
        torch.testing.assert_close(found, rectify(hooked(model, name, x)).mean((2, 3)))
    torch.testing.assert_close(architectures.head(model)(end), model(x))


@pytest.mark.parametrize("kind", ["", "_reg4", "_reg3_rope"])
@torch.no_grad()
def test_blocks_of_a_transformer_are_means_over_patch_tokens(kind):
    """Without the class token and registers: over the last 16 of the tokens."""
    model, x = architectures.build(f"vit_128x3x2_16{kind}", 3).eval(), torch.randn(2, 3, 64, 64)
    tokens = [hooked(model, f"encoder.layers.encoder_layer_{i}", x) for i in range(3)]
    assert tokens[0].shape[1] == 1 + {"": 0, "_reg4": 4, "_reg3_rope": 3}[kind] + 16
    expected = [of_block[:, -16:].mean(1) for of_block in tokens]
    chosen = [3, 1, "encoder.layers.encoder_layer_1", "conv_proj", "penultimate"]
    third, first, second, patches, token = means(model, chosen, x)
    torch.testing.assert_close(torch.stack([third, second, first]), torch.stack(expected))
    torch.testing.assert_close(patches, model.conv_proj(x).mean((2, 3)))
    torch.testing.assert_close(architectures.head(model)(token), model(x))


@pytest.mark.parametrize("arch", ["swin_t", "convnext_tiny"])
@torch.no_grad()
def test_layer_1_of_any_network_is_what_its_head_sees(arch):
    torch.manual_seed(0)
    model, x = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    (found,) = means(model, [1], x)
    torch.testing.assert_close(architectures.head(model)(found), model(x))
    (found,) = means(architectures.remove_head(model), [layers.OUTPUT], x)
    torch.testing.assert_close(found, model(x))


def test_nothing_after_the_last_layer_is_computed_and_no_hook_stays():
    model = architectures.build("resnet18", 3).eval()
    for block in (model.layer1[0].bn2, model.layer1[1], model.layer4[1]):
        block.forward = None
    (found,) = means(model, [9], torch.randn(1, 3, 64, 64))
    assert found.shape == (1, 64)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "layer", "message"),
    [
        ("resnet18", "layer5.0.relu", r"ResNet has no layer layer5.0.relu; did you mean layer\d.0.relu, .*\?"),
        ("vit_128x2x2_16", "encoder.layers.encoder_layer_0.self_attention", "gives no features of an image"),
        ("vit_128x2x2_16", "encoder.layers.encoder_layer_0.self_attention.out_proj", "gives no features of an image"),
    ],
)
def test_layers_that_do_not_exist_or_are_no_features(arch, layer, message):
    with pytest.raises(UserError, match=message):
        means(architectures.build(arch, 3), [layer], torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "efficientnet_b0", "regnet_x_400mf", "densenet121"])
@torch.no_grad()
def test_head_sees_the_mean_of_the_spatial_maps(arch):
    torch.manual_seed(0)
    model, images = architectures.build(arch, 3).eval(), torch.randn(2, 3, 64, 64)
    maps = layers.spatial_trunk(model)(images)
    assert maps.shape[2:] == (2, 2)
    torch.testing.assert_close(architectures.head(model)(maps.mean((2, 3))), model(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(architectures.remove_head(model)(images), maps.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_maps_without_a_linear_head_over_them_are_refused():
    for arch, message in (("vgg11", "VGG has no last spatial maps"), ("vit_b_32", "sees one token; .*--attention")):
        with torch.device("meta"), pytest.raises(UserError, match=message):
            layers.spatial_trunk(architectures.build(arch, 2))

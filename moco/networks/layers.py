"""Inner layers of a network: by number or name, as means over space, and its last spatial maps."""

from contextlib import ExitStack, suppress
from difflib import get_close_matches

import torch
import torchvision
from torch import nn

from moco.cli import UserError
from moco.networks import architectures

OUTPUT = ""  # layer: what the network returns
PENULTIMATE = "penultimate"  # layer: the input of the head; of a vision transformer, the class token


def layer(text):
    """The number or the name of a layer, as layer_name takes it (an argparse type)."""
    return int(text) if text.isdecimal() else text


def title(layer):
    """The number or name of a layer, in words."""
    if layer == PENULTIMATE:
        return "penultimate layer"
    return f"layer {layer} from the end" if str(layer).isdecimal() else f"layer {layer}"


def layer_name(network, layer):
    """The name of a layer given by number or by name: that of a module of network, or PENULTIMATE.

    Numbers count from the end, as in the paper's Figure 7a. Layer 1 of a convolutional network is what its head sees.
    Layer L > 1 is the first unit (convolution, batch norm, rectifier) of the L-th block from the end, where the last
    convolution of MobileNetV2 and the end of a ResNet count as the first. So layers 2, 6, 10, 14 and 18 of MobileNetV2
    are the expansion layers of its inverted residuals, and layer 18 of a ResNet-50 is its first layer. Layer L of a
    vision transformer is its L-th block from the end. Other networks have layer 1 only.

    UserError for a layer that does not exist.
    """
    if isinstance(layer, int):
        names = _names_from_the_end(network)
        if not 1 <= layer <= len(names):
            numbers = f"layers 1 to {len(names)}" if len(names) > 1 else "only layer 1 by number"
            raise UserError(
                f"there is no layer {layer}: {type(network).__name__} has {numbers}; others go by their names"
            )
        return names[layer - 1]
    names = [PENULTIMATE, *(name for name, _ in network.named_modules())]
    if layer not in names:
        similar = ", ".join(get_close_matches(layer, names, 3, 0.3))
        raise UserError(f"{type(network).__name__} has no layer {layer}; did you mean {similar}?")
    return layer


def _names_from_the_end(network):
    """The names of the numbered layers of network, from layer 1 on."""
    if isinstance(network, torchvision.models.MobileNetV2):
        names = [f"features.{i}{'.conv.0' * hasattr(block, 'conv')}" for i, block in enumerate(network.features)]
        return names[::-1]
    if isinstance(network, torchvision.models.ResNet):  # the first of a block's calls of relu follows its first unit
        stages = ("layer1", "layer2", "layer3", "layer4")
        names = ["relu", *(f"{stage}.{i}.relu" for stage in stages for i in range(len(getattr(network, stage))))]
        return [*names, PENULTIMATE][::-1]
    if isinstance(network, torchvision.models.VisionTransformer):
        return [f"encoder.layers.{name}" for name, _ in network.encoder.layers.named_children()][::-1]
    return [PENULTIMATE]


class _AllComputed(Exception):
    """Ends a forward pass after the last layer asked for."""


def layer_means(network, names, images):
    """Means over space or patch tokens of some layers of a network: [(N, C), ...] of images (N, 3, H, W).

    network: in evaluation mode. names: as layer_name returns them. A module that is called several times counts with
    its first call. No layer after the last of names is computed. UserError for a module that returns no features of an
    image.
    """
    means = {}

    def keep(name, output):
        """Take the mean of an output at once: an in-place rectifier may follow."""
        if name not in means:
            if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(output) != len(images):
                raise UserError(f"layer {name} gives no features of an image; choose another")
            means[name] = _mean(output, getattr(network, "prefix_tokens", 0))
            if len(means) == len(set(names)):
                raise _AllComputed

    with ExitStack() as hooks, suppress(_AllComputed):
        for name in set(names) - {PENULTIMATE}:
            module = network.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(lambda *call, name=name: keep(name, call[-1])))
        if PENULTIMATE in names:
            head = architectures.head(network)
            hooks.enter_context(head.register_forward_pre_hook(lambda _, inputs: keep(PENULTIMATE, *inputs)))
        network(images)
        raise UserError(f"layer {(set(names) - set(means)).pop()} gives no features of an image; choose another")
    return [means[name] for name in names]


def _mean(output, prefix_tokens):
    """The mean (N, C) of square maps (N, C, H, W) or (N, H, W, C), or of tokens (N, T, C) without the first ones."""
    if output.ndim == 4:
        is_channels_last = output.shape[1] == output.shape[2] != output.shape[3]  # in parts of Swin and ConvNeXt
        return output.mean((1, 2) if is_channels_last else (2, 3))
    if output.ndim == 3:
        return output[:, prefix_tokens:].mean(1)
    return output


def spatial_trunk(model):
    """The part of model that ends in the last spatial maps: images (N, 3, H, W) to maps (N, C, H/32, W/32).

    The head's input is the mean of these maps over space, which class activation maps rely on. UserError for an
    architecture whose head has another input.
    """
    if isinstance(model, torchvision.models.ResNet):
        return nn.Sequential(*[*model.children()][:-2])  # without avgpool and fc
    if isinstance(model, (torchvision.models.MobileNetV2, torchvision.models.EfficientNet)):
        return model.features
    if isinstance(model, torchvision.models.RegNet):
        return nn.Sequential(model.stem, model.trunk_output)
    if isinstance(model, torchvision.models.DenseNet):
        return nn.Sequential(model.features, nn.ReLU())
    advice = "; choose a ResNet, ResNeXt, RegNet, DenseNet, MobileNetV2 or EfficientNet"
    if isinstance(model, torchvision.models.VisionTransformer):
        advice = ", the head sees one token; linear_combination_maps.py --attention shows what this token attends to"
    raise UserError(f"{type(model).__name__} has no last spatial maps that its head averages{advice}")

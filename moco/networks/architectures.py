"""Architectures by name: a trunk with one linear head, without its head, frozen, or cut at an inner layer."""

import copy
from difflib import get_close_matches
from math import isqrt
from pathlib import Path

import torch
from torch import fx, nn

from moco import cli
from moco.cli import UserError

torchvision = cli.lazy_import("torchvision")
vit = cli.lazy_import("moco.networks.vit")  # extends a class of torchvision

PUBLISHED = ("resnet50", "resnext101_32x8d", "resnext50_32x4d", "mobilenet_v2")
FAMILY = (*PUBLISHED, "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
PENULTIMATE = "penultimate"  # layer: the input of the head
NO_LINEAR_HEAD = ("squeezenet1_0", "squeezenet1_1")


def names():
    """The names of torchvision's classification architectures with a linear head; vit.parse knows further ones."""
    return [name for name in torchvision.models.list_models(module=torchvision.models) if name not in NO_LINEAR_HEAD]


def is_arch(name):
    """Whether name is that of an architecture, torchvision's or a vision transformer's of another size."""
    return isinstance(name, str) and (name in names() or vit.parse(name) is not None)


def arch_name(arch):
    """arch, if it is the name of an architecture; UserError otherwise (an argparse type)."""
    if arch in NO_LINEAR_HEAD:
        raise UserError(f"{arch} has no linear head; choose another architecture")
    if not is_arch(arch):
        similar = get_close_matches(arch, [*names(), "vit_s_16", "vit_b_14"], 4) or PUBLISHED
        raise UserError(f"unknown architecture {arch}; did you mean {', '.join(similar)}?")
    return arch


def build(arch, n_out=None, weights=None):
    """An architecture whose head is one linear layer with n_out outputs, without dropout anywhere.

    n_out: None keeps torchvision's 1000 outputs. weights: None for random ones, "DEFAULT" or the name of torchvision
    weights, which are downloaded once and then cached by torch. UserError where that fails, where the cached file is
    damaged, and where torchvision has no weights for arch.
    """
    model = _pretrained(arch_name(arch), weights) if weights else _untrained(arch_name(arch))
    if isinstance(model, torchvision.models.VisionTransformer):
        model.__class__ = vit.VisionTransformer
    if isinstance(getattr(model, "classifier", None), nn.Sequential) and _is_dropout_and_linear(model.classifier):
        model.classifier = model.classifier[-1]
    disable_dropout(model)
    if n_out is not None:
        name = head_name(model)
        model.set_submodule(name, nn.Linear(model.get_submodule(name).in_features, n_out))
    return model


def _untrained(arch):
    if arch not in names():
        return vit.build(arch)
    options = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, **options)


def _pretrained(arch, weights):
    if arch not in names():
        raise UserError(f"torchvision has no ImageNet weights for {arch}; choose vit_b_16, or give a checkpoint")
    entry = torchvision.models.get_model_weights(arch)[weights]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        model = torchvision.models.get_model(arch, weights=entry)
    except OSError as error:  # no network, or no room for the file
        raise UserError(
            f"cannot download the weights of {arch} ({error}); go online once or give a checkpoint"
        ) from error
    except Exception as error:  # torch raises anything from EOFError to KeyError for a damaged file
        reason = str(error).split("\n")[0][:100] or type(error).__name__
        raise UserError(f"the cached weights {cached} are damaged ({reason}); delete the file and retry") from error
    if arch == "inception_v3":  # GoogLeNet's auxiliary heads are removed by torchvision
        model.aux_logits, model.AuxLogits = False, None
    return model


def _is_dropout_and_linear(layers):
    return len(layers) == 2 and isinstance(layers[0], nn.Dropout) and isinstance(layers[1], nn.Linear)


def disable_dropout(model):
    """Set the probability of all dropout in model to 0, as in the published networks; stochastic depth stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def head_name(model):
    """The name of model's head, its last linear layer: 'fc' of a ResNet, 'classifier' of MobileNetV2."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear head; choose another architecture")
    return linear[-1]


def head(model):
    """model's head, an nn.Linear."""
    return model.get_submodule(head_name(model))


def remove_head(model):
    """model without its head: images (N, 3, H, W) to features (N, C). Changes model in place and returns it."""
    model.set_submodule(head_name(model), nn.Identity())
    return model


def spatial_trunk(model):
    """The part of model that ends in the last spatial maps: images (N, 3, H, W) to maps (N, C, H/32, W/32).

    The head's input is the mean of these maps over space, which class activation maps rely on. UserError for an
    architecture whose head has another input.
    """
    if isinstance(model, torchvision.models.ResNet):
        stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        return nn.Sequential(*(getattr(model, stage) for stage in stages))
    if isinstance(model, (torchvision.models.MobileNetV2, torchvision.models.EfficientNet)):
        return model.features
    if isinstance(model, torchvision.models.RegNet):
        return nn.Sequential(model.stem, model.trunk_output)
    if isinstance(model, torchvision.models.DenseNet):
        return nn.Sequential(model.features, nn.ReLU())
    if isinstance(model, torchvision.models.VisionTransformer):
        raise UserError(
            f"{type(model).__name__} has no last spatial maps that its head averages, the head sees one token; "
            "linear_combination_maps.py --attention shows what this token attends to"
        )
    raise UserError(
        f"{type(model).__name__} has no last spatial maps that its head averages; "
        "choose a ResNet, ResNeXt, RegNet, DenseNet, MobileNetV2 or EfficientNet"
    )


def check_image_size(model, size):
    """UserError if model cannot process images of size x size pixels, tested on a blank one."""
    was_training = model.training
    weight = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--image-size {size} does not fit {type(model).__name__} ({reason})") from error
    finally:
        model.train(was_training)


def freeze(module):
    """Disable all learning in module: no gradients, batch norm and dropout in evaluation mode. Returns module."""
    return module.requires_grad_(False).eval()


def train_mode_keep_frozen_bn(model):
    """Put model in training mode, except for its frozen parts, which stay in evaluation mode entirely.

    A module is frozen if none of its parameters requires a gradient: its batch-norm statistics do not change, its
    dropout and stochastic depth are off. So are those without parameters that stand beside frozen modules.
    """
    model.train()
    for module in model.modules():
        learning = [parameter.requires_grad for parameter in module.parameters()]
        if learning and not any(learning):
            module.eval()
        elif not all(learning):
            for child in module.children():
                if next(child.parameters(), None) is None:
                    child.eval()
    return model


def adapt_batch_norm(model, batches):
    """Replace model's batch-norm statistics by those of the images in batches, each batch weighted by its images.

    An untrained network still has the statistics 0 and 1; with those of real images its random features are a fair
    baseline. batches: iterable of images (N, 3, H, W); a batch of a single image, which may have no variance, is
    skipped. Leaves model in evaluation mode.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    with torch.no_grad():
        for images in batches:
            if len(images) == 1:
                continue
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen  # makes the running statistics the mean over all images so far
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


# --- inner layers


class LayerMeans(nn.Module):
    """Inner layers of a model as features: images (N, 3, H, W) to a list of means over space or tokens (N, C).

    layers: numbers or names, mixed freely.

    Numbers count from the end, as in the paper's figure 7a. Layer 1 of a convolutional network is what its head sees.
    Layer L > 1 is the first unit (convolution, batch norm, rectifier) of the L-th block from the end, where the last
    convolution of MobileNetV2 and the end of a ResNet count as the first. So layers 2, 6, 10, 14 and 18 of MobileNetV2
    are the expansion layers of its inverted residuals, and layer 18 of a ResNet-50 is its first layer. Layer L of a
    vision transformer is its L-th block from the end, averaged over the patch tokens. Other networks have layer 1 only.

    Names are those of torchvision's feature extraction: layer3.2.relu, encoder.layers.encoder_layer_5. Where a module
    is called several times in a forward pass, its name is the first call, followed by NAME_1, NAME_2.

    PENULTIMATE is the input of the head of any network: the class token of a vision transformer.

    No layer after the requested ones is computed. UserError for a layer that does not exist.
    """

    def __init__(self, model, layers):
        super().__init__()
        model.eval()
        self.layers = tuple(layers)
        self.trunk = remove_head(copy.deepcopy(model)) if PENULTIMATE in layers else None
        names = {layer: _node_name(model, layer) for layer in layers if layer != PENULTIMATE}
        numbers = [layer for layer, name in names.items() if name is None]
        self.numbered = _NumberedLayers(model, numbers) if numbers else None
        nodes = {layer: name for layer, name in names.items() if name is not None}
        self.nodes = _NamedNodes(model, nodes) if nodes else None

    def forward(self, x):
        means = {} if self.trunk is None else {PENULTIMATE: self.trunk(x)}
        for part in (self.numbered, self.nodes):
            if part is not None:
                means |= part(x)
        return [means[layer] for layer in self.layers]

    def widths(self, size):
        """The number of features C of each layer, for images of size x size pixels."""
        parameter = next(self.parameters())
        with torch.inference_mode():
            return [means.shape[1] for means in self(torch.zeros(1, 3, size, size, device=parameter.device))]


def layer(text):
    """The number or the name of a layer, as LayerMeans takes it (an argparse type)."""
    return int(text) if text.isdecimal() else text


def layer_name(model, layer):
    """The name of the module whose output is a layer of model; layer: as LayerMeans takes it."""
    if (name := _node_name(model, layer)) is not None:
        return name
    names = {module: name for name, module in model.named_modules()}
    block, unit = _blocks(model)[-layer]
    module = block if layer == 1 else unit
    return next((names[each] for each in (module, *reversed([*module.children()])) if each in names), PENULTIMATE)


def _node_name(model, layer):
    """The name of a layer as a node of the network's graph; None for a number that _NumberedLayers knows."""
    if isinstance(layer, str):
        return layer
    if isinstance(model, torchvision.models.VisionTransformer):
        depth = len(model.encoder.layers)
        _check_number(model, layer, depth)
        return f"encoder.layers.encoder_layer_{depth - layer}"
    return None


def _check_number(model, layer, count):
    if not 1 <= layer <= count:
        numbers = f"layers 1 to {count}" if count > 1 else "only layer 1 by number"
        raise UserError(f"there is no layer {layer}: {type(model).__name__} has {numbers}; others go by their names")


class _NumberedLayers(nn.Module):
    """The layers of a convolutional network by number: images (N, 3, H, W) to {number: means (N, C)}."""

    def __init__(self, model, numbers):
        super().__init__()
        blocks = _blocks(model)
        for number in numbers:
            _check_number(model, number, len(blocks))
        self.numbers = tuple(numbers)
        self.blocks = nn.ModuleList(block for block, _ in blocks)
        self.units = nn.ModuleDict({str(number): blocks[-number][1] for number in numbers if number > 1})

    def forward(self, x):
        means = {}
        for number, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            if number == 1:
                means[1] = _mean(block(x))
            elif number in self.numbers:
                means[number] = _mean(self.units[str(number)](x))
            if number == min(self.numbers):
                return means
            x = block(x)


def _blocks(model):
    """[(block, its first unit)] of a model, from the images to what the head sees."""
    if isinstance(model, torchvision.models.MobileNetV2):
        return [(block, block.conv[0] if hasattr(block, "conv") else block) for block in model.features]
    if isinstance(model, torchvision.models.ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu)
        inner = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        units = [(block, nn.Sequential(block.conv1, block.bn1, block.relu)) for block in inner]
        return [(nn.Sequential(stem, model.maxpool), stem), *units, (nn.Identity(), nn.Identity())]
    return [(remove_head(copy.deepcopy(model)), None)]


class _NamedNodes(nn.Module):
    """Nodes of a network's graph by name: images (N, 3, H, W) to {layer: means (N, C)}.

    nodes: {layer: name of its node}.
    """

    def __init__(self, model, nodes):
        super().__init__()
        from torchvision.models import feature_extraction  # as late as torchvision itself

        self.nodes = nodes
        known = feature_extraction.get_graph_node_names(model)[1]
        for name in nodes.values():
            if name not in known and not any(other.startswith(f"{name}.") for other in known):
                similar = get_close_matches(name, known, 3, 0.3)
                raise UserError(f"{type(model).__name__} has no layer {name}; did you mean {', '.join(similar)}?")
        self.extractor = feature_extraction.create_feature_extractor(model, list(dict.fromkeys(nodes.values()))).eval()
        self.has_class_token = isinstance(model, torchvision.models.VisionTransformer)

    def forward(self, x):
        means = _NodeMeans(self.extractor, self.has_class_token).run(x)
        return {layer: means[name] for layer, name in self.nodes.items()}


class _NodeMeans(fx.Interpreter):
    """Runs a feature extractor, and takes the mean of an output before an in-place operation modifies it."""

    def __init__(self, extractor, has_class_token):
        super().__init__(extractor)
        self.has_class_token = has_class_token
        self.means = {}

    def run(self, x):
        """{name: means (N, C)} of images (N, 3, H, W); UserError for a node without features."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        self.names = {node: name for name, node in output.args[0].items()}
        self.n_images = len(x)
        super().run(x)
        return {name: self.means[node] for name, node in output.args[0].items()}

    def run_node(self, node):
        value = super().run_node(node)
        if node in self.names:
            if not isinstance(value, torch.Tensor) or value.ndim < 2 or len(value) != self.n_images:
                raise UserError(f"layer {self.names[node]} gives no features of an image; choose another")
            self.means[node] = _mean(value, self.has_class_token)
        return value


def _mean(output, has_class_token=False):
    """The mean (N, C) of square maps (N, C, H, W) or (N, H, W, C), or of tokens (N, T, C) without the class token."""
    if output.ndim == 4:
        is_channels_last = output.shape[1] == output.shape[2] != output.shape[3]  # in parts of Swin and ConvNeXt
        return output.mean((1, 2) if is_channels_last else (2, 3))
    if output.ndim == 3:
        n_tokens = output.shape[1]
        skipped = int(has_class_token and isqrt(n_tokens) ** 2 != n_tokens)
        return output[:, skipped:].mean(1)
    return output

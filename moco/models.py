"""Architectures by name: a torchvision trunk with one linear head, cut where it is wanted."""

from difflib import get_close_matches

import torch
from torch import nn

from moco.cli import UserError

PUBLISHED = ("resnet50", "resnext101_32x8d", "resnext50_32x4d", "mobilenet_v2")
FAMILY = (*PUBLISHED, "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")


def _torchvision_models():
    """The module torchvision.models; loading it takes a second, which --help does not need."""
    from torchvision import models

    return models


def arch_name(arch):
    """arch, if torchvision has a classification architecture of this name; UserError if not (an argparse type)."""
    torchvision_models = _torchvision_models()
    names = torchvision_models.list_models(module=torchvision_models)
    if arch not in names:
        near = get_close_matches(arch, names, 4) or PUBLISHED
        raise UserError(f"no architecture of torchvision's is called {arch}; there are {', '.join(near)} and others")
    return arch


def build(arch, n_out=None, weights=None):
    """A torchvision architecture whose head is one linear layer with n_out outputs and no dropout before it.

    n_out: None keeps torchvision's own 1000 outputs. weights: None for random ones, "DEFAULT" or the name of
    torchvision weights, which are downloaded once and then cached by torch; UserError where that fails.
    """
    options = {"aux_logits": False, "init_weights": not weights} if arch in ("googlenet", "inception_v3") else {}
    try:
        model = _torchvision_models().get_model(arch_name(arch), weights=weights, **options)
    except OSError as error:  # of fetching the weights, or of keeping them
        raise UserError(f"cannot fetch weights of {arch} ({error}); go online once or name a checkpoint") from error
    if isinstance(getattr(model, "classifier", None), nn.Sequential) and _is_dropout_and_linear(model.classifier):
        model.classifier = model.classifier[-1]
    if n_out is not None:
        name = head_name(model)
        model.set_submodule(name, nn.Linear(model.get_submodule(name).in_features, n_out))
    return model


def _is_dropout_and_linear(layers):
    return len(layers) == 2 and isinstance(layers[0], nn.Dropout) and isinstance(layers[1], nn.Linear)


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

    The mean of these maps over space is what the head sees, which class activation maps rest on. UserError for an
    architecture that has no such maps.
    """
    if hasattr(model, "layer4"):
        stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        return nn.Sequential(*(getattr(model, stage) for stage in stages))
    torchvision_models = _torchvision_models()
    if isinstance(model, (torchvision_models.MobileNetV2, torchvision_models.EfficientNet)):
        return model.features
    raise UserError(
        f"{type(model).__name__} has no last spatial maps that a linear head averages; "
        "choose MobileNetV2, a ResNet or a ResNeXt"
    )


def check_image_size(model, size):
    """UserError where model cannot take images of size x size pixels, found by running it once on a blank one."""
    was_training = model.training
    weight = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--image-size {size}: {type(model).__name__} cannot take it ({reason})") from error
    finally:
        model.train(was_training)


def freeze(module):
    """Stop all learning in module: no gradients, batch norm and dropout as in evaluation. Returns module."""
    return module.requires_grad_(False).eval()


def train_mode_keep_frozen_bn(model):
    """Put model in training mode, but for the batch norm of frozen parts, whose statistics stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()
    return model


def adapt_batch_norm(model, batches):
    """Replace model's batch-norm statistics by those of the images in batches, each batch weighted by its images.

    An untrained network still has the statistics 0 and 1; with those of real images its random features are a fair
    baseline. batches: iterable of images (N, 3, H, W). Leaves model in eval mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    seen = 0
    with torch.no_grad():
        for images in batches:
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen  # makes the running statistics the mean over all images so far
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


class LayerMeans(nn.Module):
    """The inner layers of a model, several in one pass: images (N, 3, H, W) to a list of spatial means (N, C).

    LayerMeans count from the end, as in the paper's figure 7a. Layer 1 is the last maps, which the head averages. Layer
    L > 1 is the first unit (convolution, batch norm, rectifier) of the L-th block from the end, where the last
    convolution of MobileNetV2 and the end of a ResNet count as the first. So layers 2, 6, 10, 14 and 18 of MobileNetV2
    are the expansion layers of its inverted residuals, and layer 18 of a ResNet-50 is the first layer of all. Nothing
    behind the wanted layers is computed.

    wanted: the layers, any of 1 to 19 for MobileNetV2, 18 for ResNet-50, 10 for ResNet-18. UserError for another layer,
    or a model of another kind.
    """

    def __init__(self, model, wanted):
        super().__init__()
        blocks = _blocks(model)
        if faulty := [layer for layer in wanted if not 1 <= layer <= len(blocks)]:
            raise UserError(f"there is no layer {faulty[0]}: {type(model).__name__} has layers 1 to {len(blocks)}")
        self.wanted = tuple(wanted)
        self.blocks = nn.ModuleList(block for block, _ in blocks)
        self.units = nn.ModuleDict({str(layer): blocks[-layer][1] for layer in wanted if layer > 1})

    def forward(self, x):
        means = {}
        for layer, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            if layer == 1:
                means[1] = block(x).mean((2, 3))
            elif layer in self.wanted:
                means[layer] = self.units[str(layer)](x).mean((2, 3))
            if layer == min(self.wanted):
                return [means[layer] for layer in self.wanted]
            x = block(x)


def _blocks(model):
    """[(block, its first unit)] of a model, from the images to the last maps."""
    torchvision_models = _torchvision_models()
    if isinstance(model, torchvision_models.MobileNetV2):
        return [(block, block.conv[0] if hasattr(block, "conv") else block) for block in model.features]
    if isinstance(model, torchvision_models.ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu)
        inner = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        units = [(block, nn.Sequential(block.conv1, block.bn1, block.relu)) for block in inner]
        return [(nn.Sequential(stem, model.maxpool), stem), *units, (nn.Identity(), nn.Identity())]
    raise UserError(f"the inner layers of {type(model).__name__} have no numbers here; choose MobileNetV2 or a ResNet")

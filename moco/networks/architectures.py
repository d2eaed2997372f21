"""Architectures by name: a trunk with one linear head, without its head, or frozen."""

from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision
from torch import nn

from moco.cli import UserError
from moco.networks import vit

PUBLISHED = ("resnet50", "resnext101_32x8d", "resnext50_32x4d", "mobilenet_v2")
RESNETS = (*PUBLISHED[:3], "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
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


def add_flag(parser, *names):
    """Add the flag called names, for the architecture to train, to parser."""
    text = f"architecture; published: {', '.join(PUBLISHED)}; or any other torchvision classifier"
    parser.add_argument(*names, type=arch_name, default="resnet50", metavar="ARCH", help=text)


def build(arch, n_out=None, weights=None):
    """An architecture whose head is one linear layer with n_out outputs, without dropout anywhere.

    n_out: None keeps torchvision's 1000 outputs. weights: None for random ones, or as imagenet_weights returns them,
    which are downloaded once and then cached by torch. UserError where that fails or the cached file is damaged.
    """
    model = _pretrained(arch_name(arch), weights) if weights else _untrained(arch_name(arch))
    if isinstance(model, torchvision.models.VisionTransformer):
        model.__class__ = vit.VisionTransformer
    classifier = getattr(model, "classifier", None)
    if isinstance(classifier, nn.Sequential) and [type(layer) for layer in classifier] == [nn.Dropout, nn.Linear]:
        model.classifier = classifier[-1]
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


def imagenet_weights(arch):
    """torchvision's ImageNet weights of an architecture: the first that were published, as in the paper.

    UserError where there are none, or where they expect other pixels.
    """
    if arch not in names():
        raise UserError(f"torchvision has no ImageNet weights for {arch}; choose vit_b_16, or give a checkpoint")
    weights = next(iter(torchvision.models.get_model_weights(arch)))
    if weights.transforms().mean[0] != 0.485:
        raise UserError(f"{arch} has another mean and std of pixels than ImageNet's; choose efficientnet_v2_m")
    return weights


def cached_file(weights):
    """The file that torch keeps some weights of torchvision in."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _pretrained(arch, weights):
    try:
        model = torchvision.models.get_model(arch, weights=weights)
    except OSError as error:  # no network, or no room for the file
        raise UserError(
            f"cannot download the weights of {arch} ({error}); go online once or give a checkpoint"
        ) from error
    except Exception as error:  # torch raises anything from EOFError to KeyError for a damaged file
        reason = str(error).split("\n")[0][:100] or type(error).__name__
        path = cached_file(weights)
        raise UserError(f"the cached weights {path} are damaged ({reason}); delete the file and retry") from error
    if arch == "inception_v3":  # GoogLeNet's auxiliary heads are removed by torchvision
        model.aux_logits, model.AuxLogits = False, None
    return model


def disable_dropout(model):
    """Set the probability of all dropout in model to 0, as in the published networks; stochastic depth stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def head_name(model):
    """The name of model's head, its last linear layer: 'fc' of a ResNet, 'classifier' of MobileNetV2."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def head(model):
    """model's head, an nn.Linear."""
    return model.get_submodule(head_name(model))


def remove_head(model):
    """model without its head: images (N, 3, H, W) to features (N, C). Changes model in place and returns it."""
    model.set_submodule(head_name(model), nn.Identity())
    return model


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
    baseline. batches: iterable of images (N, 3, H, W), at least two each. Leaves model in evaluation mode.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
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

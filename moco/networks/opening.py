"""Find a network in a checkpoint by fit, whatever library wrote it.

All tensors in a file are read as one flat dictionary, so that nested dictionaries and prefixes of names are the same
thing. A prefix is that of a network if all tensors of an architecture's trunk are under it, by name and shape.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from moco.networks import architectures, vit

MIN_TENSORS = 10  # a prefix that fewer names share is not that of a network: every trunk has more
SECOND_CHOICE = ("student", "momentum", "target", "encoder_k")  # in a prefix, where another network fits as well
PROJECTORS = ("encoder_q", "encoder_k", "base_encoder", "momentum_encoder")  # networks whose head is no classifier


def tensors_in(content):
    """{name: tensor} of nested dictionaries, with the keys of all levels joined by dots; other values are left out.

    LayerScale is multiplied into the layers before it.
    """
    return vit.fold_layer_scale(_flatten(content))


def _flatten(content, prefix=""):
    tensors = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        elif isinstance(key, str) and isinstance(value, dict):
            tensors |= _flatten(value, f"{prefix}{key}.")
    return tensors


@dataclass(frozen=True)
class ArchSpec:
    """Names and shapes of an architecture.

    head: the name of its linear head. in_features: inputs of the head. shapes: {name: shape} of all parameters and
    buffers of the trunk. children: the names of the model's direct children in order.
    """

    arch: str
    head: str
    in_features: int
    shapes: dict
    children: tuple


@cache
def spec(arch):
    """The ArchSpec of an architecture; allocates no memory for weights."""
    with _ParametersOnMeta():
        model = architectures.build(arch, 1)
    name = architectures.head_name(model)
    shapes = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(f"{name}.")}
    children = tuple(child for child, _ in model.named_children())
    return ArchSpec(arch, name, architectures.head(model).in_features, shapes, children)


class _ParametersOnMeta(TorchFunctionMode):
    """Layers are created on the meta device and not initialized, which takes most of the time.

    torch.device("meta") would also move the numbers that RegNet computes its widths from.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **kwargs | {"device": "meta"})
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and re.search(r"[^_]_$", function.__name__):
            return tensor  # an in-place operation such as nn.init.kaiming_normal_
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Fit:
    """How the tensors under a prefix fit an architecture.

    state: the tensors of trunk and classifier by the architecture's names. used: the names of these tensors in the
    file. faults: what does not fit. fitting, total: tensors of the trunk that fit, and all of them. n_out: outputs of
    the classifier, None without one.
    """

    arch: str
    prefix: str
    state: dict
    used: set
    faults: list
    fitting: int
    total: int
    n_out: int | None

    @property
    def key(self):
        """The prefix as a user gives it to --checkpoint-key."""
        return self.prefix.removesuffix(".")


def find(tensors, arch=None, stored_arch=None):
    """The Fits of all networks in tensors (name -> tensor).

    arch: the only architecture to try; None tries the published ones and their kin, then all of torchvision's.
    stored_arch: the architecture that the file names, in whatever vocabulary.
    """
    prefixes = _prefixes(tensors)
    common = [*architectures.FAMILY, *vit.fitting_archs(tensors, stored_arch)]
    others = [name for name in architectures.names() if name not in common]
    for archs in [[arch]] if arch else [common, others]:
        fits = [fit for name in archs for fit in _fits(name, tensors, prefixes) if not fit.faults]
        if fits:
            return fits
    return []


def nearest(tensors, arch=None, stored_arch=None):
    """The Fit with the largest share of fitting tensors, of all architectures or of arch."""
    prefixes = _prefixes(tensors)
    archs = (
        [arch] if arch else [*architectures.FAMILY, *vit.fitting_archs(tensors, stored_arch), *architectures.names()]
    )
    fits = [fit for name in dict.fromkeys(archs) for fit in _fits(name, tensors, prefixes, exact=False)]
    return max(fits, key=lambda fit: fit.fitting / fit.total)


def choose(fits):
    """The Fits of which any is as good as the others: teacher before student, query before momentum encoder."""
    first = [fit for fit in fits if not any(word in fit.prefix for word in SECOND_CHOICE)] or fits
    same = all(
        fit.state.keys() == first[0].state.keys()
        and all(_same(value, first[0].state[name]) for name, value in fit.state.items())
        for fit in first[1:]
    )
    return first[:1] if same else first


def _same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def with_key(fits, key):
    """The Fits with key as their prefix or as a part of it."""
    return [fit for fit in fits if fit.key == key or f".{key}." in f".{fit.prefix}"]


def ignored(fit, tensors):
    """One line that counts the tensors not used, by the first part of their names that differs from fit's prefix."""
    counts = Counter()
    for name in tensors.keys() - fit.used:
        common = 0
        for own, other in zip(fit.prefix.split("."), name.split("."), strict=False):
            if own != other:
                break
            common += 1
        counts[".".join(name.split(".")[: common + 1])] += 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _prefixes(names):
    """The beginnings, up to a dot, that at least MIN_TENSORS names share, the empty one among them."""
    counts = Counter()
    for name in names:
        counts.update({name[: i + 1] for i, letter in enumerate(name) if letter == "."})
    return ["", *(prefix for prefix, count in counts.items() if count >= MIN_TENSORS)]


def _fits(arch, tensors, prefixes, exact=True):
    """The Fits of arch under every prefix. exact: skip those under which the trunk's first tensor is missing."""
    expected = spec(arch)
    for file_names in _namings(expected):
        first = file_names[next(iter(expected.shapes))]
        for prefix in prefixes:
            if not exact or prefix + first in tensors:
                yield _compare(expected, tensors, prefix, file_names)


def _namings(expected):
    """Ways to name an architecture's tensors in a file: {its own name: the name there}.

    These are torchvision's names; those of its children in an nn.Sequential without the head, as lightly's examples
    cut a network; and what vit.other_names gives.
    """
    names = [*expected.shapes, f"{expected.head}.weight", f"{expected.head}.bias"]
    numbers = {child: str(i) for i, child in enumerate(expected.children)}
    namings = [{name: name for name in names}]
    if all(name.split(".")[0] in numbers for name in names):
        namings += [{name: ".".join([numbers[name.split(".")[0]], *name.split(".")[1:]]) for name in names}]
    return namings + (vit.other_names(names) if vit.parse(expected.arch) else [])


def _compare(expected, tensors, prefix, file_names):
    """The Fit of an architecture (ArchSpec) to the tensors under a prefix. file_names: as in _namings."""
    under = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = {}
    faults = []
    used = set()
    for name, shape in expected.shapes.items():
        file_name = file_names[name]
        if file_name not in under:
            if not name.endswith(".num_batches_tracked"):  # which files from before PyTorch 0.4.1 do not have
                faults.append(f"{prefix}{file_name} is missing")
            continue
        used.add(prefix + file_name)
        if fits_shape(name, under[file_name].shape, shape):
            state[name] = under[file_name]
        else:
            faults.append(f"{prefix}{file_name} is {tuple(under[file_name].shape)}, not {tuple(shape)}")
    fitting = len(state)
    head = file_names[f"{expected.head}.weight"].removesuffix(".weight")
    trunk_parts = {file_names[name].split(".")[0] for name in expected.shapes}
    others = [name for name in under if prefix + name not in used and not name.startswith(f"{head}.")]
    faults += [f"{prefix}{name} is not part of {expected.arch}" for name in others if name.split(".")[0] in trunk_parts]
    if vit.parse(expected.arch):
        unsupported = {vit.UNSUPPORTED.get(name.split(".")[0]) for name in others} - {None}
        faults = [f"it has {what}, which are not supported" for what in sorted(unsupported)] + faults
    classifier = _classifier(expected, under, head)
    is_projector = any(part in PROJECTORS for part in prefix.split("."))
    n_out = None
    if classifier and not is_projector:
        used |= {prefix + name for name in classifier.values()}
        state |= {name: under[file_name] for name, file_name in classifier.items()}
        n_out = len(state[f"{expected.head}.weight"])
        state.setdefault(f"{expected.head}.bias", torch.zeros(n_out))
    return Fit(expected.arch, prefix, state, used, faults, fitting, len(expected.shapes), n_out)


def fits_shape(name, shape, expected):
    """Whether a tensor of this name and shape fits the expected shape; position embeddings may have another number."""
    return shape == expected or (name == vit.POSITIONS and vit.is_square_grid(shape, expected))


def _classifier(expected, under, head):
    """The names in a file of a linear head's weight and bias {own name: name there}; None for another head or none.

    head: the head's name there, after which 1 follows where dropout precedes the linear layer.
    """
    there = {name for name in under if name.startswith(f"{head}.")}
    for file_head in (head, f"{head}.1"):
        names = {f"{expected.head}.{kind}": f"{file_head}.{kind}" for kind in ("weight", "bias")}
        names = {name: file_name for name, file_name in names.items() if file_name in there or name.endswith("weight")}
        if there == set(names.values()):
            weight = under[f"{file_head}.weight"]
            return names if weight.ndim == 2 and weight.shape[1] == expected.in_features else None
    return None

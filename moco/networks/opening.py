"""The model that a user names: random or ImageNet weights, or the network in a checkpoint."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from moco import cli
from moco.cli import UserError
from moco.networks import architectures, checkpoint, released, vit
from moco.networks.checkpoint import CheckpointError
from moco.networks.finding import MEAN, STD, find

IMAGE_SIZE = 224  # in pixels, that networks are trained at unless their files say otherwise


@dataclass
class OpenedModel:
    """A model that the user names, and where it comes from.

    network: the model with its head. arch: name of the architecture. image_size: in pixels, of its input. description:
    one line for the output of a script and for args.json. path, sha256: of its file; None for 'random'. has_head:
    whether the head is a classifier that was trained with the network. classes: names of the head's outputs, if stored.
    mean, std: of the pixels from 0 to 1 that the network was trained with; its input is normalized by MEAN and STD.
    """

    network: torch.nn.Module
    arch: str
    image_size: int
    description: str
    path: Path | None = None
    sha256: str | None = None
    has_head: bool = False
    classes: list | None = None
    mean: tuple = MEAN
    std: tuple = STD

    @property
    def title(self):
        """A few words for figures: the name of the file, or of the weights, and the architecture."""
        match = re.match(r"\S+ with (random weights|torchvision's \w+)", self.description)
        return f"{match[1] if match else released.stem(self.path)} ({self.arch})"

    @property
    def checkpoints(self):
        """{path: SHA-256} of the checkpoint, for files.write_args; empty if there is none."""
        return {str(self.path): self.sha256} if self.path else {}


def open_model(name, arch=None, n_out=None, seed=0, head_required=False, key=None, image_size=None):
    """The OpenedModel of a name: 'random', 'imagenet' (also the empty name), or the path of a checkpoint.

    arch: the architecture, by default MobileNetV2 as published; for a checkpoint, only where the file does not store
    it. n_out: outputs of the head; checked against the checkpoint. seed: of random weights. head_required:
    CheckpointError for a checkpoint without a classification head. key: which network of a checkpoint with several.
    image_size: None for the size that the network was trained at. UserError if it cannot take such images.
    """
    torch.manual_seed(seed)
    if name == "random":
        arch, (size, pixels) = arch or "mobilenet_v2", _size(image_size)
        network = architectures.build(arch, n_out)
        opened = OpenedModel(network, arch, size, f"{arch} with random weights, {pixels}")
    elif name in ("imagenet", ""):
        opened = _open_imagenet(arch or "mobilenet_v2", image_size)
    else:
        opened = _open_checkpoint(name, arch, n_out, head_required, key, image_size)
    architectures.check_image_size(opened.network, opened.image_size)
    return opened


def _size(given, trained_at=None):
    """The size of images in pixels, and a few words on it. given: by the user, or None. trained_at: None if unknown."""
    size = given or trained_at or IMAGE_SIZE
    return size, f"{size} pixels" + (f" (trained at {trained_at})" if trained_at not in (None, size) else "")


def _open_imagenet(arch, image_size):
    weights = architectures.imagenet_weights(arch)
    network, path = architectures.build(arch, weights=weights), architectures.cached_file(weights)
    sha256, (size, pixels) = checkpoint.sha256(path), _size(image_size, weights.transforms().crop_size[0])
    description = f"{arch} with torchvision's {weights.name} from {path} (SHA-256 {sha256[:12]}), {pixels}"
    return OpenedModel(network, arch, size, description, path, sha256, has_head=True)


def _open_checkpoint(path, arch, n_out, head_required, key, image_size):
    fit = find(path, arch, key)
    has_head = fit.n_out is not None
    if n_out is not None and fit.n_out not in (None, n_out):
        raise CheckpointError(f"the head of {path} has {fit.n_out} outputs, not {n_out}")
    if head_required and not has_head:
        raise CheckpointError(f"{path} has no linear head; train one with linear_decoding.py")
    network = load(architectures.build(fit.arch, fit.n_out or n_out), fit.state, path, drop_head=not has_head)
    sha256, (size, pixels) = checkpoint.sha256(path), _size(image_size, fit.image_size)
    description = f"{fit.arch} from {path} (SHA-256 {sha256[:12]}), {pixels}"
    if arch not in (None, fit.arch):
        description += f"; not the {arch} of --model"
    if fit.unused:
        description += f"; network: {fit.key or 'top level'}; not used: {fit.unused}"
    if (fit.mean, fit.std) != (MEAN, STD):
        mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in (fit.mean, fit.std))
        description += f"; pixels normalized by mean {mean} and std {std}"
    return OpenedModel(
        network, fit.arch, size, description, Path(path), sha256, has_head, fit.classes, fit.mean, fit.std
    )


def open_for(args, head_required=False):
    """The OpenedModel that args, with the flags of add_model_flags, --seed and --image-size, ask for.

    Prints what it is, and records it in args as network and image_size. head_required: see open_model.
    """
    opened = open_model(
        args.model_path, args.model, args.n_out, args.seed, head_required, args.checkpoint_key, args.image_size
    )
    print(f"model: {opened.description}")
    args.network, args.image_size = opened.description, opened.image_size
    return opened


def start_size(image_size, path, arch, key=None):
    """The size of images to train at: image_size if given, or that of the checkpoint that the training starts from."""
    return image_size or (find(path, arch, key).image_size if path else None) or IMAGE_SIZE


def build_from(path, arch, n_out):
    """architectures.build(arch, n_out) with a random head, on the trunk of the checkpoint at path (None: random)."""
    model = architectures.build(arch, n_out)
    return load(model, find(path, arch).state, path, drop_head=True) if path else model


def load(model, state, path, drop_head=False):
    """model with the weights of state (name -> tensor) from the file at path; with drop_head its head keeps its own.

    The position embeddings of a vision transformer take the size of those in the file; counters of batch norm that the
    file does not have stay as they are. CheckpointError if anything else is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    head = architectures.head_name(model) + "."
    if drop_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    for name in own.keys() - state.keys():
        if not (name.endswith(".num_batches_tracked") or drop_head and name.startswith(head)):
            del own[name]
    own.update(state)  # in place: it holds the versions of modules, which MNASNet needs
    if vit.POSITIONS in state:
        positions = model.encoder.pos_embedding  # which an optimizer may hold already
        positions.data = positions.new_empty(state[vit.POSITIONS].shape)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {faults}") from error
    return model


def add_flags(parser, arch_help="architecture, if not stored in the checkpoint"):
    """Add the flags that say which network of a checkpoint to open, and of which architecture."""
    parser.add_argument("--model", type=architectures.arch_name, metavar="ARCH", help=arch_help)
    parser.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )


def add_model_flags(parser):
    """Add the flags of the scripts that analyze one model, which open_for takes."""
    add = parser.add_argument
    add("--model-path", default="", metavar="FILE", help="checkpoint, 'random' or 'imagenet' (the default)")
    add_flags(parser)
    add("--n_out", type=cli.number(int, 1), help="number of outputs; read from the checkpoint, checked if given")


def class_number(text, names, n_out):
    """The index of the output that text names or numbers. names: of the n_out outputs, or None if unknown.

    A name takes precedence over a number. UserError for an output that does not exist.
    """
    if text in (names or ()):
        return names.index(text)
    if text.isdecimal() and int(text) < n_out:
        return int(text)
    similar = ", ".join(get_close_matches(text, names or (), 3, 0))
    known = f"; did you mean {similar}?" if similar else ""
    raise UserError(f"--class-idx {text}: the model has {n_out} outputs, 0 to {n_out - 1}{known}")

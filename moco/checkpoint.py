"""Safe reading of any checkpoint of this family, and writing that leaves no half file."""

import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moco import cli, files, models, provenance
from moco.cli import UserError

# The released files hold 0-d NumPy arrays, pickled under the name that NumPy's core had in 2020.
NUMPY_GLOBALS = [
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype("f4")),
]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe, or does not fit; the message names the file and the reason."""


def read(path):
    """What the file at path holds, its tensors on the CPU; nothing in it is ever run.

    CheckpointError for a file that is missing, damaged (zip files are checked byte for byte) or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; check the path (README.md has links to released ones)")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise CheckpointError(f"the checkpoint {path} is damaged (in {damaged}); fetch or make it anew")
        with torch.serialization.safe_globals(NUMPY_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own storage classes, which the legacy format needs
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"the checkpoint {path} may not be read; change its permissions") from error
    except Exception as error:  # what torch raises for damaged files ranges from struct.error to IndexError
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL " in str(error):
            reason = str(error).split("GLOBAL ")[1].split(" ")[0]
            raise CheckpointError(f"the checkpoint {path} is refused: it asks to run code ({reason})") from error
        reason = str(error).strip().split("\n")[0][:100]
        speaks = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
        if not speaks or reason.startswith("Weights only load failed"):  # and advice to run whatever the file holds
            reason = "torch.save does not write such files"
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason}); fetch or make it anew") from error


def write(path, content):
    """Write content (a dict of plain types and tensors) to path, whole or not at all; UserError on a full disk."""
    with files.atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the disk's own error, or Ctrl-C, behind one about positions
            raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def keep_previous(last):
    """Let the file last.tar, if there is one, be last.old.tar too, until a new last.tar takes its name."""
    if last.exists():
        old = last.with_name("last.old.tar")
        old.unlink(missing_ok=True)
        try:
            os.link(last, old)
        except OSError:  # some file systems have no hard links
            os.replace(last, old)


def past_records(content):
    """The accuracies of past epochs that a published file keeps, as records."""
    records = [{"epoch": epoch, "acc1": float(acc1)} for epoch, acc1 in enumerate(content.get("acc1_list", []))]
    for record, val_acc1 in zip(records, content.get("val_acc1_list", []), strict=False):
        record["val_acc1"] = float(val_acc1)
    return records


@dataclass
class Weights:
    """A network's weights as a checkpoint holds them.

    state: name -> tensor, without the prefixes of DataParallel and MoCo. arch: torchvision's name. n_out: outputs of
    the head; None where the file has no classification head. classes: folder names of the outputs, if stored.
    """

    path: Path
    state: dict
    arch: str
    n_out: int | None
    classes: list | None = None


def weights(path, arch=None):
    """The Weights in the checkpoint at path: released, ours, MoCo's query encoder, or a bare state dict.

    arch: the architecture, where the user names one; else the one stored, else the one whose trunk fits exactly.
    """
    content = read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights but a {type(content).__name__}; give a checkpoint")
    state = content.get("model_state_dict", content.get("state_dict", content))
    if not (isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise CheckpointError(f"{path} holds no weights (its keys: {', '.join(map(str, content))[:100]})")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    is_moco = any(name.startswith("encoder_q.") for name in state)
    if is_moco:
        state = {name.removeprefix("encoder_q."): value for name, value in state.items() if "encoder_q." in name}
    stored = content if state is not content and "arch" in content else {}
    arch = arch or stored.get("arch") or _fitting_arch(path, state)
    head = _head_name(arch)
    if head == "classifier" and "classifier.1.weight" in state:  # torchvision's own files count the dropout layer
        state = {name.replace("classifier.1.", "classifier."): value for name, value in state.items()}
    if is_moco:
        state = {name: value for name, value in state.items() if not name.startswith(head + ".")}
    head_weight = state.get(f"{head}.weight")
    n_out = None if head_weight is None else len(head_weight)
    return Weights(Path(path), state, arch, n_out, stored.get("classes"))


def _meta_model(arch, n_out=1):
    """An architecture without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return models.build(arch, n_out)


def _head_name(arch):
    return models.head_name(_meta_model(arch))


def _fitting_arch(path, state):
    """The architecture of the family whose trunk has exactly the names and shapes of state."""
    for arch in models.FAMILY:
        model = _meta_model(arch)
        head = models.head_name(model) + "."
        trunk = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(head)}
        if trunk == {name: value.shape for name, value in state.items() if not name.startswith(head)}:
            return arch
    raise CheckpointError(f"{path} fits none of {', '.join(models.FAMILY)}; name its architecture with --model")


def fill(model, found, drop_head=False):
    """Load the Weights found into model, exactly; with drop_head its head keeps the weights it has.

    CheckpointError that lists what is missing, left over or of another shape.
    """
    head = models.head_name(model) + "."
    own = model.state_dict()
    wanted = {name for name in own if not (drop_head and name.startswith(head))}
    given = {name for name in found.state if not (drop_head and name.startswith(head))}
    shapes = [
        f"{name} is {tuple(found.state[name].shape)} and not {tuple(own[name].shape)}"
        for name in sorted(wanted & given)
        if found.state[name].shape != own[name].shape
    ]
    faults = [f"{name} is missing" for name in sorted(wanted - given)]
    faults += [f"{name} is left over" for name in sorted(given - wanted)] + shapes
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{found.path} does not fit {found.arch}: {'; '.join(faults[:4])}{more}")
    model.load_state_dict({**own, **{name: found.state[name] for name in wanted}})
    return model


def load(path, arch=None, n_out=None):
    """The model in the checkpoint at path and its Weights, head included where the file has one.

    n_out: what the user says the head has; CheckpointError if it is not so. A file without a head (MoCo's) gives a
    model with a random head of n_out outputs (1000 if None).
    """
    found = weights(path, arch)
    if n_out is not None and found.n_out is not None and n_out != found.n_out:
        raise CheckpointError(f"the head of {path} has {found.n_out} outputs, not {n_out}")
    model = models.build(found.arch, found.n_out or n_out or 1000)
    return fill(model, found, drop_head=found.n_out is None), found


@dataclass
class OpenedModel:
    """A model that a user named, and what is known of it.

    network: the model with its head. arch: torchvision's name. path, sha256: of its checkpoint; None for 'random' and
    'imagenet'. has_head: whether the head is a classifier that was trained with the network. classes: names of the
    head's outputs, if stored.
    """

    network: torch.nn.Module
    arch: str
    path: Path | None = None
    sha256: str | None = None
    has_head: bool = False
    classes: list | None = None
    description: str = ""


def open_model(name, arch=None, n_out=None, seed=0, head_required=False):
    """The OpenedModel of a name: 'random', 'imagenet' (also the empty name), or the path of a checkpoint.

    arch: the architecture, MobileNetV2 by default as published; of a checkpoint, where it cannot be read from it.
    n_out: outputs of the head; checked against the checkpoint. seed: of random weights. head_required: CheckpointError
    for a checkpoint without a classification head.
    """
    torch.manual_seed(seed)
    if name in ("random", "imagenet", ""):
        arch = arch or "mobilenet_v2"
        if name == "random":
            return OpenedModel(models.build(arch, n_out), arch, description=f"{arch} with random weights")
        network = models.build(arch, weights="DEFAULT")
        return OpenedModel(network, arch, has_head=True, description=f"{arch} with torchvision's ImageNet weights")
    network, weights = load(name, arch, n_out)
    if head_required and weights.n_out is None:
        raise CheckpointError(f"{name} has no linear head; train one with linear_decoding.py")
    digest = provenance.sha256(name)
    description = f"{weights.arch} of {name} (SHA-256 {digest[:12]})"
    return OpenedModel(
        network, weights.arch, Path(name), digest, weights.n_out is not None, weights.classes, description
    )


def add_flags(parser):
    """Add the flags of the scripts that look into a model, which open_model takes."""
    add = parser.add_argument
    add("--model-path", default="", metavar="FILE", help="checkpoint, 'random' or 'imagenet' (the default)")
    add("--model", type=models.arch_name, metavar="ARCH", help="architecture, if not stored in the checkpoint")
    add("--n_out", type=cli.number(int, 1), help="number of outputs; read from the checkpoint, checked if given")


def class_number(text, names, n_out):
    """The number of the output that text names or numbers; names: those of the n_out outputs, or None if unknown.

    UserError for one that is not there.
    """
    if text in (names or ()):
        return names.index(text)
    if text.isdecimal() and int(text) < n_out:
        return int(text)
    known = f" ({', '.join(names)})" if names else ""
    raise UserError(f"--class-idx {text}: the model has {n_out} outputs, 0 to {n_out - 1}{known}")

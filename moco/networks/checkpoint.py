"""Read checkpoints safely, write them atomically, and open the networks in them."""

import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from moco import cli, files
from moco.cli import UserError
from moco.networks import architectures, opening, safe_pickle, vit


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or unsafe, or does not fit; the message names the file and the reason."""


def read(path):
    """The content of the checkpoint at path, its tensors on the CPU; no code in it is ever run.

    A file that ends in .safetensors gives a flat dict of tensors. CheckpointError for a file that is missing, damaged
    (zip files are checked byte for byte) or contains anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; check the path (README.md links released ones)")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read checkpoint {path}; change its permissions") from error
    except safe_pickle.UnsafeError as error:
        raise CheckpointError(f"checkpoint {path} is refused: it contains {error}") from error
    except Exception as error:  # torch raises anything from struct.error to IndexError for damaged files
        reason = str(error).strip()
        if isinstance(error, pickle.UnpicklingError) and (code := safe_pickle.refused_code(reason)):
            raise CheckpointError(f"checkpoint {path} is refused: loading it would run code ({code})") from error
        reason = reason.split("\n")[0][:100]
        is_clear = isinstance(error, OSError | RuntimeError | pickle.UnpicklingError)
        if not is_clear or reason.startswith("Weights only load failed"):  # torch then advises to run the file's code
            reason = "not a file that torch.save writes"
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({reason}); download or create it again"
        ) from error


def _read_pickle(path):
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"checkpoint {path} is damaged (in {damaged}); download or create it again")
    with torch.serialization.safe_globals(safe_pickle.GLOBALS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's own storage classes, which the legacy format needs
        return safe_pickle.plain(torch.load(path, map_location="cpu", weights_only=True))


def _read_safetensors(path):
    import safetensors.torch  # here, as few checkpoints need it

    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}); download it again") from error


def write(path, content):
    """Write content (a dict of plain types and tensors) to path atomically; UserError on a full disk.

    Tensors of all devices are written as CPU tensors, so that the file opens on a machine without a GPU.
    """
    with files.atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(_to_cpu(content), file)
        except RuntimeError as error:  # torch hides the disk's own error, or Ctrl-C, behind one about positions
            raise error.__context__ if isinstance(error.__context__, OSError | KeyboardInterrupt) else error from None


def _to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_to_cpu, value))
    return value


def keep_previous(last):
    """Keep the file last.tar, if it exists, as last.old.tar too, until a new last.tar replaces it."""
    if last.exists():
        old = last.with_name("last.old.tar")
        old.unlink(missing_ok=True)
        try:
            os.link(last, old)
        except OSError:  # some file systems have no hard links
            os.replace(last, old)


def past_records(content):
    """The accuracies of past epochs in a published file, as records."""
    records = [{"epoch": epoch, "acc1": float(acc1)} for epoch, acc1 in enumerate(content.get("acc1_list", []))]
    for record, val_acc1 in zip(records, content.get("val_acc1_list", []), strict=False):
        record["val_acc1"] = float(val_acc1)
    return records


@dataclass
class Weights:
    """A network's weights from a checkpoint.

    state: name -> tensor, by the names of architectures.build(arch). n_out: outputs of the head; None where the file
    has no classification head. classes: folder names of the outputs, if stored. key: where the network is in the file.
    ignored: one line that counts the tensors in the file that are not used, such as projectors; '' if none.
    """

    path: Path
    state: dict
    arch: str
    n_out: int | None
    classes: list | None = None
    key: str = ""
    ignored: str = ""


def weights(path, arch=None, key=None):
    """The Weights of the network in the checkpoint at path, whatever library wrote it (see layouts).

    arch: the architecture to expect if the file stores none, or one that is not torchvision's; without either, the one
    that fits. key: where in the file the network is, for one with several (--checkpoint-key). CheckpointError where no
    network fits, where several do, and for weights that are not finite.
    """
    content = read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains no weights but a {type(content).__name__}; give a checkpoint")
    tensors = opening.tensors_in(content)
    if not tensors:
        raise CheckpointError(f"{path} contains no weights (its keys: {', '.join(map(str, content))[:100]})")
    stored_arch = content.get("arch")
    fits = opening.find(tensors, stored_arch) if architectures.is_arch(stored_arch) else []
    fits = fits or opening.find(tensors, arch, stored_arch)
    if not fits:
        raise CheckpointError(_misfit(path, tensors, arch, stored_arch))
    fit = _choose(path, fits, key)
    for name, tensor in fit.state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights in {path} are not finite ({name} contains NaN or infinity); use another"
            )
    classes = content.get("classes")
    if not (isinstance(classes, list) and len(classes) == fit.n_out and all(isinstance(name, str) for name in classes)):
        classes = None
    return Weights(Path(path), fit.state, fit.arch, fit.n_out, classes, fit.key, opening.ignored(fit, tensors))


def _choose(path, fits, key):
    if key is not None:
        keyed = opening.with_key(fits, key)
        if not keyed:
            keys = ", ".join(fit.key or "''" for fit in fits)
            raise CheckpointError(f"--checkpoint-key {key}: {path} has no such network; it has {keys}")
        fits = keyed
    chosen = opening.choose(fits)
    if len(chosen) > 1:
        keys = ", ".join(fit.key or "''" for fit in chosen)
        raise CheckpointError(f"{path} contains several networks ({keys}); choose one with --checkpoint-key")
    return chosen[0]


def _misfit(path, tensors, arch, stored_arch):
    """The message for a file in which no network fits."""
    expected = stored_arch if architectures.is_arch(stored_arch) else arch
    fit = opening.nearest(tensors, expected, stored_arch)
    arch = fit.arch if expected else f"any architecture; nearest: {fit.arch}"
    return f"{path} does not fit {arch}: {fit.fitting} of {fit.total} tensors fit; {_first(fit.faults)}"


def _first(faults, n=3):
    more = f"; and {len(faults) - n} more" if len(faults) > n else ""
    return "; ".join(faults[:n]) + more


def fill(model, weights, drop_head=False):
    """Load Weights into model, exactly; with drop_head the head of model keeps its own weights.

    The position embeddings of a vision transformer take the size of those in the file; counters of batch norm that
    the file does not have stay as they are. CheckpointError that lists what is missing, unexpected or of another shape.
    """
    head = architectures.head_name(model) + "."
    state = model.state_dict()  # with its metadata, which MNASNet needs
    expected = {name for name in state if not (drop_head and name.startswith(head))}
    given = {name for name in weights.state if not (drop_head and name.startswith(head))}
    missing = [name for name in sorted(expected - given) if not name.endswith(".num_batches_tracked")]
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is unexpected" for name in sorted(given - expected)]
    for name in sorted(expected & given):
        shape = weights.state[name].shape
        if not opening.fits_shape(name, shape, state[name].shape):
            faults.append(f"{name} is {tuple(shape)}, not {tuple(state[name].shape)}")
    if faults:
        network = type(model).__name__
        raise CheckpointError(f"{weights.path} ({weights.arch}) does not fit this {network}: {_first(faults)}")
    if vit.POSITIONS in expected:
        vit.resize_positions(model, weights.state[vit.POSITIONS].shape)
    state.update({name: weights.state[name] for name in expected & given})
    model.load_state_dict(state)
    return model


def load(path, arch=None, n_out=None, key=None):
    """The model in the checkpoint at path and its Weights, the head included where the file has one.

    n_out: outputs of the head; CheckpointError if the file has another number. A file without a classification head
    gives a model with a random head of n_out outputs (1000 if None). arch, key: as in weights.
    """
    loaded = weights(path, arch, key)
    if n_out is not None and loaded.n_out is not None and n_out != loaded.n_out:
        raise CheckpointError(f"the head of {path} has {loaded.n_out} outputs, not {n_out}")
    model = architectures.build(loaded.arch, loaded.n_out or n_out or 1000)
    return fill(model, loaded, drop_head=loaded.n_out is None), loaded


def build_from(path, arch, n_out):
    """models.build(arch, n_out) with a random head, on the trunk of the checkpoint at path (None: random, too)."""
    model = architectures.build(arch, n_out)
    return fill(model, weights(path, arch), drop_head=True) if path else model


@dataclass
class OpenedModel:
    """A model that the user names, and where it comes from.

    network: the model with its head. arch: name of the architecture. path, sha256: of its checkpoint; None for
    'random' and 'imagenet'. has_head: whether the head is a classifier that was trained with the network. classes:
    names of the head's outputs, if stored. description: one line for the output of a script.
    """

    network: torch.nn.Module
    arch: str
    path: Path | None = None
    sha256: str | None = None
    has_head: bool = False
    classes: list | None = None
    description: str = ""

    @property
    def checkpoints(self):
        """{path: SHA-256} of the checkpoint, for files.write_args; empty if there is none."""
        return {str(self.path): self.sha256} if self.path else {}


def open_model(name, arch=None, n_out=None, seed=0, head_required=False, key=None):
    """The OpenedModel of a name: 'random', 'imagenet' (also the empty name), or the path of a checkpoint.

    arch: the architecture, by default MobileNetV2 as published; for a checkpoint, only where the file does not store
    it. n_out: outputs of the head; checked against the checkpoint. seed: of random weights. head_required:
    CheckpointError for a checkpoint without a classification head. key: which network of a checkpoint with several.
    """
    torch.manual_seed(seed)
    if name in ("random", "imagenet", ""):
        arch = arch or "mobilenet_v2"
        if name == "random":
            return OpenedModel(architectures.build(arch, n_out), arch, description=f"{arch} with random weights")
        network = architectures.build(arch, weights="DEFAULT")
        return OpenedModel(network, arch, has_head=True, description=f"{arch} with torchvision's ImageNet weights")
    network, loaded = load(name, arch, n_out, key)
    if head_required and loaded.n_out is None:
        raise CheckpointError(f"{name} has no linear head; train one with linear_decoding.py")
    digest = files.sha256(name)
    description = f"{loaded.arch} from {name} (SHA-256 {digest[:12]})"
    if loaded.ignored:
        description += f"; network: {loaded.key or 'top level'}; not used: {loaded.ignored}"
    return OpenedModel(network, loaded.arch, Path(name), digest, loaded.n_out is not None, loaded.classes, description)


def add_flags(parser):
    """Add the flags of the scripts that analyze a model; open_model takes their values."""
    add = parser.add_argument
    add("--model-path", default="", metavar="FILE", help="checkpoint, 'random' or 'imagenet' (the default)")
    add("--model", type=architectures.arch_name, metavar="ARCH", help="architecture, if not stored in the checkpoint")
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )
    add("--n_out", type=cli.number(int, 1), help="number of outputs; read from the checkpoint, checked if given")


def class_number(text, names, n_out):
    """The index of the output that text names or numbers. names: of the n_out outputs, or None if unknown.

    A name takes precedence over a number. UserError for an output that does not exist.
    """
    if text in (names or ()):
        return names.index(text)
    if text.isdecimal() and int(text) < n_out:
        return int(text)
    known = f" ({', '.join(names)})" if names else ""
    raise UserError(f"--class-idx {text}: the model has {n_out} outputs, 0 to {n_out - 1}{known}")

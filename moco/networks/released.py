"""The published networks by name: their files, their architectures, and where to get them. Nothing is downloaded."""

from pathlib import Path

from moco.cli import UserError

ENDINGS = (".tar", ".pth", ".pth.tar", ".safetensors")
RESNEXT, MOBILENET = "resnext50_32x4d", "mobilenet_v2"

_DRIVE = {  # file stem -> (architecture, id on Google Drive): Orhan, Gupta & Lake (2020)
    "TC-SAY-resnext": (RESNEXT, "1I-HvIeuupsE88yS6eff_nE6pHpEmTVPG"),
    "TC-S-resnext": (RESNEXT, "14tZeOtK1Jd64ioxPwzwf2jblriN7Jgue"),
    "TC-A-resnext": (RESNEXT, "1aQuWfb4O0xL0PALRJpYIUHk0tsyrujDF"),
    "TC-Y-resnext": (RESNEXT, "1sB12pdnVEZsgVKiVdZyS0l4x24_T5zCj"),
    "TC-SAY-resnext-IN-linear": (RESNEXT, "1Qo0_1RwgOsr-JM3lP4ILWRY0WflnS7On"),
    "TC-SAY-resnext-IN-1pt-linear": (RESNEXT, "1lvCG3L1_-gdqWDMD41yTIbuNBpzpUOQq"),
    "TC-S-mobilenet": (MOBILENET, "1DVJjpaGhoBPNmlO7jXpwEX3lSCk2ZUCa"),
    "TC-A-mobilenet": (MOBILENET, "1uQvJBbuy6P0uCW0HYs1wNgawRU8sGLhC"),
    "TC-Y-mobilenet": (MOBILENET, "1TTndiiiqSiCMdZjwYZPKQySZot4ipCrG"),
    "TC-SAY-mobilenet": (MOBILENET, "1zeidpBaXqqWCeeYj-fMI7V7x9EiAGH6Q"),
}
_SHORT = {f"TC-{child}": f"TC-{child}-resnext" for child in ("S", "A", "Y", "SAY")}  # names in the published script
_MOCO = ("moco_img_0011", "moco_temp_0011")  # in the published script, never released

_ARCHS = {
    "resnext50": RESNEXT,
    "vits16": "vit_s_16",
    "vitb16": "vit_b_16",
    "vitl16": "vit_l_16",
    "vitb14": "vit_b_14",
}
_HUGGING_FACE = [  # silicon-menagerie, METHOD_DATA_ARCHITECTURE
    *(f"dino_{data}_{arch}" for arch in _ARCHS for data in ("say", "s", "a", "y")),
    "dino_sfp_resnext50",
    *(f"dino_imagenet{percent}_vitb14" for percent in (100, 10, 3, 1)),
    *(f"{method}_{data}_{arch}" for method in ("mugs", "mae") for arch in ("vits16", "vitb16", "vitl16")
      for data in ("say", "s", "a", "y")),
]  # fmt: skip

NAMES = ("random", "imagenet", *_SHORT, *_MOCO, *_DRIVE, *_HUGGING_FACE)


def locate(name, folder="."):
    """(source, architecture) of a published name, for checkpoint.open_model.

    source: 'random', 'imagenet', or the path of the file NAME.tar, .pth, .pth.tar or .safetensors in folder.
    architecture: None for 'random' and 'imagenet'. UserError with the source of a missing file.
    """
    if name in ("random", "imagenet"):
        return name, None
    folders = [Path(folder)] + ([Path("../self_supervised_models")] if name in _MOCO else [])  # as published
    stems = [name, _SHORT[name]] if name in _SHORT else [name]
    paths = [parent / f"{stem}{ending}" for parent in folders for stem in stems for ending in ENDINGS]
    for path in paths:
        if path.is_file():
            return path, _arch(name)
    raise UserError(f"{name}: there is no {paths[0]} (or {', '.join(ENDINGS[1:])}); {_instructions(name, folder)}")


def stem(path):
    """The file name of a checkpoint without its ending, which names it in results."""
    name = Path(path).name
    endings = sorted((ending for ending in ENDINGS if name.endswith(ending)), key=len)
    return name.removesuffix(endings[-1]) if endings else name


def _arch(name):
    if name in _MOCO:
        return MOBILENET
    if name in _HUGGING_FACE:
        return _ARCHS[name.rpartition("_")[2]]
    return _DRIVE[_SHORT.get(name, name)][0]


def _instructions(name, folder):
    """Where to get the file of a published network, in one line."""
    if name in _MOCO:
        return f"it was not released: train it with {name.rpartition('_')[0]}.py"
    if name in _HUGGING_FACE:
        return f"download it with: hf download eminorhan/{name} {name}.pth --local-dir {folder}"
    stem = _SHORT.get(name, name)
    return f"download {stem} from https://drive.google.com/file/d/{_DRIVE[stem][1]}/view?usp=sharing"

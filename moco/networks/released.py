"""The published networks by name: their files, and where to get them. Nothing is downloaded."""

import re
from difflib import get_close_matches
from pathlib import Path

from moco.cli import UserError

ENDINGS = (".tar", ".pth", ".pth.tar", ".safetensors")

_DRIVE = {  # file stem -> id on Google Drive: Orhan, Gupta & Lake (2020)
    "TC-SAY-resnext": "1I-HvIeuupsE88yS6eff_nE6pHpEmTVPG",
    "TC-S-resnext": "14tZeOtK1Jd64ioxPwzwf2jblriN7Jgue",
    "TC-A-resnext": "1aQuWfb4O0xL0PALRJpYIUHk0tsyrujDF",
    "TC-Y-resnext": "1sB12pdnVEZsgVKiVdZyS0l4x24_T5zCj",
    "TC-SAY-resnext-IN-linear": "1Qo0_1RwgOsr-JM3lP4ILWRY0WflnS7On",
    "TC-SAY-resnext-IN-1pt-linear": "1lvCG3L1_-gdqWDMD41yTIbuNBpzpUOQq",
    "TC-S-mobilenet": "1DVJjpaGhoBPNmlO7jXpwEX3lSCk2ZUCa",
    "TC-A-mobilenet": "1uQvJBbuy6P0uCW0HYs1wNgawRU8sGLhC",
    "TC-Y-mobilenet": "1TTndiiiqSiCMdZjwYZPKQySZot4ipCrG",
    "TC-SAY-mobilenet": "1zeidpBaXqqWCeeYj-fMI7V7x9EiAGH6Q",
}
_SIZES = ("small", "base", "large", "giant")
_SHORT = {f"TC-{child}": f"TC-{child}-resnext" for child in ("S", "A", "Y", "SAY")}  # names in the published script
_SILICON_MENAGERIE = [  # METHOD_DATA_ARCHITECTURE, on Hugging Face
    *(f"dino_{data}_{arch}" for arch in ("resnext50", "vitb14") for data in ("say", "s", "a", "y")),
    "dino_sfp_resnext50",
    *(f"dino_imagenet{percent}_vitb14" for percent in (100, 10, 3, 1)),
    *(f"{method}_{data}_{arch}" for method in ("dino", "mugs", "mae") for arch in ("vits16", "vitb16", "vitl16")
      for data in ("say", "s", "a", "y")),
]  # fmt: skip
_FOLDERS = {  # networks of others -> their folders on Hugging Face
    **{f"dinov2_vit{size[0]}14": f"facebook/dinov2-{size}" for size in _SIZES},
    **{f"dinov2_vit{size[0]}14_reg": f"facebook/dinov2-with-registers-{size}" for size in _SIZES},
    **{f"dinov3_{arch}": f"facebook/dinov3-{arch}-pretrain-lvd1689m"
       for arch in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus")},
    **{f"clip_vit{arch}": f"openai/clip-vit-{size}" for arch, size in
       (("b32", "base-patch32"), ("b16", "base-patch16"), ("l14", "large-patch14"))},
}  # fmt: skip
NAMES = ("random", "imagenet", *_SHORT, *_DRIVE, *_SILICON_MENAGERIE, *_FOLDERS)


def name(text):
    """text, if it is a published name (an argparse type); UserError with similar ones otherwise."""
    if text not in NAMES and not _is_moco(text):
        similar = get_close_matches(text, NAMES, 3, 0.4) or NAMES[2:5]
        raise UserError(f"--model-name {text} is not published; did you mean {', '.join(similar)}? "
                        "Give other checkpoints with --model-path")  # fmt: skip
    return text


def locate(name, folder="."):
    """The source of a published name, for opening.open_model: 'random', 'imagenet', or a path in folder.

    The path is that of the file NAME.tar, .pth, .pth.tar or .safetensors, or of the folder NAME. UserError that says
    where to get a missing one.
    """
    if name in ("random", "imagenet"):
        return name
    folders = [Path(folder)] + ([Path("../self_supervised_models")] if _is_moco(name) else [])  # as published
    stems = dict.fromkeys([name, _SHORT.get(name, name)])
    endings = ("",) if name in _FOLDERS else ENDINGS
    paths = [parent / f"{stem}{ending}" for parent in folders for stem in stems for ending in endings]
    for path in paths:
        if path.exists():
            return path
    others = f" (or {', '.join(endings[1:])})" if endings[1:] else ""
    raise UserError(f"{name}: there is no {paths[0]}{others}; {_instructions(name, folder)}")


def _is_moco(name):
    """Whether name is that of a checkpoint of MoCo, which the published script reads but which were not released."""
    return re.fullmatch(r"moco_(img|temp)_\d{4}", name)


def _instructions(name, folder):
    """Where to get the file of a published network, in one line."""
    if _is_moco(name):
        return f"it was not released: train it with {name.rpartition('_')[0]}.py"
    if name in _SILICON_MENAGERIE:
        return f"download it with: hf download eminorhan/{name} {name}.pth --local-dir {folder}"
    if name in _FOLDERS:
        return f"download it with: hf download {_FOLDERS[name]} --local-dir {Path(folder) / name}"
    stem = _SHORT.get(name, name)
    return f"download {stem} from https://drive.google.com/file/d/{_DRIVE[stem]}/view?usp=sharing"


def stem(path):
    """The file name of a checkpoint without its ending, which names it in results."""
    file_name = Path(path).name
    endings = [ending for ending in ENDINGS if file_name.endswith(ending)]
    return file_name.removesuffix(max(endings, key=len, default=""))

"""Export embeddings of images from networks, with what is known of each image, for analyses elsewhere.

    python scripts/embeddings.py stimuli --model-path TC-S.tar dino.pth random --layer 1 6 --save-dir embeddings

Input: a frame folder, a folder with one folder of images per class, a flat folder, or a table of files; and models.
Output, in --save-dir: for each model and layer MODEL_layer_L.npy, (images, features), a row of which is a row of
images.csv: file, class and, where a manifest has them, recording, frame number, second, child, date and age;
embeddings.json, with models and layers. A corrupt image has a row of NaN. On request, dissimilarity matrices, t-SNE and
nearest neighbors, with figures. Re-run the command to resume.
"""

import csv
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, distributed, files, plots  # noqa: E402
from moco.analysis import embeddings, features, similarity  # noqa: E402
from moco.cli import UserError  # noqa: E402
from moco.data import augment, loader, manifest  # noqa: E402
from moco.data.folders import FrameFolder  # noqa: E402
from moco.networks import architectures, layers, opening, released  # noqa: E402

ROWS, COLUMNS = 12, 10  # of images in the figure of nearest neighbors
ADAPT = 1024  # images that the batch-norm statistics of random weights are adapted to
TRANSFORM = "RGB; minor edge resized to image_size unless the image has this size; center crop; (x / 255 - mean) / std"
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("data", nargs="?", help="folder of images: frames, class folders, or a flat folder")
    add("--list", metavar="CSV", help="in place of a folder, a table whose column 'file' has paths relative to it")
    add("--model-path", nargs="+", required=True, metavar="PATH", help="checkpoints, 'random' or 'imagenet'")
    add("--model", type=architectures.arch_name, metavar="ARCH", help="architecture, if not stored in the checkpoint")
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )
    add(
        "--layer",
        type=layers.layer,
        nargs="+",
        default=[layers.PENULTIMATE],
        metavar="L",
        help="layers: 'penultimate', the input of the head; numbers from the end, as in selectivities.py; or names of "
        "modules, such as layer3.2.relu",
    )
    add("--dtype", choices=["float32", "float16"], default="float32", help="data type of the files")
    add("--every", type=cli.number(int, 1), default=1, metavar="N", help="use every N-th image in time")
    add("--shard", type=cli.shard, metavar="I/N", help="compute part I of N only, I from 0 to N - 1")
    add("--rdm", choices=similarity.METRICS, help="also the dissimilarity matrix of all images, by this distance")
    add("--tsne", action="store_true", help="also a t-SNE of the first 50 principal components")
    add("--color-by", default="class", metavar="COLUMN", help="column of images.csv that colors the t-SNE")
    add("--nearest", type=cli.number(int, 1), metavar="K", help="also the K nearest images of each, by cosine")
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


@dataclass
class Export:
    """The embeddings of one model: the model, the files and the widths of its layers, and the folder of its parts.

    record: its entry in embeddings.json.
    """

    name: str
    model: torch.nn.Module
    record: dict
    widths: list
    paths: dict
    parts: Path = None


def model_names(sources):
    """A different name for each model: its file name, with that of its folder where several are equal."""
    names = [released.stem(source) for source in sources]
    names = [
        f"{Path(source).absolute().parent.name}_{name}" if names.count(name) > 1 else name
        for source, name in zip(sources, names, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError(f"--model-path: models have equal names ({', '.join(names)}); rename their files")
    return names


def open_exports(args, save_dir):
    """An Export for each model; prints what each of them is."""
    chosen, exports = list(dict.fromkeys(args.layer)), []
    for name, source in zip(model_names(args.model_path), args.model_path, strict=True):
        opened = opening.open_model(source, args.model, None, args.seed, key=args.checkpoint_key)
        print(f"{name}: {opened.description}")
        architectures.check_image_size(opened.network, args.image_size)
        record = {"source": source, "arch": opened.arch, "sha256": opened.sha256}
        record["seed"] = args.seed if source == "random" else None
        record["batch_norm"] = f"adapted to {ADAPT} images or fewer" if source == "random" else "as stored"
        record["layers"] = {str(layer): layers.layer_name(opened.network, layer) for layer in chosen}
        widths = layers.widths(opened.network.eval(), record["layers"].values(), args.image_size)
        paths = {layer: save_dir / f"{name}_layer_{layer}.npy" for layer in chosen}
        exports.append(Export(name, opened.network, record, widths, paths))
    return exports


def write_table(path, rows):
    """Write rows to the CSV file at path."""
    with open(path, "w", **TEXT) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_column(path, column):
    """The cells of a column of the CSV file at path."""
    with open(path, **TEXT) as file:
        return [row[column] for row in csv.DictReader(file)]


def begin(args, exports, rows, save_dir):
    """Write rows to images.csv; returns the settings of the export, and whether embeddings.json has its result already.

    UserError if the results of other settings are there, without --overwrite.
    """
    settings = {
        "images": args.list or args.data,
        "models": {export.name: export.record for export in exports},
        "image_size": args.image_size,
        "transform": {"steps": TRANSFORM, "mean": list(loader.MEAN), "std": list(loader.STD)},
        "dtype": args.dtype,
    }
    summary = save_dir / "embeddings.json"
    with files.atomic_write(save_dir / "images.csv") as part:  # renamed only if the export may go there
        write_table(part, rows)
        settings["images_csv_sha256"] = files.sha256(part)
        if summary.exists() and not args.overwrite:
            if files.read_json(summary)["settings"] == settings:
                return settings, True
            files.refuse_overwrite(summary, overwrite=False)
        summary.unlink(missing_ok=True)
    return settings, False


def compute(exports, data, images, folder, shard):
    """Write the parts of all models to a folder each; returns whether those of all shards are there.

    The batch-norm statistics of random weights are adapted first, to images evenly spread over all.
    """
    missing = 0
    for export in exports:
        export.parts = files.make_output_dir(folder / export.name)
        model = export.model.to(data.device)
        if export.record["source"] == "random":
            spread = np.unique(np.linspace(0, len(images) - 1, ADAPT).astype(int))
            features.adapt_batch_norm(model, data, images[spread], export.record["seed"], folder)
        model = model.eval().to(memory_format=torch.channels_last)
        network = partial(layers.layer_means, model, list(export.record["layers"].values()))
        embeddings.write_parts(network, export.widths, data, images, export.parts, shard)
        export.model.cpu()
        missing += len(embeddings.missing_parts(export.parts, len(images)))
    if missing:
        print(f"{missing} parts of other shards are missing; the shard that ends last joins all")
    return not missing


def lock_to_join(save_dir):
    """The lock of save_dir for a shard that joins all parts; None if another shard joins or has joined them."""
    try:
        lock = files.lock(save_dir)
    except UserError:
        return None
    return None if (save_dir / "embeddings.json").exists() else lock


def join(args, exports, frames, images, settings, save_dir):
    """Join the parts to the files of the layers, and write embeddings.json."""
    unreadable = set()
    for export in exports:
        paths = list(export.paths.values())
        unreadable |= set(embeddings.join_parts(export.parts, paths, export.widths, args.dtype).tolist())
    names = [frames.name(images[row]) for row in sorted(unreadable)]
    if names:
        print(f"{len(names)} images cannot be read and have rows of NaN: {', '.join(names[:5])}")
    versions = cli.versions()
    record = {"settings": settings, "number": len(images), "unreadable": names, "versions": versions}
    files.write_json(save_dir / "embeddings.json", record)
    shutil.rmtree(exports[0].parts.parent)


def analyze(args, export, frames, images, table):
    """What --rdm, --tsne and --nearest ask for, for each layer of a model. table: path of images.csv."""
    for layer, path in export.paths.items():
        rows, stem, title = np.load(path, mmap_mode="r"), path.with_suffix(""), f"{export.name}, layer {layer}"
        if args.rdm:
            matrix = similarity.dissimilarity(rows, args.rdm)
            with files.atomic_write(f"{stem}_rdm_{args.rdm}.npy") as part:
                np.save(part, matrix)
            labels = np.array([frames.label(i) for i in images])
            plots.dissimilarity(matrix, labels, frames.classes, f"{stem}_rdm_{args.rdm}", f"{title}: {args.rdm}")
        if args.tsne:
            points, values = similarity.tsne(rows, args.seed), read_column(table, args.color_by)
            lines = zip(read_column(table, "file"), *points.T, values, strict=True)
            with files.atomic_write(f"{stem}_tsne.csv") as part:
                write_table(part, [("file", "x", "y", args.color_by), *lines])
            plots.scatter(points, values, f"{stem}_tsne", title, args.color_by)
        if args.nearest:
            save_nearest(rows, args.nearest, frames, images, stem)


def save_nearest(rows, k, frames, images, stem):
    """Write the k nearest images of each, and a figure of those of a dozen images, to stem + '_nearest'."""
    numbers, similarities = similarity.nearest(rows, k)
    lines = (
        (frames.name(images[row]), rank, frames.name(images[number]), f"{cosine:.6f}")
        for row in np.flatnonzero(numbers[:, 0] >= 0)
        for rank, (number, cosine) in enumerate(zip(numbers[row], similarities[row], strict=True), 1)
    )
    with files.atomic_write(f"{stem}_nearest.csv") as part:
        write_table(part, chain([("file", "rank", "neighbor", "cosine")], lines))
    known = np.flatnonzero(numbers[:, 0] >= 0)
    examples = []
    for row in known[np.unique(np.linspace(0, len(known) - 1, ROWS).astype(int))]:
        shown = [augment.decode(frames.read(images[each])) for each in (row, *numbers[row, :COLUMNS])]
        caption = plots.drawable([frames.classes[frames.label(images[row])], Path(frames.name(images[row])).name])
        examples.append((caption, [augment.resize_center_crop(image, 160) for image in shown]))
    plots.image_rows(examples, f"{stem}_nearest")


def main(argv=None):
    args = parse_args(argv)
    if bool(args.data) == bool(args.list):
        raise UserError("give a folder of images, or --list with a table of files")
    if args.shard and args.overwrite:
        raise UserError("--overwrite would discard the work of other shards; give another --save-dir, or no --shard")
    frames = embeddings.ImageList(args.list) if args.list else FrameFolder(args.data)
    plan = None if args.list else manifest.load(args.data)
    images = embeddings.every_nth(frames, plan, args.every) if args.every > 1 else np.arange(len(frames))
    if args.rdm:
        similarity.check_rdm_size(len(images))
    rows = embeddings.table(frames, plan, images)
    columns = next(rows)
    if args.tsne and args.color_by not in columns:
        raise UserError(f"--color-by {args.color_by}: images.csv has the columns {', '.join(columns)}")
    save_dir = files.make_output_dir(args.save_dir, [args.data] if args.data else [])
    lock = None if args.shard else files.lock(save_dir)
    exports = open_exports(args, save_dir)
    data = features.EvalData(frames, args.image_size, distributed.select_device(args.device), args.workers)
    settings, is_done = begin(args, exports, chain([columns], rows), save_dir)
    if is_done and args.shard:
        return
    if not is_done:
        checkpoints = {
            export.record["source"]: export.record["sha256"] for export in exports if export.record["sha256"]
        }
        files.write_args(save_dir, cli.flags(args), checkpoints)
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        if not compute(exports, data, images, save_dir / f"parts-{key}", args.shard or (0, 1)):
            return
        lock = lock or lock_to_join(save_dir)
        if lock is None:
            print("another shard joins the parts")
            return
        join(args, exports, frames, images, settings, save_dir)
    for export in exports:
        analyze(args, export, frames, images, save_dir / "images.csv")
    print(f"embeddings of {len(images)} images: {save_dir}")
    lock.close()


if __name__ == "__main__":
    cli.run(main)

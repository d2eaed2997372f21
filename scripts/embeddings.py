"""Export embeddings of images from networks, with what is known of each image, for analyses elsewhere.

    python scripts/embeddings.py stimuli --model-path TC-S.tar dino.pth random --layer 1 6 --save-dir embeddings

Input: a frame folder, a folder with one folder of images per class, a flat folder, or a table of files; and models.
Output, in --save-dir: for each model and layer MODEL_layer_L.npy, (images, features), a row of which is a row of
images.csv: file, class and, where a manifest has them, recording, video, frame, second, child, date and age;
embeddings.json, with models and layers. A corrupt image has a row of NaN, and is tried again by the next run. On
request, with figures: means of groups of images, MODEL_layer_L_groups.npy, a row of which is a row of groups.csv;
dissimilarity matrices, and their correlations, rdm_correlations.csv; t-SNE. Re-run the command to resume. With --shard
I/N these files are in the folder shard_I_of_N of --save-dir; concatenate the arrays of all shards, and their tables, in
the order of I.
"""

import glob
import sys
from itertools import chain, combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from moco import cli, distributed, files, plots  # noqa: E402
from moco.analysis import embeddings, features, units  # noqa: E402
from moco.cli import UserError  # noqa: E402
from moco.data.folders import FrameFolder  # noqa: E402
from moco.networks import layers, opening, released  # noqa: E402

ADAPT = 1024  # images that the batch-norm statistics of random weights are adapted to
TRANSFORM = "RGB; minor edge resized to image_size unless the image has this size; center crop; (x / 255 - mean) / std"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("data", nargs="?", help="folder of images: frames, class folders, or a flat folder")
    help_text = "in place of a folder, a table whose column 'file' has paths relative to it"
    images.add_argument("--list", metavar="CSV", help=help_text)
    add("--model-path", nargs="+", required=True, metavar="PATH", help="checkpoints, 'random' or 'imagenet'")
    opening.add_flags(parser)
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
    add("--shard", type=cli.shard, metavar="I/N", help="part I of N of the images, into a folder of its own")
    add(
        "--group-by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="also the mean embedding of each group of images, by columns of images.csv: class child age_months, which "
        "counts in whole months, or any numbers in ranges: age_months:6-12,12-18. --rdm and --tsne are then of groups",
    )
    add("--rdm", choices=embeddings.METRICS, help="also the dissimilarity matrices of all images, by this distance")
    add(
        "--rdm-with",
        nargs="+",
        default=[],
        metavar="NPY",
        help="also compare them with these matrices, of the same images or groups in the order of their table",
    )
    add("--tsne", action="store_true", help="also a t-SNE of the first 50 principal components")
    add("--color-by", default="class", metavar="COLUMN", help="column of images.csv that colors the t-SNE")
    cli.shared_flags(parser, "--image-size", "--workers", "--save-dir", "--seed", "--device", "--overwrite")
    return parser.parse_args(argv)


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


def open_networks(args):
    """{name: OpenedModel} and {name: its entry in embeddings.json} of all models; prints what each of them is."""
    networks, records = {}, {}
    for name, source in zip(model_names(args.model_path), args.model_path, strict=True):
        opened = opening.open_model(
            source, args.model, None, args.seed, key=args.checkpoint_key, image_size=args.image_size
        )
        print(f"{name}: {opened.description}")
        networks[name] = opened
        records[name] = {
            "source": source,
            "arch": opened.arch,
            "sha256": opened.sha256,
            "seed": args.seed if source == "random" else None,
            "batch_norm": f"adapted to {ADAPT} images or fewer" if source == "random" else "as stored",
            "layers": {str(layer): layers.layer_name(opened.network, layer) for layer in args.layer},
        }
    return networks, records


def by_name(values):
    """The value of all models if it is the same for all, else values, {name of the model: value}."""
    first, *others = values.values()
    return values if any(other != first for other in others) else first


def begin(args, networks, records, rows, save_dir):
    """Write rows to images.csv, and to embeddings.json the settings of the export; returns what embeddings.json holds.

    UserError if the results of other settings are there, without --overwrite.
    """
    settings = {
        "images": args.list or args.data,
        "models": records,
        "image_size": by_name({name: opened.image_size for name, opened in networks.items()}),
        "transform": {
            "steps": TRANSFORM,
            "mean": by_name({name: list(opened.mean) for name, opened in networks.items()}),
            "std": by_name({name: list(opened.std) for name, opened in networks.items()}),
        },
        "dtype": args.dtype,
    }
    summary = save_dir / "embeddings.json"
    with files.atomic_write(save_dir / "images.csv") as part:  # renamed only if the export may go there
        files.write_table(part, rows)
        settings["images_csv_sha256"] = files.sha256(part)
        if summary.exists() and not args.overwrite:
            record = files.read_json(summary)
            if record["settings"] == settings:
                return record
        arrays = [array_path(save_dir, name, layer) for name in records for layer in records[name]["layers"]]
        for path in (summary, *arrays):
            files.refuse_overwrite(path, args.overwrite)
        for path in arrays:
            path.unlink(missing_ok=True)
        remove_derived(arrays if args.overwrite else ())
        files.write_json(summary, {"settings": settings})
    return {"settings": settings}


def array_path(save_dir, name, layer):
    """The file of a layer of the model called name."""
    return save_dir / f"{name}_layer_{layer}.npy"


def remove_derived(paths):
    """Remove figures, tables and matrices made of the arrays that were at paths, of other images, groups or weights."""
    for path in paths:
        for derived in path.parent.glob(f"{glob.escape(path.stem)}_*"):
            derived.unlink()


def compute(args, networks, records, frames, images, spread, save_dir):
    """Write the embeddings of some images (indices); returns the names of those that cannot be read.

    The batch-norm statistics of random weights are adapted first, to the images spread (indices).
    """
    device, is_unreadable = distributed.select_device(args.device), np.zeros(len(images), bool)
    for name, opened in networks.items():
        network, size = opened.network.to(device), opened.image_size
        if records[name]["source"] == "random":
            features.adapt_batch_norm(network, frames, spread, args.seed, size, args.workers)
        of_layer = records[name]["layers"]
        paths = [array_path(save_dir, name, layer) for layer in of_layer]
        rows = features.write_features(
            network, list(of_layer.values()), paths, frames, images, size, args.workers, args.dtype
        )
        is_unreadable |= np.isnan(rows[0][:, 0])
        network.cpu()
    return [frames.name(i) for i in images[is_unreadable]]


def average_groups(paths, columns, groups, labels, save_dir):
    """Write groups.csv and the mean embedding of each group; returns the paths of the means by title.

    paths: {title: file of embeddings}. groups, labels: by columns, see embeddings.group_images().
    """
    images = np.bincount(labels, minlength=len(groups) + 1)
    means_paths = {title: path.with_name(f"{path.stem}_groups.npy") for title, path in paths.items()}
    for title, path in paths.items():
        means, counts = units.class_means(files.load_array(path), labels, len(groups) + 1)
        with files.atomic_write(means_paths[title]) as part:
            np.save(part, means[:-1].astype(np.float32))
    lines = [[*group, n, size - n] for group, n, size in zip(groups, counts, images, strict=False)]
    table_path = save_dir / "groups.csv"
    before = table_path.read_bytes() if table_path.exists() else b""
    files.write_table(table_path, [[*columns, "images", "left_out"], *lines])
    if before != table_path.read_bytes():
        remove_derived(means_paths.values())
    print(f"{len(groups)} groups of {counts[:-1].min()} to {counts[:-1].max()} images: {table_path}")
    if images[-1]:
        print(f"note: {images[-1]} images are in no range of --group-by, and in no group")
    return means_paths


def compare_dissimilarities(args, paths, others, labels, classes):
    """Write and draw the dissimilarity matrices of embeddings and, if there are several, their correlations.

    paths: {title: file of embeddings}. others: {title: matrix} of --rdm-with. labels, classes: of the items.
    """
    matrices = {}
    for title, path in paths.items():
        matrices[title] = embeddings.dissimilarity(files.load_array(path), args.rdm)
        with files.atomic_write(path.with_name(f"{path.stem}_rdm_{args.rdm}.npy")) as part:
            np.save(part, matrices[title])
    highest = max(np.nanmax(matrix, initial=0) for matrix in matrices.values())
    for title, path in paths.items():
        if np.isnan(matrices[title]).all():
            print(f"note: {title}: no embedding varies, so that {args.rdm} is not defined; no figure")
            continue
        figure, scale = path.with_name(f"{path.stem}_rdm_{args.rdm}"), (embeddings.METRICS[args.rdm], highest)
        plots.dissimilarity(matrices[title], labels, classes, figure, f"{title}: dissimilarity", scale)
    matrices |= others
    if len(matrices) > 1:
        correlate(matrices, args.seed, Path(args.save_dir))


def correlate(matrices, seed, save_dir):
    """Print, write and draw the correlations of all pairs of matrices, {title: (N, N)}."""
    titles = list(matrices)
    rho, intervals = np.eye(len(titles)), np.full((len(titles), len(titles), 2), np.nan)
    lines = [("first", "second", "spearman", "low", "high", "pairs")]
    for i, k in combinations(range(len(titles)), 2):
        value, low, high, pairs = embeddings.compare(matrices[titles[i]], matrices[titles[k]], seed)
        rho[i, k] = rho[k, i] = value
        intervals[i, k] = intervals[k, i] = low, high
        lines.append((titles[i], titles[k], value, low, high, pairs))
        interval = "" if np.isnan(low) else f", 95 % interval {low:.3f} to {high:.3f}"
        print(f"{titles[i]} and {titles[k]}: Spearman's rho {value:.3f}{interval}, {pairs} pairs", flush=True)
    files.write_table(save_dir / "rdm_correlations.csv", lines)
    title = "correlations of dissimilarities, with 95 % intervals over items"
    plots.correlations(rho, intervals, titles, save_dir / "rdm_correlations", title)


def draw_tsne(args, title, path, columns, rows, labels=()):
    """Write and draw the t-SNE of the embeddings at path, or print why there is none.

    columns, rows: what is written beside the coordinates, the last column colors the figure. labels: beside the points.
    """
    try:
        points, perplexity = embeddings.tsne(files.load_array(path), args.seed)
    except UserError as error:
        print(f"note: no t-SNE of {title}: {error}")
        return
    stem = path.with_name(f"{path.stem}_tsne")
    lines = ([*row[:-1], *point, row[-1]] for row, point in zip(rows, points, strict=True))
    files.write_table(f"{stem}.csv", [(*columns[:-1], "x", "y", columns[-1]), *lines])
    title = f"{title}: t-SNE, perplexity {perplexity:.3g}"
    plots.scatter(points, [row[-1] for row in rows], stem, title, columns[-1], labels)


def analyze(args, paths, grouped, others, frames, images, save_dir):
    """What --group-by, --rdm and --tsne ask for, of the embeddings of some images; paths: {title: their file}.

    grouped, others: as check_analyses() returns them.
    """
    if args.group_by:
        groups, labels = grouped
        columns = [name.partition(":")[0] for name in args.group_by]
        paths = average_groups(paths, columns, groups, labels, save_dir)
        labels, classes = np.arange(len(groups)), [", ".join(group) for group in groups]
        last = columns.index(args.color_by) if args.color_by in columns else 0
        columns, *rows = ([*row[:last], *row[last + 1 :], row[last]] for row in (columns, *groups))
        beside = [", ".join(row[:-1] or row) for row in rows]
    else:
        labels, classes, beside = np.array([frames.label(i) for i in images]), frames.classes, ()
        names, *rows = embeddings.table(frames, images)
        columns, color = ("file", args.color_by), names.index(args.color_by)
        rows = [(row[0], "" if row[color] is None else str(row[color])) for row in rows]
    if args.rdm:
        compare_dissimilarities(args, paths, others, labels, classes)
    if args.tsne:
        for title, path in paths.items():
            draw_tsne(args, title, path, columns, rows, beside)


def check_analyses(args, frames, images, columns):
    """(what embeddings.group_images() returns, or None; the matrices {title: (N, N)} of --rdm-with).

    UserError for what the flags of the analyses cannot have.
    """
    if args.shard and (args.rdm or args.tsne or args.group_by):
        raise UserError("--rdm, --tsne and --group-by compare all images; give them without --shard")
    if args.rdm_with and not args.rdm:
        raise UserError("--rdm-with compares with the matrices of --rdm; give it, too")
    if args.color_by not in columns:
        raise UserError(f"--color-by {args.color_by}: images.csv has the columns {', '.join(columns)}")
    grouped, n = None, len(images)
    if args.group_by:
        grouped = embeddings.group_images(embeddings.table(frames, images), args.group_by)
        n = len(grouped[0])
        if not n:
            raise UserError("--group-by: no image is in any of these ranges")
    if args.rdm and n > embeddings.RDM_ITEMS:
        raise UserError(
            f"--rdm: the matrix of {n} {'groups' if args.group_by else 'images'} would have {4 * n * n / 1e9:.1f} GB; "
            f"at most {embeddings.RDM_ITEMS} are compared, choose fewer with --every or --group-by"
        )
    names = [Path(path).stem for path in args.rdm_with]
    titles = [name if names.count(name) == 1 else path for name, path in zip(names, args.rdm_with, strict=True)]
    return grouped, {title: embeddings.read_matrix(path, n) for title, path in zip(titles, args.rdm_with, strict=True)}


def main(argv=None):
    args = parse_args(argv)
    frames = embeddings.ImageList(args.list) if args.list else FrameFolder(args.data)
    images = embeddings.every_nth(frames, args.every)
    spread = images[np.unique(np.linspace(0, len(images) - 1, ADAPT).astype(int))]  # evenly, over all shards
    save_dir = Path(args.save_dir)
    if args.shard:
        images = embeddings.shard(images, *args.shard)
        save_dir /= "shard_{:0{digits}}_of_{}".format(*args.shard, digits=len(str(args.shard[1] - 1)))
        if not len(images):
            print(f"there are no images for {save_dir.name}")
            return
    rows = embeddings.table(frames, images)
    columns = next(rows)
    grouped, others = check_analyses(args, frames, images, columns)
    files.make_output_dir(save_dir, [args.data] if args.data else [])
    with files.lock(save_dir):
        networks, records = open_networks(args)
        record = begin(args, networks, records, chain([columns], rows), save_dir)
        checkpoints = {path: sha256 for opened in networks.values() for path, sha256 in opened.checkpoints.items()}
        args.networks = {name: opened.description for name, opened in networks.items()}
        files.write_args(save_dir, cli.flags(args), checkpoints)
        paths = {
            f"{name}, {layers.title(layer)}": array_path(save_dir, name, layer)
            for name in networks for layer in records[name]["layers"]
        }  # fmt: skip
        if record.get("unreadable") != [] or any(
            features.open_rows(path, len(images)) is None for path in paths.values()
        ):
            names = compute(args, networks, records, frames, images, spread, save_dir)
            if names:
                print(f"{len(names)} images cannot be read and have rows of NaN: {', '.join(names[:5])}")
            record |= {"number": len(images), "unreadable": names, "versions": cli.versions()}
            files.write_json(save_dir / "embeddings.json", record)
        if args.group_by or args.rdm or args.tsne:
            analyze(args, paths, grouped, others, frames, images, save_dir)
    print(f"embeddings of {len(images)} images: {save_dir}")


if __name__ == "__main__":
    cli.run(main)

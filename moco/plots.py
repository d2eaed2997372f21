"""Every figure but those of images: curves, bars, matrices, points. Each is written as a PDF and a PNG."""

import functools
import itertools
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from moco import files

# Okabe and Ito's palette, distinguishable by color-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "text.parse_math": False,  # class names may contain $, _ and ^
    "image.composite_image": False,  # joining n images into one takes time n^2
}
MAX_INCHES = 190  # a PDF reader shows pages of up to 200 inches
MAX_PIXELS = 6000  # per side of a PNG
MAX_LABELS = 55  # on an axis of a confusion matrix, which then is 16 inches long
MAX_CELLS = 1200  # per side of a dissimilarity matrix
MAX_GROUPS = 40  # in the legend of a scatter plot
LABEL_LENGTH = 40  # characters of a name in a figure of numbers ...
CAPTION_LENGTH = 19  # ... and below or beside an image
# Matplotlib takes each character from the first of these that has it. The first two come with it.
FONTS = ("DejaVu Sans", "STIXGeneral", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei")
FONTS += ("Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Noto Sans Devanagari")


@functools.cache
def _fonts():
    """The installed ones of FONTS, and the code points that they have."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    found = {}
    for family in FONTS:
        with suppress(ValueError, OSError, RuntimeError):  # it is not installed, or not what Matplotlib's list says
            found[family] = FT2Font(font_manager.findfont(family, fallback_to_default=False)).get_charmap()
    return list(found), frozenset().union(*found.values())


def legible(text):
    """text with codes such as \\u732b in place of the characters that no font of the figures has."""
    _, characters = _fonts()
    return "".join(c if ord(c) in characters else c.encode("unicode_escape").decode() for c in text)


def drawable(names, length=LABEL_LENGTH):
    """names as figures show them: legible, and shortened in the middle to length."""
    names = map(legible, names)
    return [n if len(n) <= length else f"{n[: length - length // 4 - 3]}...{n[-(length // 4) :]}" for n in names]


def jet():
    """The colors of the color map jet, float32 (256, 3), from 0 to 1."""
    import matplotlib

    return matplotlib.colormaps["jet"](np.arange(256))[:, :3].astype(np.float32)


@contextmanager
def _figure(path, width, height, layout="constrained"):
    """A Figure of width x height inches, written to path as .pdf and .png at the end, atomically.

    It has a largest size: a page of MAX_INCHES, a PNG of MAX_PIXELS. layout: Matplotlib's layout engine.
    """
    import matplotlib  # it takes half a second, which --help does not need
    from matplotlib.figure import Figure

    path = Path(path)
    scale = min(1, MAX_INCHES / max(width, height))
    width, height = scale * width, scale * height
    with matplotlib.rc_context({**STYLE, "font.family": _fonts()[0]}):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        for ending, dpi, metadata in (
            (".pdf", 150, {"CreationDate": None}),
            (".png", min(150, MAX_PIXELS / max(width, height)), None),
        ):
            with files.atomic_write(path.with_name(path.name + ending)) as part:
                figure.savefig(part, dpi=dpi, metadata=metadata)


@contextmanager
def page(path, width, height):
    """The axes of a figure of width x height inches, written to path + '.pdf' and '.png' at the end.

    Their coordinates are inches from the top left corner.
    """
    with _figure(path, width, height, layout="none") as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        yield axes


def _legend_width(labels):
    """The width of a legend beside a figure, in inches."""
    return max(1.4, 0.4 + 0.07 * max(map(len, labels)))


NOT_METRICS = ("epoch", "step", "images", "images_per_second", "waiting", "lr")
METRIC_LABELS = {"loss": "loss", "acc1": "top-1 accuracy (%)", "acc5": "top-5 accuracy (%)"}


def training_curve(records, path, title="", chance=None):
    """The loss and every metric by epoch, a panel each, to path + '.pdf' and '.png'.

    records: one dict per epoch with 'epoch' and, where they are known, 'loss', the metrics of the objective, and
    'val_' + the name of a metric for its value on the test images. chance: {name: what guessing gives}, where known.
    """
    from matplotlib.ticker import MaxNLocator

    names = [name for record in records for name in record if name not in NOT_METRICS]
    names = list(dict.fromkeys(name.removeprefix("val_") for name in names))
    with _figure(path, 3.5 * max(len(names), 1), 2.8) as figure:
        for axes, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names, strict=False):
            for key, color, label in ((name, COLORS[0], "training"), (f"val_{name}", COLORS[1], "test")):
                if known := [(record["epoch"], record[key]) for record in records if record.get(key) is not None]:
                    axes.plot(*np.transpose(known), color=color, label=label, marker="o", markersize=3, clip_on=False)
            axes.set(xlabel="epoch", ylabel=METRIC_LABELS.get(name, name))
            if name in (chance or {}):
                axes.axhline(chance[name], color="0.5", linestyle=":", label=f"chance: {chance[name]:.3g}")
            if name.startswith("acc"):
                axes.set_ylim(0, 100)
            elif name == "loss":
                low, high = axes.get_ylim()
                axes.set_ylim(min(0, low), max(0, 1.05 * high))
            if len(axes.lines) > 1:
                axes.legend(loc="best", fontsize="small")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(axis="y", color="0.9")
        figure.suptitle(title, fontsize="medium")


BASELINES = {"random": COLORS[6], "imagenet": COLORS[7], "HOG": COLORS[5]}  # their colors in every figure
READOUT = re.compile(r"(-normalized|-logistic)?( \(\d+-NN\))?$")  # in the name of a model, see analysis.report


def _styles(models):
    """(number of the pattern, color) of each model by name: a color for a network, a pattern for each of its readouts.

    Networks beyond the number of colors have the next pattern, too.
    """
    networks = list(dict.fromkeys(READOUT.sub("", model, count=1) for model in models))
    free = [color for color in COLORS if color not in BASELINES.values()]
    others = [network for network in networks if network not in BASELINES]
    colors = BASELINES | {network: free[i % len(free)] for i, network in enumerate(others)}
    readouts = list(dict.fromkeys(["", *(READOUT.search(model)[0] for model in models)]))
    styles = []
    for model in models:
        network = READOUT.sub("", model, count=1)
        repeat = others.index(network) // len(free) if network in others else 0
        styles.append((readouts.index(READOUT.search(model)[0]) + repeat, colors[network]))
    return styles


def accuracy_bars(models, path, spread=""):
    """Top-1 accuracy of each model on each task, with lines for majority and chance, to path + '.pdf' and '.png'.

    models: {model: {task: {'mean', 'std' (or None), 'majority', 'chance'}}}, accuracies from 0 to 1. spread: what 'std'
    is, in words.
    """
    tasks = list(dict.fromkeys(task for by_task in models.values() for task in by_task))
    labels, hatches = drawable(models), ("", "///", "...", "xxx", "\\\\\\", "ooo")
    bar_width = 0.84 / len(models)
    width = 0.8 + _legend_width(labels) + len(tasks) * (0.5 + 0.38 * len(models))
    height = max(3.4, 0.18 * (len(models) + 4))
    with _figure(path, width, height) as figure:
        axes = figure.subplots()
        bars, lines, highest = {}, {}, 0
        for number, (by_task, (pattern, color)) in enumerate(zip(models.values(), _styles(models), strict=True)):
            for task, entry in by_task.items():
                x = tasks.index(task) - 0.42 + (number + 0.5) * bar_width
                mean, std = (100 * (entry[key] or 0) for key in ("mean", "std"))
                style = {"hatch": hatches[pattern % len(hatches)], "color": color, "edgecolor": "white", "linewidth": 0}
                bars[number] = axes.bar(x, mean, 0.92 * bar_width, **style)
                if entry["std"] is not None:
                    axes.errorbar(x, mean, std, color="0.25", capsize=2, linewidth=1)
                axes.text(x, mean + std + 1, f"{mean:.1f}", ha="center", fontsize=7)
                highest = max(highest, mean + std, 100 * entry["majority"])
        for position, task in enumerate(tasks):
            baselines = next(by_task[task] for by_task in models.values() if task in by_task)
            for name, style in (("majority", "--"), ("chance", ":")):
                edges, level = (position - 0.46, position + 0.46), 100 * baselines[name]
                (lines[name],) = axes.plot(edges, (level, level), style, color="black", linewidth=1)
        names = [*(labels[number] for number in bars), *lines]
        figure.legend([*bars.values(), *lines.values()], names, loc="outside right upper", fontsize=8)
        axes.set_xticks(range(len(tasks)), drawable(tasks))
        axes.tick_params(axis="x", length=0)
        axes.set(ylim=(0, min(106, 1.1 * highest + 4)), xlim=(-0.6, len(tasks) - 0.4))
        axes.set(ylabel="top-1 accuracy (%)" + f",\nmean ± {spread}" * bool(spread))


def accuracy_by_training_images(curves, path):
    """Top-1 accuracy against the number of training images, a panel per split, to path + '.pdf' and '.png'.

    curves: {split: {model: [(training images, mean, std or None), ...]}}, accuracies from 0 to 1. The spread is drawn
    as a band.
    """
    from matplotlib.ticker import NullLocator

    models = list(dict.fromkeys(model for lines in curves.values() for model in lines))
    labels, titles = drawable(models), drawable(curves)
    style, patterns = dict(zip(models, _styles(models), strict=True)), ("-", "--", ":", "-.")
    with _figure(path, 3.4 * len(curves) + _legend_width(labels), max(3, 0.18 * (len(models) + 2))) as figure:
        drawn = {}
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, lines, title in zip(panels, curves.values(), titles, strict=True):
            for model, points in lines.items():
                images, mean, std = np.array([[n, mean, std or 0] for n, mean, std in points]).T
                pattern, color = style[model]
                line = patterns[pattern % len(patterns)]
                (drawn[model],) = axes.plot(images, 100 * mean, line, color=color, marker="o", markersize=3)
                axes.fill_between(images, 100 * (mean - std), 100 * (mean + std), color=color, alpha=0.15, linewidth=0)
            axes.set(xscale="log", xlabel="training images", ylabel="top-1 accuracy (%)", ylim=(0, 100), title=title)
            ticks = sorted({round(n) for points in lines.values() for n, _, _ in points})
            axes.set_xticks(ticks, [str(n) for n in ticks])  # the default is powers of ten in math mode
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y", color="0.9")
        figure.legend([drawn[model] for model in models], labels, loc="outside right upper", fontsize=8)


def _matrix(figure, matrix, ticks, labels, title, scale, style):
    """The axes of a matrix in colors, of style, with the same labels at ticks of both sides, and its scale named."""
    axes = figure.subplots()
    image = axes.imshow(matrix, **style)
    axes.set_xticks(ticks, labels, rotation=90)
    axes.set_yticks(ticks, labels)
    axes.tick_params(length=0)
    axes.set_title(legible(title))
    figure.colorbar(image, label=scale, shrink=0.7)
    return axes


def confusion_matrix(counts, classes, path, title):
    """Counts (K, K), true classes by row and predicted ones by column, in % of a row, to path + '.pdf' and '.png'.

    Of many classes every n-th is labeled.
    """
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = drawable(classes)
    step = -(-len(classes) // MAX_LABELS)
    ticks = range(0, len(classes), step)
    side = 1.6 + 0.26 * max(len(ticks), 6)
    with _figure(path, side + 0.6, side) as figure:
        style = dict(cmap="cividis", vmin=0, vmax=100)
        axes = _matrix(figure, percent, ticks, labels[::step], title, "% of the images of the true class", style)
        axes.set(xlabel="predicted class", ylabel="true class")
        if len(classes) <= 30:
            for row, column in np.argwhere(percent >= 0.5):
                color = "black" if percent[row, column] > 50 else "white"
                text = f"{percent[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)


def selectivity_by_layer(values, path, title):
    """The distribution of selectivity in each layer, with its mean (Figure 7a), to path + '.pdf' and '.png'.

    values: {layer: (units,)}. Layers that are numbers, counted from the end of the network, are plotted from its input
    on; with names among them, in their order.
    """
    layers = list(values)
    if all(isinstance(layer, int) for layer in layers):
        layers.sort(reverse=True)
    with _figure(path, 1.6 + 0.9 * max(len(layers), 2), 3) as figure:
        axes = figure.subplots()
        for position, layer in enumerate(layers):
            counts, edges = np.histogram(values[layer], 40, (0, 1))
            widths = 0.32 * counts / max(counts.max(), 1)
            axes.barh(edges[:-1], 2 * widths, edges[1] - edges[0], position - widths, align="edge", color=COLORS[4])
            mean = values[layer].mean()
            axes.plot([position - 0.32, position + 0.32], [mean, mean], color=COLORS[5])
            axes.text(position + 0.34, mean, f"{mean:.2f}", va="center", fontsize=7, color=COLORS[5])
        axes.set_xticks(range(len(layers)), [f"{layer}\n{len(values[layer])} units" for layer in layers])
        xlabel = "layer, counted from the end" if all(isinstance(layer, int) for layer in layers) else "layer"
        axes.set(xlabel=xlabel, ylabel="class selectivity of a unit", ylim=(-0.01, 1.01))
        axes.set(xlim=(-0.6, len(layers) - 0.2), title=f"{legible(title)}\nline and number: mean over units")


def variance_explained(curves, path, title):
    """The variance explained by the first principal components, to path + '.pdf' and '.png' (Figure A1).

    curves: {folder: {layer: (C,) fraction of the variance that 1, 2, ... C components explain}}.
    """
    from matplotlib.ticker import StrMethodFormatter

    folders = zip(drawable(curves), curves.values(), strict=True)
    labels = [f"{folder}, layer {layer}" for folder, by_layer in folders for layer in by_layer]
    with _figure(path, 4.8 + _legend_width(labels), max(3.2, 0.2 + 0.17 * len(labels))) as figure:
        axes = figure.subplots()
        for by_layer, style in zip(curves.values(), itertools.cycle(("-", "--", ":", "-."))):
            for curve, color in zip(by_layer.values(), itertools.cycle(COLORS)):
                axes.plot(np.arange(len(curve)) + 1, 100 * curve, style, color=color)
        axes.axhline(90, color="0.6", linewidth=0.8, zorder=0)
        figure.legend(axes.lines[:], [*labels, "90 %"], loc="outside right upper", fontsize=8)
        axes.set(xscale="log", xlabel="number of principal components", ylabel="variance explained (%)", ylim=(0, 101))
        axes.set_title(legible(title))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))  # the default is powers of ten in math mode


def dissimilarity(matrix, labels, classes, path, title, scale):
    """A dissimilarity matrix (N, N) with images in the order of their classes, to path + '.pdf' and '.png'.

    labels: (N,) indices into classes. Images whose rows are NaN are left out. A large matrix is averaged in blocks.
    scale: (what is measured, the highest value) of the color scale.
    """
    order = np.argsort(labels, kind="stable")
    order = order[~np.isnan(matrix[order, order])]
    step = -(-len(order) // MAX_CELLS)
    starts = np.arange(0, len(order), step)
    rows = np.stack([matrix[order[first : first + step]].mean(0)[order] for first in starts])
    means = np.add.reduceat(rows, starts, axis=1) / np.diff([*starts, len(order)])
    present, sizes = np.unique(labels[order], return_counts=True)
    edges = np.cumsum([0, *sizes]) / step
    names = drawable([classes[label] for label in present])
    shown = range(0, len(names), -(-len(names) // MAX_LABELS))
    side = 2.2 + 0.16 * max(len(shown), 16)
    with _figure(path, side + 0.8, side) as figure:
        style = dict(cmap="viridis", vmin=0, vmax=scale[1], extent=(0, len(order) / step, len(order) / step, 0))
        ticks = [(edges[i] + edges[i + 1]) / 2 for i in shown]
        axes = _matrix(figure, means, ticks, [names[i] for i in shown], title, scale[0], style)
        if len(names) <= MAX_LABELS:
            for edge in edges[1:-1]:
                axes.axhline(edge, color="white", linewidth=0.5)
                axes.axvline(edge, color="white", linewidth=0.5)


def correlations(matrix, intervals, names, path, title):
    """A matrix (M, M) of correlations with their intervals (M, M, 2) as numbers, to path + '.pdf' and '.png'.

    names: of what is compared. NaN is not shown.
    """
    labels = drawable(names)
    side = 1.4 + 0.75 * len(names) + 0.065 * max(map(len, labels))
    with _figure(path, side + 0.6, side) as figure:
        style = dict(cmap="RdBu_r", vmin=-1, vmax=1)
        axes = _matrix(figure, matrix, range(len(names)), labels, title, "Spearman's rho", style)
        for row, column in np.argwhere(~np.isnan(matrix)):
            low, high = intervals[row, column]
            interval = "" if np.isnan(low) else f"\n{low:.2f} to {high:.2f}"
            color = "white" if abs(matrix[row, column]) > 0.7 else "black"
            text = f"{matrix[row, column]:.2f}{interval}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def scatter(points, values, path, title, name, labels=()):
    """Points (N, 2), colored by values (N strings), to path + '.pdf' and '.png'. Points that are NaN are left out.

    name: of the values. Values that are all numbers have a color scale; other values have a legend, or if they are more
    than MAX_GROUPS a color scale in the order in which they appear. labels: N strings beside the points, if given.
    """
    known = ~np.isnan(points[:, 0])
    points, values = points[known], [value for value, is_known in zip(values, known, strict=True) if is_known]
    groups = list(dict.fromkeys(values))
    try:
        numbers = np.array([float(value) if value else np.nan for value in values])
    except ValueError:
        numbers = None
    if numbers is None and len(groups) > MAX_GROUPS:
        position = {group: number for number, group in enumerate(groups)}
        numbers, name = np.array([position[value] for value in values]), f"{name}, in order"
    texts = drawable(groups) if numbers is None else []
    width = 5.6 + 0.07 * max(map(len, texts), default=8)
    more = max(0, 0.045 * len(labels) - 1)  # inches, for labels that stay apart
    with _figure(path, width + more, max(5 + more, 0.3 + 0.18 * len(texts))) as figure:
        axes = figure.subplots()
        style = dict(s=np.clip(4000 / len(points), 2, 20), linewidths=0)
        if numbers is None:
            for group, (marker, color) in zip(groups, itertools.product("osD^v", COLORS), strict=False):
                axes.scatter(*points[[value == group for value in values]].T, color=color, marker=marker, **style)
            legend = figure.legend(axes.collections[:], texts, loc="outside right upper", fontsize=8)
            for handle in legend.legend_handles:
                handle.set_sizes([20])
        else:
            axes.scatter(*points[np.isnan(numbers)].T, color="0.8", **style)
            drawn = axes.scatter(*points.T, c=numbers, cmap="viridis", plotnonfinite=False, **style)
            figure.colorbar(drawn, label=legible(name), shrink=0.7)
        axes.set(xticks=(), yticks=())
        axes.set_aspect("equal", "datalim")
        axes.set_title(legible(title))
        for point, label in zip(points, itertools.compress(drawable(labels), known), strict=False):
            axes.annotate(label, point, (3, 0), textcoords="offset points", va="center", fontsize=6)

"""Pictures for the eye and the page: curves, bars, confusion matrices, grids. Every figure is a PDF and a PNG."""

import itertools
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moco import files

# Okabe and Ito's colors, which color-blind eyes can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "figure.constrained_layout.use": True,
}


@contextmanager
def _figure(path, width, height):
    """A Figure of width x height inches; written to path as .pdf and .png, whole or not at all, at the end."""
    import matplotlib  # it takes half a second, which --help does not need
    from matplotlib.figure import Figure

    path = Path(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", None)):
            with files.atomic_write(path.with_name(path.name + ending)) as part:
                figure.savefig(part, dpi=150, metadata=metadata)


def training_curve(records, path):
    """Loss and top-1 accuracy by epoch, to path + '.pdf' and '.png'.

    records: one dict an epoch with 'epoch' and, where they are known, 'loss', 'acc1' and 'val_acc1' (%).
    """
    from matplotlib.ticker import MaxNLocator

    with _figure(path, 7, 2.8) as figure:
        loss, accuracy = figure.subplots(1, 2)
        _line(loss, records, "loss", COLORS[0], "training")
        _line(accuracy, records, "acc1", COLORS[0], "training")
        _line(accuracy, records, "val_acc1", COLORS[1], "test")
        loss.set(xlabel="epoch", ylabel="cross-entropy loss")
        loss.set_ylim(0, 1.05 * loss.get_ylim()[1])
        accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 100))
        if len(accuracy.lines) > 1:
            accuracy.legend(loc="best")
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", color="0.9")


def _line(axes, records, key, color, label):
    known = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if known:
        axes.plot(*np.transpose(known), color=color, label=label, marker="o", markersize=3, clip_on=False)


def accuracy_bars(models, path):
    """Top-1 accuracy of every model on every task, with its majority and chance lines, to path + '.pdf' and '.png'.

    models: {model: {task: {'mean', 'std' (or None), 'majority', 'chance'}}}, accuracies from 0 to 1.
    """
    groups = {}
    for model, by_task in models.items():
        for task, entry in by_task.items():
            groups.setdefault(task, {})[model] = entry
    looks = dict(zip(models, itertools.cycle(itertools.product(("", "///", "..."), COLORS)), strict=False))
    width, handles = 0.84 / len(models), {}
    with _figure(path, 2.2 + len(groups) * (0.5 + 0.38 * len(models)), 3.4) as figure:
        axes = figure.subplots()
        for place, entries in enumerate(groups.values()):
            for model, entry in entries.items():
                x, mean, std = place - 0.42 + (list(models).index(model) + 0.5) * width, *_percent(entry)
                look = dict(zip(("hatch", "color"), looks[model], strict=True), edgecolor="white", linewidth=0)
                handles[model] = axes.bar(x, mean, width * 0.92, **look)
                axes.errorbar(x, mean, std, color="0.25", capsize=2, linewidth=1)
                axes.text(x, mean + std + 1, f"{mean:.1f}", ha="center", fontsize=7)
            edges = (place - 0.46, place + 0.46)
            for name, style in (("majority", "--"), ("chance", ":")):
                (handles[name],) = axes.plot(edges, [100 * entry[name]] * 2, style, color="black", linewidth=1)
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="top-1 accuracy (%)", ylim=(0, 106), yticks=range(0, 101, 20), xlim=(-0.6, len(groups) - 0.4))


def _percent(entry):
    return 100 * entry["mean"], 100 * (entry["std"] or 0)


def confusion_matrix(counts, classes, path, title):
    """Counts (K, K), true class by row, named class by column, as shares of a row, to path + '.pdf' and '.png'."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 1.6 + 0.26 * max(len(classes), 6)
    with _figure(path, side + 0.6, side) as figure:
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="named class", ylabel="true class", title=title)
        figure.colorbar(picture, label="share of the true class", shrink=0.7)
        if len(classes) <= 30:
            for row, column in np.argwhere(shares >= 0.005):
                color = "black" if shares[row, column] > 0.5 else "white"
                text = f"{100 * shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)


def image_grid(pictures, captions, path, title, columns=12):
    """Pictures (N, H, W, 3), 12 a row, to path + '.pdf' and '.png'.

    pictures: uint8, or floats from 0 to 1. captions: (true, named) class of each, written below it; where they differ,
    an arrow and another color say so.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    with _figure(path, max(columns, 3), rows * 1.28 + 0.3) as figure:
        figure.suptitle(title, fontsize=10)
        for axes in (cells := figure.subplots(rows, columns, squeeze=False).ravel()):
            axes.axis("off")
        for axes, picture, (true, named) in zip(cells, pictures, captions, strict=False):
            axes.imshow(picture)
            axes.text(0.5, -0.03, true, transform=axes.transAxes, ha="center", va="top", fontsize=6)
            text, color = (named, COLORS[0]) if true == named else (f"→ {named}", COLORS[5])
            axes.text(0.5, -0.15, text, transform=axes.transAxes, ha="center", va="top", fontsize=6, color=color)


def image_rows(rows, path):
    """Rows of images with a margin that says what they share, to path + '.pdf' and '.png'.

    rows: [(text, pictures)], pictures (H, W, 3) uint8; a row may have fewer than another.
    """
    columns = max(len(pictures) for _, pictures in rows)
    with _figure(path, 1.4 + 1.02 * columns, 1.04 * len(rows)) as figure:
        grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.35] + [1] * columns)
        for cells, (text, pictures) in zip(grid, rows, strict=True):
            for axes in cells:
                axes.axis("off")
            cells[0].text(0, 0.5, text, transform=cells[0].transAxes, va="center", fontsize=8, linespacing=1.5)
            for axes, picture in zip(cells[1:], pictures, strict=False):
                axes.imshow(picture)


def selectivity_by_layer(found, path):
    """The distribution of selectivity in every layer, with its mean (figure 7a), to path + '.pdf' and '.png'.

    found: {layer: (units,)}, layers counted from the end of the network; drawn from its input on.
    """
    layers = sorted(found, reverse=True)
    with _figure(path, 1.6 + 0.9 * max(len(layers), 2), 3) as figure:
        axes = figure.subplots()
        for place, layer in enumerate(layers):
            counts, edges = np.histogram(found[layer], 40, (0, 1))
            widths = 0.32 * counts / max(counts.max(), 1)
            axes.barh(edges[:-1], 2 * widths, edges[1] - edges[0], place - widths, align="edge", color=COLORS[4])
            mean = found[layer].mean()
            axes.plot([place - 0.32, place + 0.32], [mean, mean], color=COLORS[5])
            axes.text(place + 0.34, mean, f"{mean:.2f}", va="center", fontsize=7, color=COLORS[5])
        axes.set_xticks(range(len(layers)), [f"{layer}\n{len(found[layer])} units" for layer in layers])
        axes.set(xlabel="layer, counted from the end", ylabel="class selectivity", ylim=(-0.01, 1.01))
        axes.set_xlim(-0.6, len(layers) - 0.2)


def variance_explained(curves, path):
    """How much variance the first principal components explain, to path + '.pdf' and '.png' (figure A1).

    curves: {folder: {layer: (C,) share of the variance that 1, 2, ... C components explain}}.
    """
    with _figure(path, 6.4, 3.2) as figure:
        axes = figure.subplots()
        for (folder, of_layers), style in zip(curves.items(), itertools.cycle(("-", "--", ":", "-."))):
            for (layer, curve), color in zip(of_layers.items(), itertools.cycle(COLORS)):
                axes.plot(np.arange(len(curve)) + 1, 100 * curve, style, color=color, label=f"{folder}, layer {layer}")
        axes.axhline(90, color="0.6", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlabel="principal components", ylabel="variance explained (%)", ylim=(0, 101))
        figure.legend(loc="outside right upper", fontsize=7)

"""Batches of normalized images from folders: image lists, augmentation, corrupt images."""

from bisect import bisect_right
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from moco.cli import UserError
from moco.data import augment, augment_device, index, manifest, packed, recordings
from moco.data.sampler import AUGMENT, EpochSampler, generator
from moco.data.workers import WorkerBatches, share

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet statistics of RGB values from 0 to 1
MAX_BAD_SHARE = 0.01  # training fails if more than this share of the images is corrupt ...
MIN_IMAGES_FOR_SHARE = 10_000  # ... of those read so far, counted as at least this many


class FrameFolder:
    """The images of one or several folders in the order of torchvision's ImageFolder, without a list of their paths.

    folders: a folder, or several, whose classes follow one another and are named FOLDER/CLASS. Each is a frame folder
    with a manifest, for which nothing is stored per image; a tree with one folder per class; a flat folder of images,
    which form one class named after the folder; or any of these packed into tars, see packed. Hidden entries and class
    folders without images are ignored.
    selection: the recordings.Selection of the images to use, over all folders, which need manifests for it.
    classes: the names of the classes. counts: the number of images in each class. selected: what was selected, in
    words; None without a selection.
    Raises UserError for a folder that is missing, cannot be read or contains no image, for several folders with images
    of different size (unless one_size is false), and for a selection that nothing meets.
    """

    def __init__(self, folders, selection=None, one_size=True):
        self.folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        self.folder = self.folders[0] if len(self.folders) == 1 else ", ".join(map(str, self.folders))
        self.selected = None
        self._parts, self._tars = zip(*map(_open_images, self.folders), strict=True)
        if selection:
            self._parts, self.selected = _select(self.folders, self._parts, selection)
        self._part_starts = list(accumulate(map(len, self._parts), initial=0))
        self.classes = [name for part, names in enumerate(self._parts) for name in self._named(part, names.classes)]
        self.counts = [count for part in self._parts for count in part.class_sizes()]
        self._starts = list(accumulate(self.counts, initial=0))
        if len(self) == 0:
            raise UserError(f"{self.folder} has no images; give a folder of class folders, as read_saycam.py makes it")
        if len(self.folders) > 1 and one_size:
            self._check_sizes()

    def _named(self, part, names):
        """Names in one of the folders as they are called here: with several folders, below the folder's name."""
        if len(self.folders) == 1:
            return names
        folder = self.folders[part]
        is_unique = [each.name for each in self.folders].count(folder.name) == 1
        return [f"{folder.name if is_unique else folder.as_posix()}/{name}" for name in names]

    def _check_sizes(self):
        """UserError if the first images of the folders differ in size."""
        shapes = []
        for part, start in enumerate(self._part_starts[:-1]):
            if len(self._parts[part]):
                try:
                    shapes.append((augment.decode(self.read(start)).shape, self.folders[part]))
                except (augment.BadImage, OSError):  # the loader names it
                    continue
        for shape, folder in shapes[1:]:
            if shape != shapes[0][0]:
                (height, width, _), (first_height, first_width, _) = shape, shapes[0][0]
                raise UserError(
                    f"the images of {folder} are {width}x{height} pixels, those of {shapes[0][1]} "
                    f"{first_width}x{first_height}; extract both with the same --size"
                )

    def __len__(self):
        return self._starts[-1]

    def _locate(self, i):
        """(the number of the folder of image i, its index there)."""
        part = bisect_right(self._part_starts, int(i)) - 1
        return part, int(i) - self._part_starts[part]

    def name(self, i):
        r"""The file name of image i relative to its folder, with forward slashes; with several, below their names.

        Bytes that are not valid UTF-8 are escaped (\udcff for the byte 0xff), so that every name can be printed and
        written to a text file.
        """
        return self._named(self._locate(i)[0], [index.printable(self.relative_path(i))])[0]

    def relative_path(self, i):
        """The path of image i relative to its folder, with forward slashes."""
        part, i = self._locate(i)
        return Path(self._parts[part].path(i)).as_posix()

    def path(self, i):
        """The path of image i: a Path, or an archive.Member, which has its methods stat, open and read_bytes."""
        part, i = self._locate(i)
        images, tars = self._parts[part], self._tars[part]
        return self.folders[part] / images.path(i) if tars is None else tars.member(images.slot(i), images.path(i))

    def read(self, i):
        """The bytes of the file of image i; OSError if it cannot be read."""
        part, i = self._locate(i)
        images, tars = self._parts[part], self._tars[part]
        if tars is None:
            return (self.folders[part] / images.path(i)).read_bytes()
        return tars.read(images.slot(i), None if images is tars else images.path(i))

    def source(self, i):
        """The manifest.Source of image i; None if its folder has no manifest."""
        part, i = self._locate(i)
        return self._parts[part].source(i) if isinstance(self._parts[part], manifest.Manifest) else None

    def label(self, i):
        """The label of image i: an index into classes."""
        return bisect_right(self._starts, int(i)) - 1

    def labels(self):
        """The labels of all images, int64 (N,)."""
        return np.repeat(np.arange(len(self.classes)), self.counts)

    def neighbors(self, i, window):
        """Indices of the other images within window steps of image i in the same video, or class without a manifest."""
        part, local = self._locate(i)
        if isinstance(self._parts[part], manifest.Manifest):
            start = self._part_starts[part]
            return [start + j for j in self._parts[part].neighbors(local, window)]
        label = self.label(i)
        near = range(max(i - window, self._starts[label]), min(i + window + 1, self._starts[label + 1]))
        return [j for j in near if j != i]

    def same_class(self, i):
        """Indices of the other images in the class of image i: those after it, then those before it."""
        label = self.label(i)
        return chain(range(i + 1, self._starts[label + 1]), range(self._starts[label], i))


def _open_images(folder):
    """(the Manifest, Index or PackedFolder that lists the images of a folder, its PackedFolder or None)."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that contains the class folders")
    images = manifest.load(folder)
    if packed.is_packed(folder):
        tars = packed.load(folder, images)
        return tars if images is None else images, tars
    return index.load(folder) if images is None else images, None


def _select(folders, parts, selection):
    """The Manifests of folders with the images of the selected recordings only; and what was selected, in words."""
    if unplanned := [
        folder for folder, part in zip(folders, parts, strict=True) if not isinstance(part, manifest.Manifest)
    ]:
        raise UserError(f"{unplanned[0]} has no manifest.json, by which recordings are selected; extract it again")
    owners = [(part, number) for part, images in enumerate(parts) for number in range(len(images.videos))]
    known = [parts[part].recording(number) for part, number in owners]
    seconds = selection.choose(known)
    shares = [{} for _ in parts]
    for i, taken in seconds.items():
        part, number = owners[i]
        shares[part][number] = taken / known[i][2]
    kept = [images.select(share) for images, share in zip(parts, shares, strict=True)]
    return kept, recordings.describe(known, seconds)


class FrameLoader:
    """Batches of images, augmented by recipe and normalized on device, epoch by epoch.

    A batch depends only on (seed, epoch, positions in the epoch): not on the number of workers, nor on the batch at
    which an epoch starts.

    sampler: an EpochSampler of images in frames. workers: processes that read them; 0 reads in this process.
    views: with n > 1, each image comes in n independent augmentations.
    In training, the next good image of its class replaces a corrupt image, and more than 1 % of corrupt images raise a
    UserError; in evaluation corrupt images are left out.
    bad: {index: reason} of the corrupt images so far.
    """

    def __init__(self, frames, recipe, sampler, device, workers=0, views=1):
        self.frames = frames
        self.recipe = recipe
        self.sampler = sampler
        self.views = views
        self.device = torch.device(device)
        self.bad = {}
        self._images_read = 0
        dataset = BatchDataset(frames, recipe, sampler.seed, sampler.train, views)
        self._batches = WorkerBatches(dataset, sampler, workers, pin_memory=self.device.type == "cuda")
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        scale = torch.tensor([MEAN, STD], device=self.device)[:, :, None, None] * 255
        self._mean, self._std = scale.unbind(0)

    def __len__(self):
        """The number of batches in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch, start=0):
        """Yield the batches of an epoch from number start on.

        Each is (images, targets, indices): float32 (N, 3, size, size) on the device, a tuple of them if views > 1;
        int64 (N,) on the device; int64 (N,) on the CPU. Raises UserError for too many corrupt images, and for workers
        that die or lack memory.
        """
        self.sampler.epoch = epoch
        self.sampler.start = start
        for pixels, colors, targets, indices, bad in self._batches:
            self._count_bad(bad, len(indices))
            if len(indices) == 0:
                continue
            images = tuple(self._normalize(pixels[v], colors[v] if colors else None) for v in range(self.views))
            yield images if self.views > 1 else images[0], self._to_device(targets), indices

    def _normalize(self, pixels, colors):
        """uint8 (N, size, size, 3) as normalized float32 (N, 3, size, size) on the device, channels last in memory."""
        layout = (
            torch.contiguous_format if self.device.type == "mps" else torch.preserve_format
        )  # channels last is slow
        images = self._to_device(pixels).permute(0, 3, 1, 2).float(memory_format=layout)
        if colors:
            colors = colors._replace(values=self._to_device(colors.values), images=self._to_device(colors.images))
            images = augment_device.color(images, colors, self.recipe.gray_first)
        return images.sub_(self._mean).div_(self._std)

    def _to_device(self, tensor):
        """tensor on the device; to a GPU it is copied on a stream of its own, while the last step still computes."""
        if self._copy_stream is None:
            return tensor.to(self.device)
        with torch.cuda.stream(self._copy_stream):
            tensor = tensor.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copy_stream)
        tensor.record_stream(computing)  # its memory belongs to the other stream, which may not reuse it before
        return tensor

    def _count_bad(self, bad, n):
        """Count the corrupt images of a batch of n, and report each of them once."""
        self._images_read += n
        train = self.sampler.train
        for i, reason in bad:
            if i not in self.bad:
                self.bad[i] = reason
                consequence = "replaced by another image of its class" if train else "left out"
                tqdm.write(f"{self._printable(i)}: {reason}; {consequence}")
        total = len(self.frames)
        images = max(min(self._images_read, total), min(MIN_IMAGES_FOR_SHARE, total))
        if train and (len(self.bad) > MAX_BAD_SHARE * images or n == 0):  # a step without images would not be counted
            names = "\n".join(f"  {self._printable(i)}: {reason}" for i, reason in sorted(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} images of {self.frames.folder} cannot be read, too many to train on; "
                f"repair or remove them:\n{names}"
            )

    def _printable(self, i):
        return index.printable(str(self.frames.path(i)))


def in_order(frames, recipe, device, workers, images=None, batch_size=64):
    """A FrameLoader for evaluation: images of frames, once and in order, as epoch 0.

    images: their indices, (N,); None is all.
    """
    sampler = EpochSampler(len(frames) if images is None else images, batch_size, train=False)
    return FrameLoader(frames, recipe, sampler, device, workers)


class BatchDataset(torch.utils.data.Dataset):
    """The work of a worker process: read and augment the images of a batch, and put them into one array."""

    def __init__(self, frames, recipe, seed, train, views):
        self.frames = frames
        self.recipe = recipe
        self.seed = seed
        self.train = train
        self.views = views
        self.bad = {}

    def __getitem__(self, job):
        """The batch of a job of EpochSampler: (epoch, positions, indices).

        Returns pixels uint8 (views, N, size, size, 3), a list of augment_device.ColorParams for each view (empty unless
        the device augments colors), targets and indices int64 (N,), and the corrupt images [(index, reason)]; or a
        UserError if the memory shared with the main process is full.
        """
        epoch, positions, indices = job
        recipe, size = self.recipe, self.recipe.size
        on_device = recipe.has_color and recipe.on == "device"
        pixels = np.empty((self.views, len(indices), size, size, 3), np.uint8)
        factors = np.empty((self.views if on_device else 0, len(indices), augment.FACTORS), np.float32)
        read, bad = [], {}
        columns = indices[:, None] if indices.ndim == 1 else indices
        for position, sources in zip(positions, columns.tolist(), strict=True):
            images = [self._read(source, bad) for source in sources]
            if not all(images):
                continue
            random, n = generator(self.seed, AUGMENT, epoch, position), len(read)
            for view in range(self.views):
                _, image = images[view % len(images)]
                if on_device:
                    pixels[view, n] = recipe.crop(image, random)
                    factors[view, n] = recipe.sample_color_params(random)
                else:
                    pixels[view, n] = recipe(image, random)
            read.append(images[0][0])
        n = len(read)
        pixels = torch.from_numpy(pixels[:, :n])
        colors = [augment_device.color_params(view[:n]) for view in factors]
        targets = torch.tensor([self.frames.label(index) for index in read], dtype=torch.int64)
        indices = torch.tensor(read, dtype=torch.int64)
        tensors = [pixels, targets, indices, *(tensor for view in colors for tensor in (view.values, view.images))]
        return share(tensors) or (pixels, colors, targets, indices, list(bad.items()))

    def _read(self, index, bad):
        """(index, image) of an image, or in training of the next good one of its class; None if there is none.

        Corrupt images are added to bad.
        """
        for candidate in chain([index], self.frames.same_class(index) if self.train else []):
            if candidate not in self.bad:
                try:
                    return candidate, augment.decode(self.frames.read(candidate))
                except augment.BadImage as error:
                    self.bad[candidate] = str(error)
                except OSError as error:
                    self.bad[candidate] = error.strerror or str(error)
            bad[candidate] = self.bad[candidate]
            if len(bad) > MAX_BAD_SHARE * len(self.frames):
                return None  # training will stop: do not read the rest of a large class
        return None

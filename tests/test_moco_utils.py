"""What the two contrastive learners share: learning rate, parts of a batch, pairs of frames, the whole training."""

import itertools
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moco_img
from moco.cli import UserError
from moco.data import loader, manifest
from moco.data.folders import FrameFolder
from moco.distributed import ProcessContext
from moco_utils import TemporalPairs, learning_rate, resolve_bn_splits
from tests.data.test_manifest import images, make


def test_the_learning_rate_falls_by_ten_at_the_schedule_or_like_a_cosine():
    course = [learning_rate(epoch, 0.03, 24, [11, 20]) for epoch in range(24)]
    assert course == pytest.approx([0.03] * 11 + [0.003] * 9 + [0.0003] * 4)
    course = [learning_rate(epoch, 2, 4, [1], cosine=True) for epoch in range(4)]
    assert course == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])


def test_batch_norm_takes_as_many_parts_as_have_two_images_each():
    assert [resolve_bn_splits(None, pairs, 1) for pairs in (1, 3, 8, 16, 256)] == [1, 1, 4, 8, 8]
    assert resolve_bn_splits(2, 8, 1) == 2 and resolve_bn_splits(None, 64, 2) == 1 and resolve_bn_splits(1, 64, 2) == 1
    with pytest.raises(UserError, match="--bn-splits 5: 8 pairs per step make at most 4 parts"):
        resolve_bn_splits(5, 8, 1)
    with pytest.raises(UserError, match="--bn-splits 4 is for a single process; 2 processes shuffle"):
        resolve_bn_splits(4, 8, 2)


def pairs_of(frames, batch_size, epoch=0, seed=0, window=1, published=False):
    return TemporalPairs(frames, batch_size, seed, window, published, epoch)


def drawn(*arguments, epochs=range(1), **options):
    """The pairs of several epochs."""
    return [pair for epoch in epochs for pair in pairs_of(*arguments, epoch=epoch, **options)[:].tolist()]


def test_a_pair_is_a_frame_and_a_neighbor_of_its_class(frames):
    """Three classes of eight frames: 24 frames make 4 batches of 6, three pairs each."""
    folder = FrameFolder(frames)
    assert len(pairs_of(folder, 6)) == 12
    pairs = drawn(folder, 6, epochs=range(200))
    assert {abs(a - b) for a, b in pairs} == {1}
    assert all(a // 8 == b // 8 for a, b in pairs)
    assert {a for a, _ in pairs} == set(range(24))
    signs = Counter(b - a for a, b in pairs if a % 8 not in (0, 7))
    assert abs(signs[1] - signs[-1]) < 4 * len(pairs) ** 0.5
    assert len({a for a, _ in pairs[:12]}) < 12  # with replacement


def test_a_wider_window_reaches_further_on_both_sides(frames):
    pairs = drawn(FrameFolder(frames), 6, epochs=range(100), window=3)
    assert {b - a for a, b in pairs} == {-3, -2, -1, 1, 2, 3}
    assert all(a // 8 == b // 8 for a, b in pairs)


class OneVideo:
    """Frames that are all of one video."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def neighbors(self, frame, window):
        return [other for other in range(frame - window, frame + window + 1) if 0 <= other < self.n and other != frame]


@given(st.integers(2, 60), st.integers(2, 16), st.integers(1, 5), st.integers(0, 9), st.slices(60))
def test_any_share_of_an_epoch_is_what_the_whole_has_there(n, batch_size, window, epoch, share):
    pairs = pairs_of(OneVideo(n), batch_size, epoch, seed=1, window=window)
    whole = pairs[:].tolist()
    assert len(whole) == n // batch_size * (batch_size // 2)
    assert all(0 < abs(a - b) <= window and min(a, b) >= 0 and max(a, b) < n for a, b in whole)
    assert pairs[share].tolist() == whole[share]


def test_published_pairs_are_the_frame_before_or_the_frame_itself(frames):
    folder = FrameFolder(frames)
    pairs = drawn(folder, 6, epochs=range(200), published=True)
    offsets = Counter(b - a for a, b in pairs)
    assert offsets.keys() == {-1, 0} and abs(offsets[0] - offsets[-1]) < 4 * len(pairs) ** 0.5
    assert any(a // 8 != b // 8 for a, b in pairs)  # across classes, as published
    assert min(b for _, b in pairs) == 0 and max(a for a, _ in pairs) == 23
    with pytest.raises(UserError, match="--pos-window 13 is too large for the 24 frames"):
        pairs_of(folder, 6, window=13, published=True)


def test_processes_draw_their_own_parts_of_one_whole(frames, monkeypatch):
    """The whole depends on seed and epoch alone, and nobody draws a pair that is not its own."""
    folder = FrameFolder(frames)
    whole = pairs_of(folder, 8, 3, seed=5)[:].tolist()
    assert whole != pairs_of(folder, 8, 4, seed=5)[:].tolist() and whole != pairs_of(folder, 8, 3, seed=6)[:].tolist()

    asked, pair = [], TemporalPairs.pair
    monkeypatch.setattr(TemporalPairs, "pair", lambda self, position: asked.append(position) or pair(self, position))
    parts = []
    for rank in range(2):
        context = ProcessContext(rank, 2)
        order = loader.EpochSampler(partial(pairs_of, folder, 8, seed=5), 4, 5, context, drop_last=True)
        order.epoch = 3
        parts.append([indices.tolist() for _, _, indices in order])
        assert asked == [position for position in range(12) if position % 2 == rank]
        asked.clear()
    merged = [pair for batch in zip(*parts, strict=True) for pair in itertools.chain(*zip(*batch, strict=True))]
    assert merged == whole


def test_frames_without_neighbors_are_one_line(frames):
    for label in range(3):
        for path in sorted((frames / f"class_{label:04d}").iterdir())[1:]:
            path.unlink()
    with pytest.raises(UserError, match="have no neighbors in time"):
        drawn(FrameFolder(frames), 2)


def test_published_flags():
    args = moco_img.parse_args(["data"])
    assert (args.arch, args.epochs, args.batch_size, args.lr, args.schedule) == ("resnet50", 12, 256, 0.03, [11, 20])
    assert (args.momentum, args.wd, args.moco_dim, args.moco_k, args.moco_m) == (0.9, 0, 128, 65536, 0.999)
    assert (args.moco_t, args.mlp, args.aug_plus, args.cos, args.print_freq) == (0.07, False, False, False, 1000)


def test_pairs_of_a_planned_folder_stay_within_a_video(tmp_path):
    """Classes of ten frames, from videos of 7, 5 and 8, of which three are missing."""
    plan = make([7, 5, 8], missing={3, 13, 14})
    manifest.write(tmp_path, plan)
    frames, kept = FrameFolder(tmp_path), images(plan)
    assert len(frames) == len(kept) == 17 and len(frames.classes) == 2
    pairs = drawn(frames, 17, epochs=range(200))
    found = {(kept[a][1:], kept[b][1:]) for a, b in pairs}
    near = itertools.permutations([place for _, *place in kept], 2)
    assert found == {((va, a), (vb, b)) for (va, a), (vb, b) in near if va == vb and abs(a - b) == 1}

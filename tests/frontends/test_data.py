"""The data sets: the bicubic kernel, the published figures where the images are at hand, reproducible batches."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jointsparse.frontends.data import (
    Labelled,
    LabelledBatches,
    Pair,
    PatchBatches,
    enlarged_pair,
    luma,
    psnr,
    read_labelled,
    read_luma,
    read_pairs,
    resize,
)
from jointsparse.frontends.errors import InputError


def test_resize_is_matlabs() -> None:
    """imresize(x, 'bicubic') by its definition, in plain loops: widened kernel, mirrored edges, weights normalised."""
    rng = np.random.default_rng(0)
    row = rng.random(12)

    def cubic(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    for target in (4, 24, 7):
        scale = target / 12
        stretch = min(scale, 1)
        expected = []
        for i in range(target):
            centre = (i + 0.5) / scale - 0.5
            taps = range(int(centre - 2 / stretch) - 3, int(centre + 2 / stretch) + 4)
            weights = [cubic((centre - t) * stretch) for t in taps]
            mirrored = [-t - 1 if t < 0 else 23 - t if t > 11 else t for t in taps]
            expected.append(sum(w * row[m] for w, m in zip(weights, mirrored, strict=True)) / sum(weights))
        np.testing.assert_allclose(resize(row[None], 1, target)[0], expected, atol=1e-12)
        np.testing.assert_allclose(resize(row[:, None], target, 1)[:, 0], expected, atol=1e-12)


def test_resize_keeps_constants_and_smooth_images() -> None:
    np.testing.assert_allclose(resize(np.full((9, 12), 0.3), 20, 5), 0.3, atol=1e-12)
    y, x = np.mgrid[0:48, 0:48] / 48
    smooth = 0.5 + 0.2 * np.sin(2 * y) * np.cos(3 * x)
    back = resize(resize(smooth, 16, 16), 48, 48)
    assert psnr(back, smooth, 6) > 60


@pytest.mark.skipif(
    "JOINTSPARSE_SR_DATA" not in os.environ, reason="set JOINTSPARSE_SR_DATA to a folder with Set5, Set14"
)
def test_published_bicubic_figures() -> None:
    for name, published in (("Set5", 30.39), ("Set14", 27.63)):
        pairs = read_pairs(Path(os.environ["JOINTSPARSE_SR_DATA"]) / name, 3)
        mean = float(np.mean([psnr(p.low, p.high, 3) for p in pairs]))
        assert mean == pytest.approx(published, abs=0.006)


def test_luma_of_the_standard() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(luma(colours) * 255, [[16, 235, 81]], atol=1e-4)
    np.testing.assert_allclose(luma(np.array([[0, 255]], np.uint8)), [[0, 1]])


def test_psnr_by_hand() -> None:
    image = np.full((8, 8), 0.5)
    noisy = image + 0.1
    noisy[0] = 5  # in the border
    assert psnr(noisy, image, 1) == pytest.approx(20)
    assert psnr(np.full((4, 4), 2.0), np.full((4, 4), 0.9), 0) == pytest.approx(20), "clipped to 1 before"


def write_images(folder: Path, count: int = 3, size: int = 40) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size + i, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_read_pairs(tmp_path: Path) -> None:
    write_images(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    pairs = read_pairs(tmp_path / "set", 3)
    assert [p.name for p in pairs] == ["0", "1", "2"]
    assert [p.high.shape for p in pairs] == [(39, 39), (39, 39), (42, 39)]
    assert all(p.low.shape == p.high.shape for p in pairs)
    # 8 bits, as the literature's images are.
    np.testing.assert_allclose(pairs[0].low * 255, np.round(pairs[0].low * 255), atol=1e-4)


def test_bad_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_pairs(tmp_path / "nowhere", 3)
    with pytest.raises(InputError, match="no image"):
        read_pairs(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no")
    with pytest.raises(InputError, match=r"broken\.png"):
        read_luma(tmp_path / "broken.png")
    with pytest.raises(InputError, match="smaller than"):
        enlarged_pair(np.zeros((2, 9), np.float32), 3)


def pairs_with_coordinates(count: int = 2, size: int = 30) -> list[Pair]:
    """Pixels that say where they come from; low is high + 1000."""
    high = np.arange(size * size, dtype=np.float32).reshape(size, size)
    return [Pair(str(i), high + 1000, high) for i in range(count)]


def test_patches_are_aligned_reproducible_and_shared_out() -> None:
    options = {"scale": 3, "patch": 8, "batch": 6, "length": 4, "seed": 3}
    batches = PatchBatches(pairs_with_coordinates(), **options, epoch=2)
    low, high = batches[1]
    assert low.shape == high.shape == (6, 1, 8, 8)
    assert torch.equal(low, high + 1000), "both sides must be cut and turned alike"
    again = PatchBatches(pairs_with_coordinates(), **options, epoch=2)[1][1]
    assert torch.equal(high, again)
    assert not torch.equal(high, PatchBatches(pairs_with_coordinates(), **options, epoch=3)[1][1])
    shares = [PatchBatches(pairs_with_coordinates(), **options, epoch=2, rank=r, world=2)[1][1] for r in (0, 1)]
    assert torch.equal(high[0::2], shares[0])
    assert torch.equal(high[1::2], shares[1])
    steps = {tuple((p[0, 1] - p[0, 0]).reshape(-1).tolist()) for p in high}
    assert len(steps) > 1, "patches must be turned"
    with pytest.raises(IndexError):
        batches[4]


def test_shrunk_copies_and_small_images() -> None:
    pairs = [enlarged_pair(np.random.default_rng(0).random((45, 45), np.float32), 3, "a")]
    batches = PatchBatches(pairs, scale=3, patch=20, batch=2, length=1, shrink=(0.5, 0.4))
    assert sorted(p.high.shape for p in batches.pairs) == [(21, 21), (45, 45)], "0.4 is below the patch"
    with pytest.raises(InputError, match="smaller patch"):
        PatchBatches(pairs, scale=3, patch=46, batch=2, length=1)


def classified_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def test_folder_and_archive_are_read_alike(tmp_path: Path) -> None:
    folder = classified_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for split in ("test", "train"):
            archive.add(folder / split, split)
    for split, count in (("train", 10), ("test", 4)):
        first, second = read_labelled(folder, split), read_labelled(tmp_path / "images.tar.gz", split)
        assert first.classes == second.classes == ("cat", "dog")
        assert len(first.labels) == count
        np.testing.assert_array_equal(first.images, second.images)
        np.testing.assert_array_equal(first.labels, second.labels)


def test_bad_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"x\.tar\.gz"):
        read_labelled(tmp_path / "x.tar.gz", "train")
    with pytest.raises(InputError, match="train/CLASS"):
        read_labelled(tmp_path, "train")
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        member = tarfile.TarInfo("train/cat/1.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"1\.jpg"):
        read_labelled(tmp_path / "y.tar", "train")


def labelled(count: int = 10) -> Labelled:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return Labelled(images, np.arange(count), tuple(map(str, range(count))))


def test_labelled_batches() -> None:
    plain = LabelledBatches(labelled(), batch=4, augment=False)
    assert [len(plain[i][1]) for i in range(len(plain))] == [4, 4, 2]
    x, y = plain[0]
    assert y.tolist() == [0, 1, 2, 3]
    expected = (labelled().images[2] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x[2], expected.transpose(2, 0, 1), atol=1e-5)

    mixed = LabelledBatches(labelled(), batch=4, augment=True, seed=1)
    seen = torch.cat([mixed[i][1] for i in range(len(mixed))])
    assert len(seen) == len(set(seen.tolist())) == 8
    assert torch.equal(mixed[1][0], LabelledBatches(labelled(), batch=4, augment=True, seed=1)[1][0])
    other = LabelledBatches(labelled(), batch=4, augment=True, seed=1, epoch=1)
    assert not torch.equal(seen, torch.cat([other[i][1] for i in range(2)]))
    halves = [LabelledBatches(labelled(), batch=4, augment=True, seed=1, rank=r, world=2)[0] for r in (0, 1)]
    assert torch.equal(mixed[0][0][1::2], halves[1][0])
    assert torch.equal(mixed[0][1][0::2], halves[0][1])
    with pytest.raises(InputError, match="fewer than one batch"):
        LabelledBatches(labelled(3), batch=4, augment=True)

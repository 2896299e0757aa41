"""The data sets of the experiments: super-resolution pairs from folders of images, CIFAR-10 from an archive of images.

Nothing here knows a path: every one is an argument. Super-resolution follows the protocol of its literature: the Y
channel, MATLAB's antialiased bicubic kernel for shrinking and enlarging, PSNR with a border of ``scale`` pixels shaved.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "Labelled",
    "LabelledBatches",
    "Pair",
    "PatchBatches",
    "enlarged_pair",
    "luma",
    "psnr",
    "read_labelled",
    "read_luma",
    "read_pairs",
    "resize",
]

Image = NDArray[np.float32]
_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"}


# --- super-resolution ------------------------------------------------------------------------------------------------


def resize(image: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Resize an H x W image as MATLAB's ``imresize(..., 'bicubic')`` does: Keys' kernel, a = -1/2, widened
    (antialiased) when shrinking, edges mirrored.
    """
    rows = _resize_matrix(image.shape[0], height)
    columns = _resize_matrix(image.shape[1], width)
    return rows @ np.asarray(image, np.float64) @ columns.T


def _resize_matrix(size: int, target: int) -> NDArray[np.float64]:
    """The target x size matrix that resizes one axis."""
    scale = target / size
    stretch = min(scale, 1.0)
    centres = (np.arange(target) + 0.5) / scale - 0.5
    reach = int(np.ceil(4 / stretch)) + 2
    taps = np.floor(centres - 2 / stretch).astype(int)[:, None] + np.arange(reach)
    weights = _cubic((centres[:, None] - taps) * stretch)
    weights /= weights.sum(1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])[taps % (2 * size)]
    matrix = np.zeros((target, size))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weights)
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def luma(rgb: NDArray[np.uint8]) -> Image:
    """The Y channel of ITU-R BT.601 in [16/255, 235/255] (MATLAB's ``rgb2ycbcr``); grey ones are taken as they are."""
    if rgb.ndim == 2:
        return np.asarray(rgb / 255, np.float32)
    y = 16 + rgb[..., :3].astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255)
    return _eight_bits(y / 255)


def _eight_bits(image: NDArray[np.floating]) -> Image:
    return np.asarray(np.clip(np.round(image * 255), 0, 255) / 255, np.float32)


def read_luma(path: Path) -> Image:
    """Read one image file's Y channel, H x W in [0, 1].

    Raises:
        InputError: where the file is no readable image.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            return luma(np.asarray(picture if picture.mode == "L" else picture.convert("RGB")))
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error})") from error


@dataclass(frozen=True)
class Pair:
    """One super-resolution example: ``low``, enlarged to the size of ``high``; both H x W, Y in [0, 1]."""

    name: str
    low: Image
    high: Image


def enlarged_pair(high: Image, scale: int, name: str = "") -> Pair:
    """Shrink ``high``, cropped to a multiple of ``scale``, by the bicubic kernel and enlarge it again."""
    height, width = (n - n % scale for n in high.shape)
    if not height or not width:
        raise InputError(f"image {name or 'given'} of {high.shape} pixels is smaller than the scale factor {scale}")
    high = high[:height, :width]
    small = _eight_bits(resize(high, height // scale, width // scale))
    return Pair(name, _eight_bits(resize(small, height, width)), high)


def read_pairs(folder: Path, scale: int) -> list[Pair]:
    """Every image of a folder as a Pair, by name.

    Raises:
        InputError: where the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of images; check the data path")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no image ({', '.join(sorted(_SUFFIXES))})")
    return [enlarged_pair(read_luma(f), scale, f.stem) for f in files]


def psnr(image: NDArray[np.floating], reference: NDArray[np.floating], shave: int) -> float:
    """Peak signal-to-noise ratio in dB in [0, 1], ``shave`` pixels cut from each edge; ``image`` is clipped first."""
    inner = (slice(shave, -shave or None),) * 2
    difference = np.clip(np.asarray(image, np.float64), 0, 1)[inner] - np.asarray(reference, np.float64)[inner]
    return float(-10 * np.log10(np.mean(difference**2)))


class PatchBatches:
    """Batches of random patches, mirrored and rotated, for super-resolution: a map-style data set whose items are
    batches ``(low, high)`` of batch x 1 x patch x patch float32 tensors.

    Item ``i`` depends on ``(seed, epoch, i)`` only, so that a resumed run sees what the first would have seen. With
    several processes each takes its share ``rank`` of ``world`` of every batch.

    Args:
        pairs: images; those smaller than a patch are left out.
        shrink: sizes, besides 1, at which the high-resolution images are offered as well (more, sharper patches).
    """

    def __init__(
        self,
        pairs: list[Pair],
        *,
        scale: int,
        patch: int,
        batch: int,
        length: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        shrink: tuple[float, ...] = (),
    ) -> None:
        sized = list(pairs)
        for factor in shrink:
            sized += [_shrunk(p, factor, scale) for p in pairs]
        self.pairs = [p for p in sized if min(p.high.shape) >= patch]
        if not self.pairs:
            raise InputError(f"no training image is as large as the {patch} x {patch} patch; choose a smaller patch")
        areas = np.array([p.high.size for p in self.pairs], np.float64)
        self.share = areas / areas.sum()
        self.patch, self.batch, self.length = patch, batch, length
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import torch

        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        draws = [self._draw(rng) for _ in range(self.batch)][self.rank :: self.world]
        low, high = (torch.from_numpy(np.stack(side)[:, None]) for side in zip(*draws, strict=True))
        return low, high

    def _draw(self, rng: np.random.Generator) -> tuple[Image, Image]:
        pair = self.pairs[rng.choice(len(self.pairs), p=self.share)]
        y, x = (int(rng.integers(n - self.patch + 1)) for n in pair.high.shape)
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        window = slice(y, y + self.patch), slice(x, x + self.patch)
        low, high = (np.rot90(side[window], turns) for side in (pair.low, pair.high))
        return (low[:, ::-1], high[:, ::-1]) if mirror else (low, high)


def _shrunk(pair: Pair, factor: float, scale: int) -> Pair:
    height, width = (max(scale, round(n * factor)) for n in pair.high.shape)
    return enlarged_pair(_eight_bits(resize(pair.high, height, width)), scale, f"{pair.name}@{factor}")


# --- classification --------------------------------------------------------------------------------------------------

CIFAR_MEAN = (0.485, 0.456, 0.406)
"""Mean that the pre-trained CIFAR networks expect (ImageNet's)."""

CIFAR_STD = (0.229, 0.224, 0.225)
"""Standard deviation that the pre-trained CIFAR networks expect (ImageNet's)."""


@dataclass(frozen=True)
class Labelled:
    """Images, N x H x W x 3 uint8, their labels, N int64, and the names of the classes."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def read_labelled(source: Path, split: str) -> Labelled:
    """Read ``split/CLASS/*`` of a folder or of a .tar(.gz) archive; classes are numbered by name.

    Raises:
        InputError: where nothing of that form is found or the sizes differ.
    """
    named = sorted(_labelled_entries(source, split), key=lambda entry: entry[:2])
    if not named:
        raise InputError(f"{source}: no images of the form {split}/CLASS/NAME; check the data path")
    classes = tuple(sorted({label for label, _, _ in named}))
    numbers = {label: i for i, label in enumerate(classes)}
    if len({picture.shape for _, _, picture in named}) > 1:
        raise InputError(f"{source}: the images of {split} differ in size; resize them first")
    images = np.stack([picture for _, _, picture in named])
    return Labelled(images, np.array([numbers[label] for label, _, _ in named], np.int64), classes)


def _labelled_entries(source: Path, split: str) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """(class, file name, pixels) of every image of the split."""
    if source.is_dir():
        for file in source.glob(f"{split}/*/*"):
            if file.suffix.lower() in _SUFFIXES:
                yield file.parent.name, file.name, _pixels(file, str(file))
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if member.isfile() and len(parts) >= 3 and parts[-3] == split:
                    yield parts[-2], parts[-1], _pixels(archive.extractfile(member), f"{source}:{member.name}")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{source}: neither a folder nor a readable archive of images ({error})") from error


def _pixels(file: Any, name: str) -> NDArray[np.uint8]:
    from PIL import Image as Pillow

    try:
        with Pillow.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise InputError(f"{name}: not a readable image ({error})") from error


class LabelledBatches:
    """Batches ``(images, labels)`` of normalised N x 3 x H x W float32 tensors: a map-style data set of batches.

    With ``augment`` the order is shuffled and each image shifted by up to four pixels and mirrored at random, all by
    ``(seed, epoch, i)`` only; the last, smaller batch is dropped. Otherwise the order is kept and nothing dropped.
    """

    def __init__(
        self,
        data: Labelled,
        *,
        batch: int,
        augment: bool,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        mean: tuple[float, float, float] = CIFAR_MEAN,
        std: tuple[float, float, float] = CIFAR_STD,
    ) -> None:
        if augment and len(data.labels) < batch:
            raise InputError(f"{len(data.labels)} training images are fewer than one batch of {batch}")
        self.data, self.batch, self.augment = data, batch, augment
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world
        self.mean, self.std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (mean, std))
        count = len(data.labels)
        self.order = np.random.default_rng((seed, epoch)).permutation(count) if augment else np.arange(count)

    def __len__(self) -> int:
        count = len(self.order)
        return count // self.batch if self.augment else -(-count // self.batch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import torch

        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        images = self.data.images[chosen]
        if self.augment:
            images = _jittered(images, np.random.default_rng((self.seed, self.epoch, index, 1)))
        share = slice(self.rank, None, self.world)
        images, chosen = images[share], chosen[share]
        scaled = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(scaled), torch.from_numpy(self.data.labels[chosen])


def _jittered(images: NDArray[np.uint8], rng: np.random.Generator, margin: int = 4) -> NDArray[np.uint8]:
    """Shift by up to ``margin`` pixels (mean colour enters at the edge) and mirror, each image by its own draw."""
    count, height, width, _ = images.shape
    edge = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(images, edge, constant_values=118)
    result = np.empty_like(images)
    shifts: list[list[int]] = rng.integers(0, 2 * margin + 1, (count, 2)).tolist()
    mirrors: list[int] = rng.integers(0, 2, (count,)).tolist()
    for i in range(count):
        y, x = shifts[i]
        window = padded[i, y : y + height, x : x + width]
        result[i] = window[:, ::-1] if mirrors[i] else window
    return result

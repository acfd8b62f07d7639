"""What the experiments train on: scikit-learn's digits, or pictures from the Hub or from a folder.

A folder holds ``train.parquet`` and ``test.parquet`` with a column of pictures and one of labels, or one folder of
pictures a class and split, as ``load_dataset("imagefolder")`` reads them.
"""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

DIGITS_TRAIN = 1344  # 42 batches of 32; the other 453 are the test set

# Names of data sets on the Hub, of their columns, and of the folder below --data that has one like it.
KNOWN = {
    "cifar10": {"hub": "uoft-cs/cifar10", "label": "label", "folder": "cifar10_jpeg_20k"},
    "cifar100": {"hub": "uoft-cs/cifar100", "label": "fine_label", "folder": "cifar100"},
    "mnist": {"hub": "ylecun/mnist", "label": "label", "folder": "mnist"},
    "fashion_mnist": {"hub": "zalando-datasets/fashion_mnist", "label": "label", "folder": "fashion_mnist"},
    "clothing10": {"hub": None, "label": "label", "folder": "clothing10_128px"},
}


class Pictures(torch.utils.data.Dataset):
    """Pictures in memory, as numbers around 0.

    Args:
        pixels: Shape ``(N, channels, side, side)``, or ``(N, steps, 1)`` for sequences.
        labels: Shape ``(N,)``.
        name: What the model calls its inputs.
        flip: Mirror half of them at random.
        shift: Move each by up to so many pixels at random; what comes in is black.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, name: str = "pixel_values", flip: bool = False, shift: int = 0
    ) -> None:
        self.pixels, self.labels, self.name, self.flip, self.shift = pixels, labels, name, flip, shift

    def __len__(self) -> int:
        """Give the number of pictures."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give one picture."""
        picture = self.pixels[index]
        if self.flip and torch.rand(()) < 0.5:
            picture = picture.flip(-1)
        if self.shift:
            down, right = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            side = picture.shape[-1]
            padded = torch.nn.functional.pad(picture, [self.shift] * 4, value=-1.0)
            picture = padded[:, down : down + side, right : right + side]
        return {self.name: picture, "labels": self.labels[index]}

    def first(self, count: int) -> Pictures:
        """Give the first so many, as they are: to report on."""
        return Pictures(self.pixels[:count], self.labels[:count], self.name)


def digits(classes: range = range(10)) -> tuple[Pictures, Pictures]:
    """Give scikit-learn's 1,797 handwritten digits of 8 x 8, to train on and to test on; some classes of them."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target[order])
    parts = []
    for part in (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None)):
        kept = (labels[part] >= classes.start) & (labels[part] < classes.stop)
        parts.append(Pictures(pixels[part][kept], labels[part][kept] - classes.start))
    return parts[0], parts[1]


def pictures(name: str, data: str | None, side: int, grey: bool, limit: int | None) -> tuple[Pictures, Pictures]:
    """Give the pictures of a data set, to train on and to test on.

    Args:
        name: One of ``KNOWN``, a Hub id, or a folder.
        data: Folder of the folders of ``KNOWN``; None: from the Hub.
        side: They are scaled to squares of this many pixels.
        grey: In one colour.
        limit: So many to train on, at random; None: all.

    Raises:
        SystemExit: There is no such folder.
    """
    known = KNOWN.get(name, {"hub": name, "label": "label", "folder": None})
    folder = Path(name) if known["folder"] is None else Path(data or "", known["folder"])
    if data and known["folder"] and not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}. Say where the data is with --data or HF_IMPORTANCE_DATA.")
    if folder.is_dir() and (data or known["folder"] is None):
        found = _local(folder)
    elif known["hub"] is None:
        raise SystemExit(f"{name} is not on the Hub. Say where it lies with --data or HF_IMPORTANCE_DATA.")
    else:
        found = datasets.load_dataset(known["hub"])
    test = next((found[split] for split in ("test", "validation") if split in found), None)
    if test is None:
        raise SystemExit(f"{name} has the splits {', '.join(found)}, but neither test nor validation.")
    # Folders of classes come sorted, and what is reported on is the first thousand.
    train = found["train"].shuffle(seed=0)
    train = train.select(range(min(limit or len(train), len(train))))
    label = known["label"] if known["label"] in train.column_names else "label"
    return _decoded(train, label, side, grey), _decoded(test, label, side, grey)


def _local(folder: Path) -> datasets.DatasetDict:
    files = {file.stem: str(file) for file in folder.glob("*.parquet") if file.stem in ("train", "validation", "test")}
    if files:
        return datasets.DatasetDict({split: datasets.Dataset.from_parquet(file) for split, file in files.items()})
    return datasets.load_dataset("imagefolder", data_dir=str(folder))


def _decoded(rows: datasets.Dataset, label: str, side: int, grey: bool) -> Pictures:
    column = next(name for name in rows.column_names if name in ("image", "img"))
    mode = "L" if grey else "RGB"
    arrays = [np.asarray(picture.convert(mode).resize((side, side))) for picture in rows[column]]
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels[:, None] if grey else pixels.permute(0, 3, 1, 2)
    return Pictures(pixels.float() / 127.5 - 1, torch.tensor(rows[label]))


def as_sequences(part: Pictures, seed: int = 0) -> Pictures:
    """Give pictures as sequences of pixels, all in one random order that is the same for every picture."""
    flat = part.pixels.flatten(1)
    order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed))
    return Pictures(flat[:, order, None].contiguous(), part.labels, "pixels")


def data_folder() -> str | None:
    """Give the folder that the environment names, if any."""
    return os.environ.get("HF_IMPORTANCE_DATA")

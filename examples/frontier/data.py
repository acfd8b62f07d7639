"""What the bench trains on: pictures and texts as tensors in memory, each split into train, validation and test.

A folder of data holds one folder a data set, with ``train.parquet`` and ``test.parquet``. The validation part is
carved from the training rows; the test rows are only reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

TOKENIZER = "minilm-l6-h384-fp16"
LONGEST = 32  # tokens of a text; what is longer is cut


class Examples(Dataset):
    """Examples in memory. What a loader fetches are positions, and the collator makes the batch of them in one go.

    Args:
        tensors: By name, each of ``N`` rows.
        change: Makes another batch of a training batch's pictures, such as one with flips.
    """

    def __init__(self, tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.tensors, self.change = tensors, change

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> int:
        """Give the position."""
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        """Give the positions."""
        return indices

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Make a training batch."""
        rows = torch.tensor(indices)
        batch = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return batch if self.change is None else {**batch, "inputs": self.change(batch["inputs"])}

    def batches(self, size: int = 500) -> Iterator[dict[str, Tensor]]:
        """Give all examples in order, as they are, to evaluate on."""
        for parts in zip(*(tensor.split(size) for tensor in self.tensors.values()), strict=True):
            yield dict(zip(self.tensors, parts, strict=True))

    def part(self, start: int, stop: int) -> Examples:
        """Give some of them, in order."""
        return Examples({name: tensor[start:stop] for name, tensor in self.tensors.items()}, self.change)


@dataclass(frozen=True)
class Splits:
    """The parts of a task's data, and how many words or classes there are.

    Attributes:
        train: Trained on.
        validation: Chooses learning rates.
        test: Reported.
        classes: Of the labels.
        words: Of the vocabulary, 0 for pictures.
        pretrained: Folder of the model that is fine-tuned; None: it is trained from its own initialisation.
    """

    train: Examples
    validation: Examples
    test: Examples
    classes: int
    words: int = 0
    pretrained: Path | None = None


def split(training: Examples, test: Examples, size: int, validation: int, **others: Any) -> Splits:
    """Train on the first ``size`` of the training rows, validate on the last ``validation`` of them."""
    held_out = training.part(len(training) - validation, len(training))
    return Splits(training.part(0, size), Examples(held_out.tensors), test, **others)


@lru_cache(maxsize=2)
def pictures(folder: Path) -> tuple[Examples, Examples]:
    """Read pictures as bytes, shape ``(N, channels, side, side)``."""
    return _pictures(folder, "train"), _pictures(folder, "test")


def _pictures(folder: Path, part: str) -> Examples:
    rows = Rows.from_parquet(str(folder / f"{part}.parquet"))
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in rows["image"]]))
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Examples({"inputs": pixels, "labels": torch.tensor(rows["label"])})


def with_wrong_labels(examples: Examples, share: float) -> Examples:
    """Give a share of the examples a label of another class, at random, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    labels = examples.tensors["labels"]
    wrong = torch.rand(len(labels), generator=generator) < share
    others = (labels + torch.randint(1, int(labels.max()) + 1, labels.shape, generator=generator)) % (labels.max() + 1)
    return Examples({**examples.tensors, "labels": torch.where(wrong, others, labels)}, examples.change)


def flips_and_crops(pixels: Tensor, shift: int = 4) -> Tensor:
    """Mirror half of the pictures, and move each by up to ``shift`` pixels; what comes in is black."""
    count, _, side, _ = pixels.shape
    padded = torch.nn.functional.pad(pixels, [shift] * 4)
    down, right = torch.randint(0, 2 * shift + 1, (2, count, 1))
    along = torch.arange(side)
    columns = torch.where(torch.rand(count, 1) < 0.5, along, along.flip(0)) + right
    rows = down + along
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@lru_cache(maxsize=2)
def texts(folder: Path, models: Path) -> tuple[Examples, Examples, int]:
    """Read texts as the numbers of their tokens, 0 where there is none and 1 for one that training never saw.

    Returns:
        To train on, to test on, and how many numbers there are.
    """
    tokenizer = AutoTokenizer.from_pretrained(models / TOKENIZER)
    found = []
    for part in ("train", "test"):
        rows = Rows.from_parquet(str(folder / f"{part}.parquet"))
        tokens = tokenizer(list(rows["text"]), truncation=True, max_length=LONGEST, padding="max_length")["input_ids"]
        found.append((torch.tensor(tokens), torch.tensor(rows["label"])))
    known = found[0][0].unique()
    numbers = torch.ones(int(max(tokens.max() for tokens, _ in found)) + 1, dtype=torch.long)
    numbers[known] = torch.arange(2, len(known) + 2)
    numbers[tokenizer.pad_token_id] = 0
    train, test = (Examples({"inputs": numbers[tokens], "labels": labels}) for tokens, labels in found)
    return train, test, len(known) + 2


def characters(folder: Path, length: int) -> tuple[Examples, Examples, int]:
    """Read a text as windows of characters, in a random order that is the same each time."""
    read = [(folder / f"{part}.txt").read_text() for part in ("train", "validation")]
    alphabet = {character: number for number, character in enumerate(sorted(set("".join(read))))}
    parts = []
    for text in read:
        numbers = torch.tensor([alphabet[character] for character in text])
        windows = numbers[: len(numbers) // length * length].view(-1, length)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        parts.append(Examples({"input_ids": windows[order], "labels": windows[order]}))
    return parts[0], parts[1], len(alphabet)

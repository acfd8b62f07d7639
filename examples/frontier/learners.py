"""The small models of the bench, as plain ``nn.Module`` that says its task by ``loss_type``, and its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import data
import torch
from data import Splits
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, GPT2Config, GPT2LMHeadModel

SMALL_TEXT = 64  # characters of a window


class Classifier(nn.Module):
    """Any body that gives logits."""

    loss_type = "ForSequenceClassification"

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Give logits, and with labels the mean loss first."""
        logits = self.body(inputs)
        return ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}) | {"logits": logits}


class Numbers(nn.Module):
    """Bytes as numbers around 0."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Give floats of about unit variance."""
        return pixels.float().sub(100).div(80)


def cnn(parts: Splits, width: int = 12) -> nn.Module:
    """Give two convolutions and a hidden layer, for grey pictures of 28 x 28."""
    layers = [nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return Classifier(nn.Sequential(Numbers(), *layers, nn.Linear(98 * width, 64), nn.ReLU(), nn.Linear(64, 10)))


class Residual(nn.Module):
    """Two convolutions around a shortcut, each normalised, as in ResNet-20."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's outputs."""
        hidden = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(hidden)) + self.shortcut(x)).relu()


class Frozen(nn.Module):
    """A pretrained image classifier whose BatchNorm stays as it was trained, for each side alike."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        self.net.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Frozen:
        """Switch all layers but those."""
        super().train(mode)
        for layer in self.net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Give logits of bytes."""
        return self.net(pixel_values=pixels.float().div(255).sub(0.47).div(0.25)).logits


def resnet(parts: Splits, width: int = 12, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Give a residual network of 8 layers, whose first one halves the side, for pictures in colour."""
    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), norm(width), nn.ReLU()]
    widths = (width, width, 2 * width, 4 * width)
    blocks = [Residual(inputs, outputs, norm) for inputs, outputs in pairwise(widths)]
    return Classifier(
        nn.Sequential(
            Numbers(), *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, parts.classes)
        )
    )


class TextCnn(nn.Module):
    """Words, one convolution over three of them, the largest of each filter (Kim, 2014)."""

    def __init__(self, words: int, classes: int, size: int = 64, filters: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, size, padding_idx=0)
        self.filters = nn.Conv1d(size, filters, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(filters, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Give logits."""
        return self.classifier(self.dropout(self.filters(self.words(words).transpose(1, 2)).amax(2).relu()))


class RowLstm(nn.Module):
    """LSTM that reads a picture two rows of pixels a step, and a linear classifier on its last state."""

    def __init__(self, classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(56, hidden, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Give logits."""
        states, _ = self.lstm(pixels.view(len(pixels), 14, 56))
        return self.classifier(states[:, -1])


def gpt(parts: Splits) -> nn.Module:
    """Give a GPT-2 of two layers that reads characters."""
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": SMALL_TEXT}
    config = GPT2Config(vocab_size=parts.words, bos_token_id=0, eos_token_id=0, use_cache=False, **sizes)
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Task:
    """What is trained on what, how long, and which learning rates are tried.

    Attributes:
        more_helps: Whether a longer plain run is expected to be better at the base, said before it was measured.
        load: Reads the data, from the folders of data and of models.
        model: Makes it.
        batch_size: Of a plain step.
        epochs: Of a plain run of budget 1.
        rates: The grid of learning rates.
        budgets: Lengths of plain runs, in base runs.
        sgd: SGD with momentum 0.9 and no clipping, else the Trainer's AdamW and clipping at 1.
        afterwards: Whether it was added after the others were seen, to explain one of them: it is in no summary.
    """

    more_helps: bool
    load: Callable[[Path, Path], Splits]
    model: Callable[[Splits], nn.Module]
    batch_size: int
    epochs: float
    rates: tuple[float, float, float]
    budgets: tuple[float, ...] = (0.5, 0.75, 1, 1.5, 2, 3)
    sgd: bool = False
    afterwards: bool = False


def _fashion(size: int, wrong: float = 0.0) -> Callable[[Path, Path], Splits]:
    def load(folder: Path, models: Path) -> Splits:
        train, test = data.pictures(folder / "fashion_mnist")
        parts = data.split(train, test, size, 5000, classes=10)
        # The validation labels stay right: a user who tunes has looked at them.
        return replace(parts, train=data.with_wrong_labels(parts.train, wrong))

    return load


def _animals(folder: Path, models: Path) -> Splits:
    """Animals (six of the ten classes) against vehicles: what a small network learns in an epoch or two."""
    parts = data.pictures(folder / "cifar10_jpeg_20k")
    labels = (part.tensors["labels"] for part in parts)
    animal = (((label >= 2) & (label <= 7)).long() for label in labels)
    train, test = (data.Examples({**part.tensors, "labels": label}) for part, label in zip(parts, animal, strict=True))
    return data.split(data.Examples(train.tensors, data.flips_and_crops), test, 18000, 2000, classes=2)


def _all_classes(folder: Path, models: Path) -> Splits:
    """Six thousand pictures of all ten classes, for a network that has learnt them before they were made JPEG."""
    train, test = data.pictures(folder / "cifar10_jpeg_20k")
    train = data.Examples(train.tensors, data.flips_and_crops)
    return data.split(train, test, 6000, 2000, classes=10, pretrained=models / "cifar_resnet20")


def _pretrained(parts: Splits) -> nn.Module:
    assert parts.pretrained is not None
    return Classifier(Frozen(parts.pretrained))


def _texts(name: str, size: int, validation: int, classes: int) -> Callable[[Path, Path], Splits]:
    def load(folder: Path, models: Path) -> Splits:
        train, test, words = data.texts(folder / name, models)
        return data.split(train, test, size, validation, classes=classes, words=words)

    return load


def _characters(folder: Path, models: Path) -> Splits:
    train, test, alphabet = data.characters(folder / "tinyshakespeare", SMALL_TEXT)
    return data.split(train, test.part(0, 500), 256, 250, classes=alphabet, words=alphabet)


def _text_cnn(parts: Splits) -> nn.Module:
    return Classifier(TextCnn(parts.words, parts.classes))


def _group_norm_resnet(parts: Splits) -> nn.Module:
    return resnet(parts, norm=partial(nn.GroupNorm, 4))


def _row_lstm(parts: Splits) -> nn.Module:
    return Classifier(nn.Sequential(Numbers(), RowLstm(parts.classes)))


SGD: dict[str, Any] = {"batch_size": 64, "rates": (0.02, 0.05, 0.1), "sgd": True}
ADAM: dict[str, Any] = {"batch_size": 32, "rates": (2e-3, 4e-3, 8e-3)}
TOO_LONG = (0.25, 0.5, 1, 2)
TASKS = {
    "fashion": Task(True, _fashion(55000), cnn, epochs=1, **SGD),
    "requests": Task(True, _texts("clinc150", 13500, 1500, 150), _text_cnn, epochs=2, **ADAM),
    "lstm": Task(True, _fashion(12000), _row_lstm, 64, 3, (2e-3, 5e-3, 1e-2)),
    "animals": Task(True, _animals, resnet, epochs=1, **{**SGD, "rates": (0.02, 0.05, 0.1)}),
    # The same without a batch's moments: what of the difference is BatchNorm's.
    "animals, GroupNorm": Task(
        True,
        _animals,
        _group_norm_resnet,
        epochs=1,
        budgets=(0.5, 1, 2),
        afterwards=True,
        **{**SGD, "rates": (0.02, 0.05, 0.1)},
    ),
    # Fine-tuning proper. A step takes a quarter of a second, so it is short, and has few plain lengths.
    "pictures, fine-tuned": Task(
        True, _all_classes, _pretrained, 64, 2, (0.001, 0.003, 0.01), budgets=(0.5, 1, 2), sgd=True
    ),
    "reviews, few": Task(
        False, _texts("sst2_sentences", 1000, 1500, 2), _text_cnn, epochs=10, budgets=TOO_LONG, **ADAM
    ),
    "wrong labels": Task(False, _fashion(10000, 0.1), cnn, epochs=5, budgets=TOO_LONG, **SGD),
    "requests, few": Task(False, _texts("clinc150", 1500, 1500, 150), _text_cnn, epochs=15, budgets=TOO_LONG, **ADAM),
    "characters": Task(False, _characters, gpt, 16, 10, (1e-3, 3e-3, 6e-3), budgets=TOO_LONG),
}

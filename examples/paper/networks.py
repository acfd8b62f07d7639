"""The two networks of the paper that transformers does not have, as models that ``Trainer`` trains.

Both are small by config: the same class is the paper's network and the one that a CPU trains in seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput


class WideResNetConfig(PretrainedConfig):
    """What a wide residual network is made of; the defaults are the paper's WRN-28-2.

    Args:
        depth: Layers, 6 n + 4 with n blocks in each of the three groups.
        widen: How many times wider than the narrow network, k.
        base_width: Channels of the first convolution; 16 in every published one.
        num_channels: Of the pictures.
        **kwargs: As every config takes them; ``num_labels`` among them.

    Raises:
        ValueError: ``depth`` is not 6 n + 4.
    """

    model_type = "wide_resnet"

    def __init__(self, depth: int = 28, widen: int = 2, base_width: int = 16, num_channels: int = 3, **kwargs) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, ...), but it is {depth}.")
        self.depth, self.widen, self.base_width, self.num_channels = depth, widen, base_width, num_channels
        super().__init__(**kwargs)


class Block(nn.Module):
    """Normalise, ReLU, convolve, twice, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # One group: over channels and pixels of one picture, so that examples stay independent of each other.
        self.norm1, self.norm2 = nn.GroupNorm(1, inputs), nn.GroupNorm(1, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Give the block's outputs."""
        hidden = self.norm1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return shortcut + self.conv2(self.norm2(self.conv1(hidden)).relu())


class WideResNetForImageClassification(PreTrainedModel):
    """Wide residual network (Zagoruyko and Komodakis, 2016), with layer normalisation in place of BatchNorm.

    BatchNorm mixes the examples of a batch, which no importance weight repairs; the paper's authors used layer
    normalisation too (recalled, not checked).
    """

    config_class = WideResNetConfig

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        base = config.base_width
        widths = [base, *(base * config.widen * 2**group for group in range(3))]
        layers: list[nn.Module] = [nn.Conv2d(config.num_channels, base, 3, padding=1, bias=False)]
        for group in range(3):
            for place in range((config.depth - 4) // 6):
                first = place == 0
                inputs = widths[group] if first else widths[group + 1]
                # A block that changes the size changes the width too, so its shortcut is a convolution.
                layers.append(Block(inputs, widths[group + 1], 2 if first and group > 0 else 1))
        self.body = nn.Sequential(
            *layers, nn.GroupNorm(1, widths[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(widths[3], config.num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the constructor has drawn."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Classify pictures, shape ``(b, channels, side, side)``."""
        logits = self.classifier(self.body(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class PixelLSTMConfig(PretrainedConfig):
    """What the LSTM over pixels is made of; the default is the paper's.

    Args:
        hidden_size: Units.
        **kwargs: As every config takes them; ``num_labels`` among them.
    """

    model_type = "pixel_lstm"

    def __init__(self, hidden_size: int = 128, **kwargs) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class PixelLSTMForSequenceClassification(PreTrainedModel):
    """LSTM that reads one pixel a step, and a linear classifier on its last state (section 4.4)."""

    config_class = PixelLSTMConfig

    def __init__(self, config: PixelLSTMConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.lstm = nn.LSTM(1, size, batch_first=True)
        self.classifier = nn.Linear(size, config.num_labels)
        nn.init.orthogonal_(self.lstm.weight_hh_l0)
        nn.init.zeros_(self.lstm.bias_hh_l0)
        nn.init.zeros_(self.lstm.bias_ih_l0)
        with torch.no_grad():
            self.lstm.bias_ih_l0[size : 2 * size] = 1  # the forget gate, as Keras has it: it remembers at first
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what the constructor has drawn."""

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Classify sequences of pixels, shape ``(b, steps, 1)``."""
        states, _ = self.lstm(pixels)
        logits = self.classifier(states[:, -1])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

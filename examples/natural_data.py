"""Random examples with the statistics of real ones: lengths of texts, frequencies of tokens, spectra of photographs.

They are made in a second, need no download, and cost what real ones cost: padded texts, embeddings that few tokens
share, pixels that are no white noise. Labels are uniform; there is nothing to be learned.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Percentiles of the tokens of a text, special ones included: the 6,283 speeches of the first nine tenths of
# tinyshakespeare by BERT's uncased vocabulary. 5.2 % are longer than 128 tokens.
LENGTHS = {0: 4, 5: 6, 10: 8, 20: 11, 30: 13, 40: 16, 50: 22, 60: 27, 70: 38, 80: 56, 90: 91, 95: 131, 99: 281,
           100: 798}  # fmt: skip
# Share of all tokens that the so many most frequent ones are: 6,920 sentences of film reviews (SST-2), the same
# vocabulary.
FREQUENT = {1: 0.041, 3: 0.110, 10: 0.244, 30: 0.358, 100: 0.480, 300: 0.595, 1000: 0.732, 3000: 0.872, 11565: 1.0}
# Of ImageNet's photographs, by colour, as every image processor has them.
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def tokens(count: int, vocabulary: int, generator: np.random.Generator) -> np.ndarray:
    """Draw tokens of a text by how frequent they are; 0 is left for padding."""
    shares, ranks = [0.0, *FREQUENT.values()], np.log([1, *FREQUENT])
    rank = np.ceil(np.exp(np.interp(generator.random(count), shares, ranks)) - 1e-9).astype(np.int64)
    return 1 + (rank - 1) % (vocabulary - 1)


def texts(examples: int, longest: int, vocabulary: int, classes: int, even: bool) -> list[dict[str, Tensor]]:
    """Give texts of natural lengths, cut at the longest, or all as long as it (``even``), each with a class."""
    generator = np.random.default_rng(0)
    lengths = np.interp(100 * generator.random(examples), list(LENGTHS), list(LENGTHS.values()))
    rows = []
    for length in np.full(examples, longest) if even else np.minimum(lengths.astype(int), longest):
        ids = torch.from_numpy(tokens(length, vocabulary, generator))
        label = torch.tensor(int(generator.integers(classes)))
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return rows


def blocks(examples: int, length: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Give blocks of running text, all of one length, as language models are trained on."""
    ids = torch.from_numpy(tokens(examples * length, vocabulary, np.random.default_rng(0))).view(examples, length)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def photographs(examples: int, side: int, classes: int) -> list[dict[str, Tensor]]:
    """Give noise whose amplitudes fall with 1 / frequency, as those of photographs do, normalised as ImageNet's."""
    generator = np.random.default_rng(0)
    down, across = np.fft.fftfreq(side), np.fft.rfftfreq(side)
    frequency = np.hypot(down[:, None], across)
    frequency[0, 0] = np.inf  # no mean
    rows = []
    for _ in range(examples):
        noise = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((3, side, side))) / frequency, s=(side, side))
        noise /= noise.std((1, 2), keepdims=True)
        seen = np.clip(MEAN[:, None, None] + DEVIATION[:, None, None] * noise, 0, 1)  # as a picture holds it
        pixels = (seen - MEAN[:, None, None]) / DEVIATION[:, None, None]
        label = torch.tensor(int(generator.integers(classes)))
        rows.append({"pixel_values": torch.from_numpy(pixels.astype(np.float32)), "labels": label})
    return rows


def pad(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch, as wide as its longest text."""
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True)
        if rows[0][name].ndim == 1
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }

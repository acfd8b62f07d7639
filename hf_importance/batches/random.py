"""Random numbers that are a function of a key, and leave the global streams where the Trainer has them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def key_to_seed(*key: int) -> int:
    """Give a well mixed 63-bit seed for a tuple of non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def isolated_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block, and put them back as they were behind it.

    Args:
        seed: For them.
        device: An accelerator, whose generator is put back too; it is not seeded.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would seed every accelerator too.
    torch.default_generator.manual_seed(seed)
    kind, place = ("cpu", 0) if device is None else (device.type, device.index or 0)
    try:
        with torch.random.fork_rng([place], enabled=kind != "cpu", device_type=kind):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

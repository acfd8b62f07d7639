"""Shared by all tests: no Hub, one thread, and small real data from scikit-learn."""

import gc
import os

# Tiny models: a second thread only waits. On two busy cores it made the suite six times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from hypothesis import settings
from sklearn.datasets import load_digits

# The same examples in every run, so that a change is judged by what it changes. With --hypothesis-profile=default
# hypothesis looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


# Files of few tests behind one long launch. Begun last they would be waited for by the other process.
LONG = ("test_waits", "test_distributed", "test_history_ranks", "test_notebooks", "test_gpu_command", "test_learning")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """Have the garbage collector, whom every training calls, pass over all modules: 0.1 s a run, of tiny ones most."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """1,797 handwritten digits as ``pixel_values`` (1, 8, 8) in [0, 1] and ``labels``."""
    data = load_digits()
    pixels = (data.images / 16).astype("float32")[:, None]
    return Dataset.from_dict({"pixel_values": pixels, "labels": data.target}).with_format("torch")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

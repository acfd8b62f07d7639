"""Peak memory of a training step and of scoring its pool, for a language model with a large vocabulary.

    python examples/benchmark_memory.py

Each row is a process of its own, so that its peak is its own: resident memory on a CPU, allocated memory on a GPU.
``above`` is what the row adds to the model and its data. The result stands in docs/benchmarks.md.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig

from hf_importance.batches.pool import Padding, PooledBatches
from hf_importance.heads.choose import head_of
from hf_importance.heads.sliced import SlicedHead
from hf_importance.objective.scorer import Scorer

ROWS = ("model and data", "training step", "scoring, full logits", "scoring, slices")


@dataclass
class Arguments:
    """Size of the model and the batch."""

    row: str | None = field(default=None, metadata={"help": "Run this row alone, in this process."})
    vocabulary: int = field(default=100_000, metadata={"help": "Tokens in the vocabulary."})
    batch_size: int = field(default=8, metadata={"help": "Texts in a batch."})
    length: int = field(default=256, metadata={"help": "Tokens in a text."})
    ratio: int = field(default=3, metadata={"help": "Batches in a pool."})


def peak_mib(device: str) -> float:
    """Give the highest memory this process has had, in MiB."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.accelerator.max_memory_allocated() / 2**20


def run(arguments: Arguments) -> None:
    """Do what the row says and print the peak."""
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=arguments.vocabulary, use_cache=False, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(device)
    tokens = torch.randint(3, arguments.vocabulary, (arguments.ratio, arguments.batch_size, arguments.length))
    batches = [{"input_ids": t.to(device), "labels": t.to(device)} for t in tokens]
    head = head_of(model, 0.0, None)
    if arguments.row == "training step":
        model(**batches[0]).loss.backward()
    elif arguments.row in ("scoring, full logits", "scoring, slices"):
        sliced = SlicedHead(model, head) if arguments.row == "scoring, slices" else None
        Scorer(lambda: model, head, sliced=sliced)(PooledBatches(batches, Padding()))
    print(peak_mib(device))


def main() -> None:
    """Start a process a row and print the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.row is not None:
        run(arguments)
        return
    print(f"torch {torch.__version__}; {arguments}")
    print(f"{'':24}{'peak MiB':>10}{'above MiB':>11}")
    base = 0.0
    for row in ROWS:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        base = base or peak
        print(f"{row:24}{peak:10.0f}{peak - base:11.0f}", flush=True)


if __name__ == "__main__":
    main()

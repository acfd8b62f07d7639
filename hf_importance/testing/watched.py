"""What the laws train, and what stands between a sampler and its run to see what it does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_importance.ranks import Ranks
from hf_importance.run.clock import FEWEST_PAIRS, PAIR_EVERY, PAIRS
from hf_importance.samplers.sampler import Facts, Pool, Sampler, Scored, Visits
from hf_importance.trainer import ImportanceTrainer

CLASSES = 4
REPETITIONS = 500  # of a draw, to see whether it is unbiased

# ---- What is trained ----


def toy_model(dropout: float) -> nn.Module:
    """Make a BERT of some thousand parameters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**sizes, **dropouts, num_attention_heads=2)
    config.num_labels = CLASSES
    return BertForSequenceClassification(config)


def toy_data(examples: int) -> Dataset:
    """Make texts whose first token tells the class, but for one in twelve: these stay hard."""
    generator = np.random.default_rng(0)
    tokens, labels = generator.integers(10, 50, (examples, 6)), generator.integers(0, CLASSES, examples)
    tokens[:, 0] = labels
    labels[::12] = generator.integers(0, CLASSES, len(labels[::12]))
    columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    return Dataset.from_dict(columns).with_format("torch")


# ---- What is watched ----


@dataclass
class Seen:
    """Of a sampler in a run."""

    fresh: str = ""  # its state as the run began
    faults: list[str] = field(default_factory=list)  # answers that changed, or changed something
    figures: set[int] = field(default_factory=set)  # how many it measures
    drawn: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # means as many draws estimate them


def estimate(draw: Callable[..., tuple[Tensor, Tensor]], known: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate some means over the examples by each of many draws: of 1, of what is known, of random numbers."""
    random = torch.randn(len(known), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figures = torch.cat([torch.ones_like(random[:, :1]), known.double()[:, None], random], 1)
    draws = (draw(torch.Generator().manual_seed(seed)) for seed in range(REPETITIONS))
    found = [(weights.double()[:, None] * figures[rows.long()]).mean(0) for rows, weights in draws]
    return torch.stack(found), figures.mean(0)


class Watched(Sampler):
    """Stands in front of a sampler's class, asks it twice, and remembers what came of it."""

    seen: Seen
    judged: bool  # whether to see if it is unbiased

    def begin(self, run: Facts) -> None:
        """Note the state."""
        super().begin(run)
        self.seen.fresh = repr(self.state_dict())

    def visits(self) -> Visits | None:
        """Ask; and where it is judged draw many times from the same state."""
        before, own, ask = self.state_dict(), self.run.generator, super().visits
        found, after = ask(), self.state_dict()
        if self.judged and found is not None and not found.uniform and "visits" not in self.seen.drawn:

            def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                self.load_state_dict(before)
                object.__setattr__(self.run, "generator", lambda *key: generator)
                again = ask()
                assert again is not None, "visits() gives None where, with the same state, it gave some"
                return again.index, again.weights

            self.seen.drawn["visits"] = estimate(draw, self.run.table.scores.nan_to_num())
            object.__setattr__(self.run, "generator", own)
            self.load_state_dict(after)
        return found

    def pool(self) -> Pool | None:
        """Ask twice."""
        return self._twice("pool", super().pool)

    def keep(self, pool: Scored) -> tuple[Tensor, Tensor]:
        """Ask twice; and where it is judged many times."""
        assert pool.generator is not None
        start, ask = pool.generator.get_state(), super().keep

        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return ask(replace(pool, generator=generator))

        if self.judged and "keep" not in self.seen.drawn:
            self.seen.drawn["keep"] = estimate(draw, pool.scores)
        return self._twice("keep", lambda: draw(torch.Generator().set_state(start)))

    def measure(self, seen: Scored) -> Any:
        """Ask twice."""
        ask = super().measure
        found = self._twice("measure", lambda: ask(seen))
        self.seen.figures.add(len(found))
        return found

    def _twice(self, name: str, ask: Callable[[], Any]) -> Any:
        before = repr(self.state_dict())
        first, second = ask(), ask()
        if repr(first) != repr(second):
            self.seen.faults.append(f"{name} gave {first}, and asked again {second}.")
        if repr(self.state_dict()) != before:
            self.seen.faults.append(f"{name} changed the state.")
        return first


class Never(Sampler):
    """Stands in front of a sampler's class: it learns all, and draws nothing."""

    def visits(self) -> None:
        """Name none."""
        return None

    def pool(self) -> None:
        """Ask for none."""
        return None


def in_front(kind: type, sampler: Sampler, **attributes: Any) -> Sampler:
    """Put a class in front of a sampler's own; its state is saved under the same name."""
    sampler.__class__ = type(type(sampler).__name__, (kind, type(sampler)), attributes)
    return sampler


class CountingTrainer(ImportanceTrainer):
    """Counts the collectives of each step, beyond those that it may take."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Count: one, and one more where visits are asked for."""
        with (
            mock.patch.object(Ranks, "sum", autospec=True, side_effect=Ranks.sum) as sums,
            mock.patch.object(self.sampler, "visits", side_effect=self.sampler.visits) as asked,
        ):
            found = super().get_batch_samples(*args, **kwargs)
        self.__dict__.setdefault("beyond", []).append(sums.call_count - 1 - asked.call_count)
        return found

    def check_collectives(self) -> None:
        """No more than that, but for a step in which it switches, two more, and steps by pools that are timed."""
        switches = max(entry.get("importance/switches", 0) for entry in self.state.log_history)
        timed = FEWEST_PAIRS + (switches + 1) * PAIRS + len(self.beyond) // PAIR_EVERY if self.sampler.timed else 0
        assert sum(max(beyond, 0) for beyond in self.beyond) <= switches + 2 + timed, self.beyond


class SaveWithin(TrainerCallback):
    """Saves in the middle of an accumulated step, as a just-in-time checkpoint does."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.trainer: Any = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save."""
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, None)


def outcome(trainer: Any) -> dict[str, Any]:
    """Give what runs that are the same have in common."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    found: dict[str, Any] = {"parameters": _hash(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))}
    if isinstance(trainer, ImportanceTrainer) and trainer.importance_args.importance_sampling:
        end = next(entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)
        found |= {name: end[name] for name in end if name.startswith(("importance/examples", "importance/steps"))}
        found |= {"state": trainer.sampler.state_dict(), "step": trainer.state.global_step}
        found["table"] = _hash(repr(trainer.importance_table()[:]).encode()) if trainer.sampler.remembers else ""
    return found


def leave_processes() -> None:
    """End the process group, if there is one.

    gloo's thread needs the GIL to let go of the last sum, and torch 2.13 frees the group with the GIL held while it
    waits for that thread: where a script ends right behind a run, the plain Trainer's too, 2 of 100 hang for ever.
    """
    if dist.is_initialized():
        time.sleep(0.2)
        dist.destroy_process_group()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

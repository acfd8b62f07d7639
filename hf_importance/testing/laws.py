"""The laws; see :mod:`hf_importance.testing`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from transformers import PrinterCallback, Trainer

from hf_importance.samplers.sampler import Sampler
from hf_importance.testing.watched import (
    REPETITIONS,
    CountingTrainer,
    Never,
    SaveWithin,
    Seen,
    Watched,
    in_front,
    leave_processes,
    outcome,
    toy_data,
    toy_model,
)
from hf_importance.training_args import ImportanceTrainingArguments

DEVIATIONS = 5  # of a mean of draws from the true one, in standard errors: a fair draw passes, but one in a million
SECONDS = 240  # two processes that take longer wait for each other


class SamplerLaws:
    """A subclass says what is held to them.

    Attributes:
        unbiased: Whether the sampler claims that what it draws, weighted, has the mean of what it draws from.
        draws: Whether it ever draws. Laws that held of nothing would say nothing, so this is one of them.
        steps: Optimizer steps of a run, with a checkpoint in the middle.
        examples: Of the training set.
        settings: Further training arguments.
    """

    unbiased = False
    draws = True
    steps = 24
    examples = 96
    settings: ClassVar[dict[str, Any]] = {}
    _shared: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep what laws share apart from that of others."""
        super().__init_subclass__(**kwargs)
        cls._shared = {}

    def sampler(self) -> Sampler:
        """Make the sampler: a new one each time, with the same settings."""
        raise NotImplementedError(f"{type(self).__name__}.sampler() must give the sampler that is held to the laws.")

    def test_it_draws(self, tmp_path_factory: Any) -> None:
        """Where it says so, and trains for as many steps as it was told to."""
        trainer, _, _ = self._watched(tmp_path_factory)
        self._check_steps(outcome(trainer))

    def test_never_on_it_is_the_plain_trainer(self, tmp_path: Path) -> None:
        """While it gives None: to the last bit."""
        self._check_plain(tmp_path, in_front(Never, self.sampler()))

    def test_switched_off_it_is_the_plain_trainer(self, tmp_path: Path) -> None:
        """With ``importance_sampling=False``: to the last bit."""
        self._check_plain(tmp_path, self.sampler(), importance_sampling=False)

    def test_resumed_after_a_step_it_goes_on_as_if_never_interrupted(self, tmp_path_factory: Any) -> None:
        """To the last bit."""
        whole, _, folder = self._watched(tmp_path_factory)
        assert outcome(self._train(folder / "resumed", self.sampler(), resume=folder)) == outcome(whole)

    def test_resumed_within_a_step_it_goes_on_as_if_never_interrupted(self, tmp_path: Path) -> None:
        """To the last bit: what is saved is the step's beginning. Without dropout, which would be another."""
        whole = self._train(tmp_path, self.sampler(), dropout=0.0, within=self._middle)
        resumed = self._train(tmp_path / "resumed", self.sampler(), dropout=0.0, resume=tmp_path)
        assert outcome(resumed) == outcome(whole)

    def test_asked_twice_it_says_the_same_and_changes_nothing(self, tmp_path_factory: Any) -> None:
        """``pool``, ``keep`` and ``measure``; the last always gives as many figures, which ranks add up."""
        _, seen, _ = self._watched(tmp_path_factory)
        assert not seen.faults, " ".join(seen.faults[:3])
        assert len(seen.figures) <= 1, f"measure gave now so many figures, now so many: {seen.figures}"

    def test_its_state_is_json_and_all_that_it_knows(self, tmp_path_factory: Any) -> None:
        """Another one that takes it up is as this one; ``begin`` forgets it."""
        trainer, seen, _ = self._watched(tmp_path_factory)
        this, other = trainer.sampler, self.sampler()
        other.begin(this.run)
        other.load_state_dict(json.loads(json.dumps(this.state_dict(), allow_nan=False)))
        assert other.state_dict() == this.state_dict()
        assert (other.pool(), other.active, other.log_entries()) == (this.pool(), this.active, this.log_entries())
        other.begin(this.run)
        assert repr(other.state_dict()) == seen.fresh

    def test_it_is_unbiased_where_it_says_so(self, tmp_path_factory: Any) -> None:
        """Over many draws the weighted means are those of what is drawn from, and weights have the mean 1."""
        if not self.unbiased:
            raise SkipTest("It does not say so.")
        _, seen, _ = self._watched(tmp_path_factory)
        assert seen.drawn, "nothing was drawn"
        for name, (found, means) in seen.drawn.items():
            off, errors = (found.mean(0) - means).abs(), found.std(0) / REPETITIONS**0.5
            assert bool((off <= DEVIATIONS * errors + 1e-5).all()), f"{name}: off by {off}, standard errors {errors}"

    def test_a_step_has_one_collective(self, tmp_path_factory: Any) -> None:
        """So that it costs no more on many ranks."""
        self._watched(tmp_path_factory)[0].check_collectives()

    def test_two_ranks_decide_alike(self, tmp_path: Path) -> None:
        """Two processes end with the same parameters, state, table and counts."""
        kind = type(self)
        assert "." not in kind.__qualname__, "another process must be able to import the laws by their name"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        paths = os.pathsep.join([str(Path(inspect.getfile(kind)).parent), *sys.path])
        given = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with subprocess.Popen(
            [*launcher, "-m", "hf_importance.testing.laws", kind.__module__, kind.__name__, str(tmp_path)],
            env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                printed, _ = process.communicate(timeout=SECONDS)
            finally:
                process.terminate()  # a launcher ends its processes when it is told to, not when it is killed
        assert process.returncode == 0, printed[-5000:]
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert first == second
        self._check_steps(first)

    # ---- Runs ----

    @property
    def _middle(self) -> int:
        return self.steps // 2 + 1

    def _train(
        self,
        folder: Path,
        sampler: Sampler | None,
        dropout: float = 0.1,
        resume: Path | None = None,
        within: int | None = None,
        **arguments: Any,
    ) -> Any:
        settings: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        settings |= {"max_steps": self.steps, "learning_rate": 1e-2, "logging_steps": 5, "save_strategy": "no"}
        settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
        settings |= {"importance_log": "all"}
        args = ImportanceTrainingArguments(str(folder), **{**settings, **self.settings, **arguments})
        model, data, callback = toy_model(dropout), toy_data(self.examples), SaveWithin(within)
        given: dict[str, Any] = {"model": model, "args": args, "train_dataset": data, "callbacks": [callback]}
        trainer = Trainer(**given) if sampler is None else CountingTrainer(**given, sampler=sampler)
        callback.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model waits for a second one
        try:
            trainer.train(None if resume is None else str(resume / f"checkpoint-{self._middle}"))
        finally:
            torch.set_num_threads(threads)
        return trainer

    def _watched(self, folders: Any) -> tuple[CountingTrainer, Seen, Path]:
        """Give the one run that most laws look at."""
        if "watched" not in self._shared:
            folder, seen = folders.mktemp("whole"), Seen()
            sampler = in_front(Watched, self.sampler(), seen=seen, judged=self.unbiased)
            trainer = self._train(folder, sampler, save_strategy="steps", save_steps=self._middle)
            self._shared["watched"] = trainer, seen, folder
        return self._shared["watched"]

    def _check_plain(self, folder: Path, sampler: Sampler, **arguments: Any) -> None:
        # The plain Trainer adds up the means of micro-batches for a BERT, where this package gives their mean.
        given = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, **arguments}
        if "plain" not in self._shared:
            self._shared["plain"] = outcome(self._train(folder, None, **given))
        found = outcome(self._train(folder, sampler, **given))
        assert found["parameters"] == self._shared["plain"]["parameters"]

    def _check_steps(self, found: dict[str, Any]) -> None:
        drawn = found["importance/steps_on"]
        assert found["step"] == self.steps
        assert bool(drawn) == self.draws, f"{drawn} of {self.steps} steps were drawn: try other steps and examples"


def _on_this_rank(module: str, name: str, folder: str) -> None:
    """Train on one of two ranks, and write down what came of it."""
    laws = getattr(importlib.import_module(module), name)()
    trainer = laws._train(Path(folder), laws.sampler(), per_device_train_batch_size=4)
    assert trainer.args.world_size == 2
    trainer.check_collectives()
    Path(folder, f"{trainer.args.process_index}.json").write_text(json.dumps(outcome(trainer)))
    leave_processes()


if __name__ == "__main__":
    _on_this_rank(*sys.argv[1:])

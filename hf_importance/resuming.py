"""A run goes on as if it had not been interrupted: what it begins with, takes from a checkpoint, saves into one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hf_importance.batches import (
    Reserve,
)
from hf_importance.checkpoint import (
    ImportanceStateCallback,
    changed_settings,
    resumed_position,
    save_tensors,
    saved_state,
)
from hf_importance.kappa import KappaMeter
from hf_importance.lockstep import Lockstep
from hf_importance.remembering import Remembering
from hf_importance.reporting import Report, Totals
from hf_importance.revisiting import RevisitingMixin
from hf_importance.streams import Stream
from hf_importance.switching import Switch
from hf_importance.training_args import BASELINES
from hf_importance.variance import WithoutReplacement
from hf_importance.whole_checkpoints import STATE_FILE, HalfWritten, check_whole, checkpoint_to_resume

logger = logging.getLogger(__name__)


class ResumingMixin(RevisitingMixin):
    """Begins, saves and resumes the state of importance sampling."""

    # The Trainer's state that all this began with.
    _seen_state: object

    def _begin_importance(self) -> None:
        settings = self.importance_args
        self._switch = Switch(settings.threshold, settings.tau_momentum)
        self._variance = WithoutReplacement(settings.tau_momentum)
        self._meter = KappaMeter(self.args.device)
        self._report = Report(self._sum_over_ranks)
        self._reserve: Reserve | None = None
        self._reserve_start = 0
        self._lockstep: Lockstep | None = None
        self._stream: Stream | None = None
        self._remembering: Remembering | None = None
        self._resumed_history: dict[str, Any] | None = None
        # The state before the step in progress: what is saved in the middle of a step must not hold half of it.
        self._before_step: dict[str, Any] | None = None
        self._saved_state: dict[str, Any] = {}
        self._saved_in: str | None = None
        # What the last step left on the device, of each micro-batch: scores, indices of the examples, item count.
        self._pending: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self._scored = None
        self._awaiting = False
        self._warned_nonfinite = False

    def _follow_state(self) -> None:
        """Begin anew when the Trainer did: it makes a new ``state`` for every run, and loads one to resume."""
        if self.state is self._seen_state:
            return
        self._seen_state = self.state
        self._begin_importance()
        if not hasattr(self, "_train_loader"):  # a subclass makes its own loader without asking for ours
            self._train_loader = self.callback_handler.train_dataloader
        saved = self._state_to_resume() if self.state.global_step > 0 else None
        if saved is not None:
            self._switch.load_state_dict(saved["switch"])
            self._variance.load(saved["variance"])
            self._report.totals = Totals(**saved["totals"])
            self._report.steps_on = saved["steps_on"]
            self._loss_scale.over_step = saved["loss_over_step"]
            self._meter.load(saved["kappa"], saved["training_seconds"], saved["overhead"])
            current = self._settings()
            methods = {saved["settings"]["importance_method"], current["importance_method"]}
            # Losses are no scores: a baseline's table is of no use to another method, nor another's to it.
            foreign = len(methods) > 1 and not methods.isdisjoint(BASELINES)
            self._resumed_history = None if foreign else saved["history"]
            self._reserve_start = resumed_position(saved["reserve_position"], saved["settings"], current)
            changed = changed_settings(saved["settings"], current)
            self._resumed_as_saved = changed is None
            if changed is not None and self.is_world_process_zero():
                logger.warning(
                    "Resuming from step %d with other settings than it was saved with, so not to the last bit. %s",
                    self.state.global_step,
                    changed,
                )
        # None where somebody asks for the batches of a step without training.
        if isinstance(getattr(self._train_loader, "dataset", None), IterableDataset):
            self._stream = self._stream_at(saved)
        # The Trainer may have replaced the callback by a copy from the checkpoint, or know none yet.
        self.remove_callback(ImportanceStateCallback)
        self.add_callback(self._state_callback)
        self.state.stateful_callbacks.setdefault(ImportanceStateCallback.__name__, {})

    def _state_to_resume(self) -> dict[str, Any] | None:
        """Give the checked state of the checkpoint, or None, with a warning, where it has none of this very step."""
        saved = saved_state(self.state.stateful_callbacks, f"The {STATE_FILE} of the checkpoint")
        if saved is not None and saved["step"] == self.state.global_step:
            return saved
        logger.warning(
            "The checkpoint at step %d was not written by ImportanceTrainer%s: importance sampling starts fresh, off, "
            "with tau = 1.",
            self.state.global_step,
            "" if saved is None else f", whose state in it is that of step {saved['step']}",
        )
        return None

    def _stream_at(self, saved: dict[str, Any] | None) -> Stream:
        """Give the stream at the place where the checkpoint left it, or where the Trainer goes on."""
        loader, accumulated = self._train_loader, self.args.gradient_accumulation_steps
        steps = max(-(-len(loader) // accumulated), 1) if has_length(loader) else self.state.max_steps
        epoch, trained = divmod(self.state.global_step, steps)
        skipped = 0 if self.args.ignore_data_skip else trained * accumulated
        if saved is None or self.args.ignore_data_skip:
            return Stream(loader, epoch, skipped, epoch, skipped)
        return Stream(loader, epoch, skipped, **saved["stream"])

    def _settings(self) -> dict[str, Any]:
        """Give what a run can be resumed with another value of, by the names in ``checkpoint.SETTINGS``."""
        given, data = self.importance_args, self._train_loader.dataset
        return {
            "importance_method": given.importance_method,
            "importance_score": given.importance_score,
            "presample_ratio": given.presample_ratio,
            "resampling": given.resampling,
            "tau_threshold": given.threshold,
            "tau_momentum": given.tau_momentum,
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "world_size": self.args.world_size,
            "seed": self._data_seed,
            "train_dataset length": None if isinstance(data, IterableDataset) else len(data),
        }

    def _live_state(self, stream: dict[str, int]) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "switch": self._switch.state_dict(),
            "variance": self._variance.state(),
            "steps_on": self._report.steps_on,
            "reserve_position": self._reserve_start if self._reserve is None else self._reserve.position,
            "kappa": self._meter.kappa if self._meter.measured else None,
            "training_seconds": self._meter.training,
            "overhead": self._meter.overhead,
            "stream": stream,
            "loss_over_step": self._loss_scale.over_step,
            "history": None if self._remembering is None else self._remembering.history.state_dict(),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; for a checkpoint, first bring the state up to date, on all ranks.

        A folder that is written over loses what makes it look whole first: ``trainer_state.json`` and each rank's
        random state, which the Trainer writes last.
        """
        # Only the Trainer itself calls it on all ranks; a user may well do so on one.
        if self._sampling and _internal_call and self.is_in_train and self.state is self._seen_state:
            if output_dir is not None:
                self._saved_in = output_dir
                if self.args.should_save:
                    Path(output_dir, STATE_FILE).unlink(missing_ok=True)
                Path(output_dir, f"rng_state_{self.args.process_index}.pth").unlink(missing_ok=True)
            state = self._before_step
            if state is None or state["step"] != self.state.global_step:
                self._settle()
                self._report.mark()
                state = self._live_state(self._stream_place())
            totals = dataclasses.asdict(self._report.marked())
            if self._remembering is not None:
                self._remembering.exchange()
                if output_dir is not None and self.args.should_save:
                    save_tensors(output_dir, self._remembering.history.tensors(), self.state.global_step)
            self._saved_state = {**state, "totals": totals, "settings": self._settings()}
        super().save_model(output_dir, _internal_call)

    def _stream_place(self) -> dict[str, int]:
        return {"passes": 0, "drawn": 0} if self._stream is None else self._stream.place()

    def _mark_step(self) -> None:
        self._before_step = self._live_state(self._place)
        self._report.mark()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer`` does; workers of our own, and what was set on BatchNorm layers, end with the run.

        A checkpoint is resumed from only if it is whole: True takes the newest that is, and warns of those it passes
        over.

        Raises:
            ValueError: The checkpoint is half-written, or its state of importance sampling cannot be taken up.
        """
        if self._sampling and resume_from_checkpoint:
            resume_from_checkpoint, passed_over = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
            if passed_over and self.is_world_process_zero():
                found = " ".join(map(str, passed_over))
                logger.warning("Resuming from %s, not from what is newer. %s", resume_from_checkpoint, found)
        self._resumed_folder = resume_from_checkpoint
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._sampling:
                self._report_savings()
            return result
        except BaseException:
            self._say_what_is_half_written()
            raise
        finally:
            self._hold_batch_norm(training=True, weights=None)
            if self._sampling and self._reserve is not None:
                self._reserve_start, self._reserve = self._reserve.position, None
            if self._sampling and self._remembering is not None:
                # Left to the garbage collector, worker processes that still wait are waited for, 5 s each.
                self._remembering.end_batches()

    def _report_savings(self) -> None:
        totals = self._report.totals
        uniform = totals.examples_trained + totals.examples_saved
        if self.is_world_process_zero() and uniform:
            logger.info(
                "Trained on %d examples where uniform sampling takes %d (%.1f %%), and scored %d in forward passes of "
                "their own.",
                totals.examples_trained,
                uniform,
                100 * totals.examples_trained / uniform,
                totals.examples_scored,
            )

    def _say_what_is_half_written(self) -> None:
        """Training failed, perhaps on a full disk: say which checkpoint that leaves behind half-written."""
        if not self._sampling or self._saved_in is None or not self.args.should_save:
            return
        try:
            check_whole(Path(self._saved_in))
        except HalfWritten as error:
            logger.error(
                "%s Older checkpoints are as they were: resume_from_checkpoint=True takes the newest whole one.", error
            )

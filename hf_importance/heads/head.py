"""What a head says of a loss: how it splits by example, the score of each, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_importance.batches.entries import IGNORED_LABEL, INDEX, LENGTHS, WEIGHTS


class Head:
    """A loss that is a sum over examples. ``outputs`` is what the model gave, ``inputs`` the batch.

    Attributes:
        label_names: Entries of a batch that the loss is computed from.
        ignored_label: The label that the loss leaves out.
        computes: Whether this, not the model, says what the loss is.
        cheap: Whether its losses take a few calls, not some for each example.
    """

    label_names: tuple[str, ...] = ("labels",)
    ignored_label: int = IGNORED_LABEL
    computes: bool = False
    cheap: bool = True

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the loss of each example, summed over its items: float32, shape ``(b,)``, differentiable."""
        raise NotImplementedError

    def upper_bound(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Give the norm of each loss's gradient with respect to the logits: float32, shape ``(b,)``, no graph."""
        raise NotImplementedError

    def logits(self, outputs: Any) -> list[Tensor]:
        """Give the outputs of the last layer that the loss is a function of, with their graph."""
        return [logits_of(outputs)]

    def rows(self, gradient: Tensor) -> Tensor:
        """Give a gradient at the logits by what the loss is a sum over, shape ``(rows, ...)`` flattened to two."""
        return gradient.reshape(len(gradient), -1)

    def row_norms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """Give the length of each of these rows in closed form, float64, shape ``(rows,)``; None: there is none."""
        return None

    def items(self, inputs: Mapping[str, Any]) -> Tensor:
        """Count what the mean of the loss is taken over: a scalar on the device of the labels."""
        raise NotImplementedError

    def auxiliary(self, outputs: Any) -> Tensor | None:
        """Give what the model adds to its loss besides the examples' losses, a scalar with its graph, or None."""
        return None

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what the model is called with when its loss is computed here, not by itself."""
        return {name: value for name, value in inputs.items() if name not in (*self.label_names, WEIGHTS)}

    def labels(self, inputs: Mapping[str, Any]) -> Any:
        """Give the labels of a batch, a dict of them where there are several.

        Raises:
            ValueError: One is missing.
        """
        missing = [name for name in self.label_names if inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"A batch of train_dataset has no {' and no '.join(map(repr, missing))}, only "
                f"{sorted(inputs.keys() - {INDEX, LENGTHS})}. "
                "Importance sampling scores each example by its loss: give the dataset that column (for labels, "
                "'label' or 'labels') or a data_collator that makes it, or pass importance_sampling=False."
            )
        found = {name: inputs[name] for name in self.label_names}
        return found if len(found) > 1 else next(iter(found.values()))


def logits_of(outputs: Any, name: str = "logits", position: int = 0) -> Tensor:
    """Give the logits of a model's outputs, whether a dict or a tuple, with or without a loss in front.

    Args:
        outputs: What the model returned.
        name: Entry of a dict.
        position: Which entry of a tuple, counted behind the loss.

    Raises:
        ValueError: There are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        entries = [outputs[name]] if outputs.get(name) is not None else []
    else:
        # A loss in front of a tuple has no dimension.
        entries = [entry for entry in outputs if isinstance(entry, Tensor) and entry.dim() > 0][position:]
    if not entries:
        raise ValueError(
            f"The model's outputs hold no {name!r}, and importance sampling scores an example by them. See "
            "docs/heads.md for the tasks that are known, and for how to pass a compute_loss_func for others."
        )
    return entries[0]


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """Give outputs with a loss in front, as a model gives them that was called with its labels."""
    if isinstance(outputs, Mapping):
        kind = type(outputs)
        knows = "loss" in getattr(kind, "__dataclass_fields__", ("loss",))
        return kind(**{**outputs, "loss": loss}) if knows else outputs
    return (loss, *([outputs] if isinstance(outputs, Tensor) else outputs))

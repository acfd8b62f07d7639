"""Run by ``tests/test_waits.py``: trains on the stand-in for a device, and writes down what made the host wait."""

import collections
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import toys
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_importance import ImportanceTrainer

FIRST, LAST, EXAMPLES = 24, 40, 128  # of the steps that are counted one, where all are drawn, is judged


class Counts(TrainerCallback):
    def __init__(self, device):
        self.device = device

    def on_step_end(self, args, state, control, **kwargs):
        device = self.device
        if state.global_step == FIRST:
            device.waits, device.behind = collections.Counter(), []
            self.begun = device.operations, device.moved
        if state.global_step == LAST:
            self.waits, device.waits = device.waits, None
            self.operations, self.moved = device.operations - self.begun[0], device.moved - self.begun[1]


def uneven(outputs, labels):
    return 1.0 + 9.0 * (labels == 0).float()


class OwnInputs(ImportanceTrainer):
    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "input_ids": inputs["input_ids"] + 0}


def weighted(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, weight=torch.ones_like(outputs.logits[0]).cumsum(0).detach())


CASES = [("plain", 1), ("plain", 2), ("off", 1), ("off", 2), ("on", 1), ("on", 2), ("on, cheapest pool", 2)]
CASES += [("on, inputs of its own", 1)]
CASES += [("history", 1), ("history", 2), ("auto", 1), ("class weights", 1), ("class weights, history", 1)]
ON = {"importance_method": "presample", "presample_ratio": 3.0, "tau_threshold": 1 + 1e-9, "momentum": 0.0}
WAYS = {
    "plain": {},
    "off": {**ON, "tau_threshold": 3.9},
    "on": ON,
    "on, cheapest pool": {**ON, "presample_ratio": "auto", "kappa": 0.05},
    "on, inputs of its own": ON,
    "history": {"importance_method": "history"},
    "auto": {"importance_method": "auto", "kappa": 0.9},
    "class weights": ON,
    "class weights, history": {"importance_method": "history"},
}


def trained(folder, way, accumulation, callbacks, **settings):
    """Train the toy this way, wherever the Trainer finds itself."""
    ours = way != "plain"
    common = {"max_steps": LAST + 2, "optim": "adamw_torch", "gradient_accumulation_steps": accumulation}
    args = toys.arguments(folder, **common, logging_steps=1000, **settings, **WAYS[way])
    kind = OwnInputs if way == "on, inputs of its own" else ImportanceTrainer
    trainer = (kind if ours else Trainer)(
        model=toys.bert(),
        args=args,
        train_dataset=toys.sentences(EXAMPLES),
        callbacks=callbacks,
        **({"compute_score_func": uneven} if ours else {}),
        **({"compute_loss_func": weighted} if way.startswith("class weights") else {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def result(trainer):
    """What it came to: the parameters, and how it was drawn."""
    run = getattr(trainer, "_run", None)
    drawn = {} if run is None else {"drawn": run.ledger.drawing(), "steps_on": run.state.steps_on}
    return {
        "parameters": sum(one.detach().double().square().sum().item() for one in trainer.model.parameters()),
        **drawn,
    }


def main(folder, names):
    import standin

    device, found = standin.begin(), {}
    for way, accumulation in CASES:
        if not names or way in names:
            counts = Counts(device)
            # The Trainer's own batches are moved without a wait, so that no wait of ours hides behind theirs.
            pinned = {"use_cpu": False, "dataloader_pin_memory": True, "accelerator_config": {"non_blocking": True}}
            with device:
                trainer = trained(folder, way, accumulation, [counts], **pinned)
                assert next(trainer.model.parameters()).device.type == standin.NAME
                found[f"{way}, {accumulation}"] = {
                    "waits": [[*which, number] for which, number in counts.waits.items()],
                    "behind": device.behind,
                    "operations": counts.operations,
                    "moved": counts.moved,
                    **result(trainer),
                }
    Path(folder, "waits.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Run by ``tests/test_class_weights.py`` under a launcher: learns class weights; each rank says what it saw."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import toys
from scripts import flat, make, run
from test_class_weights import WAYS

SETTINGS = {"learning_rate": 0.0, "logging_steps": 50}


def seen(outcome):
    weights = getattr(outcome.trainer, "_objective", None)
    return {
        "said": outcome.said,
        "steps_on": outcome.steps_on,
        "drawn": outcome.drawn.tolist(),
        "gradients": outcome.gradients.tolist(),
        "weights": None if weights is None else asdict(weights.weights.state),
    }


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    found = {}
    for way in ("in the model", "function", "overridden"):
        for method in (None, "presample", "history"):
            found[f"{way}, {method}"] = seen(run(WAYS[way], method, max_steps=250, **SETTINGS))
    settings = {"max_steps": 80, "save_strategy": "steps", "save_steps": 40, "learning_rate": 1e-6}
    whole = make(WAYS["function"], "history", folder / "run", **settings)
    whole.train()
    resumed = make(WAYS["function"], "history", folder / "run", **settings)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-40"))
    for name, trainer in {"whole": whole, "resumed": resumed}.items():
        found[name] = {
            "parameters": flat(trainer.model.parameters()).tolist(),
            "weights": asdict(trainer._objective.weights.state),
            "steps_on": trainer._run.state.steps_on,
        }
    for name, one in found.items():
        (folder / f"{name}.{rank}.json").write_text(json.dumps(one))
    toys.leave_processes()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

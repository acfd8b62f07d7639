"""Run by ``tests/test_sharded.py`` under a launcher: the same cases whatever shares out the model."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fsdp2_on_cpu
import torch
import toys
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_importance import ImportanceTrainer

KIND = sys.argv[1]
ARGUMENTS = {
    "fsdp2_arguments": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}},
    # Without a backend accelerate takes two CPU processes under DeepSpeed for two separate runs.
    "zero": {"use_cpu": False, "ddp_backend": "gloo"},
}


class Look(TrainerCallback):
    """Sees how many of the parameters lie on this rank between two steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sharded = all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
        self.local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


def whole(parameter):
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter


def run(folder, *, on=False, resume=None, make_score=None, **overrides):
    make = toys.always_on if on else toys.arguments
    look = Look()
    trainer = ImportanceTrainer(
        model=toys.bert(num_hidden_layers=2, initializer_range=0.5),
        args=make(folder, **{**overrides, **ARGUMENTS.get(KIND, {})}),
        train_dataset=toys.sentences(96),
        callbacks=[look],
    )
    if make_score is not None:
        trainer.compute_score_func = make_score(trainer)
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return {
        "world": trainer.args.world_size,
        "kind": trainer.accelerator.distributed_type.value,
        "parameters": torch.cat([whole(p).detach().flatten() for p in model.parameters()]).tolist(),
        "sharded": look.sharded,
        "local": look.local,
        "history": trainer.state.log_history,
        "tau": trainer.sampler.run.tau(),
        "switches": trainer._run.state.switches,
        "largest_weight": max(e.get("importance/max_weight", 1.0) for e in trainer.state.log_history),
    }


def flapping(trainer):
    """Give scores that are uneven in steps 1 to 3, so that importance sampling goes on and off again."""

    def score(outputs, labels):
        uneven = 1.0 + 4.0 * (labels == 0)
        return uneven if 1 <= trainer.state.global_step <= 3 else torch.ones(len(labels), device=labels.device)

    return score


def cases(folder, ranks):
    """Every case is the same work whatever the number of ranks: examples a step are kept equal."""
    small = {"per_device_train_batch_size": 16 // ranks, "optim": "sgd"}
    off = {"tau_threshold": 3.9, **small}
    yield "off", lambda: run(folder, **off)
    yield "off, accumulated", lambda: run(folder, gradient_accumulation_steps=3, max_steps=4, **off)
    yield "on", lambda: run(folder, on=True, max_steps=6, **small)
    yield "on, accumulated", lambda: run(folder, on=True, gradient_accumulation_steps=2, max_steps=4, **small)
    yield "switching", lambda: run(folder, on=True, make_score=flapping, tau_threshold=1.2, **small)
    adam = {"on": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **small, "optim": "adamw_torch"}
    yield "saved", lambda: run(folder / "saved", **adam)
    yield "gradient norm", lambda: run(folder, on=True, score="gradient_norm", max_steps=4, **small)
    yield "resumed", lambda: run(folder / "resumed", resume=str(folder / "saved" / "checkpoint-3"), **adam)


def main():
    if KIND.startswith("fsdp2"):
        fsdp2_on_cpu.install()
    folder, ranks, wanted = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    for name, case in cases(folder, ranks):
        if not wanted or name in wanted:
            found = case()
            (folder / f"{name}.{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    toys.leave_processes()


if __name__ == "__main__":
    main()

"""What a user's ``_prepare_inputs`` does is done once to each example that is trained on, and leaves nothing else."""

import pytest
import test_off_is_exact
import test_resume
import torch
import toys
from transformers import Trainer

from hf_importance import ImportanceTrainer

COUNTED = (0, 0, 0)  # a pixel that counts how often an image was prepared


def counting(base):
    class Counts(base):
        def _prepare_inputs(self, inputs):
            inputs["pixel_values"][(..., *COUNTED)] += 1  # in place
            inputs["labels"] = inputs["labels"] + 100  # in the batch itself
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "labels": inputs["labels"] - 100}

    return Counts


def noisy(base):
    class Noisy(base):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            name = "pixel_values" if "pixel_values" in inputs else "attention_mask"
            noise = torch.rand(inputs[name].shape)
            changed = inputs[name] + noise if name == "pixel_values" else inputs[name] * (noise < 0.8)
            return {**inputs, name: changed}

    return Noisy


def below(change):
    """The user's code below ours."""
    return type("Below", (ImportanceTrainer.__mro__[1], change(Trainer)), {})


def flat(outputs, labels):
    return torch.ones(len(labels))


def uneven(outputs, labels):
    return 1.0 + 99.0 * (labels == 0).float()


PAYS = {"presample_ratio": "auto", "tau_threshold": None}
WAYS = {
    "off": {"tau_threshold": 3.9},
    "off, timed": {**PAYS, "importance_method": "presample"},
    "pools": {"tau_threshold": 1 + 1e-9},
    "visits": {"importance_method": "history"},
    "pools of visits": {"importance_method": "two_phase", "kappa": 0.05},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [counting(ImportanceTrainer), below(counting)], ids=["above", "below"])
def test_each_example_that_is_trained_on_was_prepared_once(tmp_path, digits, kind, way, accumulation):
    data = [{**row, "pixel_values": row["pixel_values"].clone()} for row in digits.select(range(128))]
    for row in data:
        row["pixel_values"][COUNTED] = 0
    model, seen = toys.vit(), {True: [], False: []}

    def look(module, args, kwargs):
        assert not module.training or kwargs["labels"].max() < 10
        seen[module.training].append(kwargs["pixel_values"][(..., *COUNTED)])

    model.register_forward_pre_hook(look, with_kwargs=True)
    args = toys.arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=64, momentum=0.0, **WAYS[way])
    trainer = toys.run(kind, model, args, data, compute_score_func=flat if way.startswith("off") else uneven)
    on = trainer._run.state.steps_on
    assert (on == 0) == way.startswith("off")
    assert bool(seen[False]) == (way not in ("off", "visits"))
    assert all(bool((counted == 1).all()) for counted in (*seen[True], *seen[False]))


def test_random_numbers_that_it_draws_are_the_plain_trainers_while_off(tmp_path, digits):
    trainers, streams = [], []
    for base in (ImportanceTrainer, Trainer):
        recorder = toys.Recorder()
        args = toys.arguments(tmp_path, **PAYS, max_steps=9)
        more = {"compute_score_func": flat} if base is ImportanceTrainer else {}
        data = digits.select(range(100))
        trainers.append(toys.run(noisy(base), toys.vit(0.2), args, data, callbacks=[recorder], **more))
        streams.append(recorder.streams)
    assert trainers[0].sampler.run.clock.measured
    test_off_is_exact.same_run(*trainers, *streams)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_random_inputs_resumes_exactly(tmp_path, accumulation):
    kind = noisy(ImportanceTrainer)
    data = toys.sentences(128)
    test_resume.check_resume(tmp_path, data, kind=kind, gradient_accumulation_steps=accumulation)

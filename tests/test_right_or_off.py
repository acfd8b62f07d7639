"""Right or off: importance sampling is on only where the run has proved that it may be, whatever the user's script is.

Each kind of script that people write is run by the plain Trainer and by this package. Where importance sampling may
not be on, the run is the plain Trainer's to the last bit and one warning says why; where it is on, its mean gradient
is the plain Trainer's within noise. ``docs/features.md`` names the test of each of its rows.
"""

from dataclasses import replace

import pytest
import torch
import toys
from scripts import (
    CLASSES,
    EXAMPLES,
    FEATURES,
    METHODS,
    RARE,
    Classifier,
    Counting,
    Gradients,
    Script,
    Tagger,
    check_mean,
    check_off,
    check_on,
    flat,
    full_gradient,
    make,
    points,
    run,
    same,
    several,
    tokens,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, default_data_collator

from hf_importance import ImportanceTrainer

WORKERS_END = "ignore:.*multi-threaded, use of fork.*:DeprecationWarning"  # CPython's own, for any worker process

# ---- The user's own trainers ----


def own_loss(loss, **attributes):
    """A ``compute_loss`` that does not call the Trainer's."""

    def trainer(base):
        class Own(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                inputs = dict(inputs)
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                found = loss(outputs["logits"].flatten(0, -2), labels.flatten(0, outputs["logits"].dim() - 2))
                return (found, outputs) if return_outputs else found

        for name, value in attributes.items():
            setattr(Own, name, value)
        return Own

    return trainer


def after_super(change):
    """A ``compute_loss`` that changes what the Trainer's gives."""

    def trainer(base):
        class Changed(base):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                labels = inputs["labels"]
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
                loss = change(self, model, loss, outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        return Changed

    return trainer


def weighted(logits, labels):
    return F.cross_entropy(logits, labels, weight=RARE)


def weighted_labels(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=RARE)


def entropy(trainer, model, loss, logits, labels):
    p = logits.softmax(-1)
    return loss + 0.5 * (p * p.log()).sum(-1).mean()


def entropy_from_step_6(trainer, model, loss, logits, labels):
    return loss if trainer.state.global_step < 6 else entropy(trainer, model, loss, logits, labels)


def decay(trainer, model, loss, logits, labels):
    return loss + 0.1 * sum(p.square().sum() for p in model.parameters())


def own_mean(trainer, model, loss, logits, labels):
    return F.cross_entropy(logits, labels)


# ---- Losses that are another than the model's head says ----

PAST_OURS = "the loss is computed past ours (Own overrides compute_loss): call super()"
COUNTS = "examples count "
PAST_LOGITS = "the loss has a term that is no function of the logits"
LEFT = (
    "this loss is a mean over each micro-batch, and how it is brought to one over the optimizer step is left to your"
)


@pytest.mark.parametrize("below", [False, True])
def test_class_weights_of_tokens(below):
    check_off(Script(own_loss(weighted), Tagger, tokens, below=below), COUNTS)


def test_class_weights_of_tokens_in_the_models_own_loss():
    check_off(Script(model=lambda: Tagger(RARE), data=tokens), COUNTS)


@pytest.mark.parametrize("below", [False, True])
def test_weights_of_several_labels(below):
    check_off(Script(own_loss(weighted_labels), data=several, below=below), "its gradient at the logits")


def test_weights_of_several_labels_in_the_models_own_loss():
    check_off(Script(model=lambda: Classifier(RARE), data=several), "its gradient at the logits")


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("term", [entropy, decay])
def test_a_term_that_is_added(term, below):
    reason = "something is added to it"
    if below:
        reason = {entropy: "the loss is another than the model's head says", decay: PAST_LOGITS}[term]
    check_off(Script(after_super(term), below=below), reason)


def small(trainer, model, loss, logits, labels):
    """1e-5 of the loss."""
    return loss + 1e-6 * sum(p.square().sum() for p in model.parameters())


def near_the_start(trainer, model, loss, logits, labels):
    """Exactly 0 at first."""
    start = trainer.__dict__.setdefault("start", [p.detach().clone() for p in model.parameters()])
    return loss + 0.1 * sum((p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("term", [small, near_the_start])
def test_a_term_that_is_hardly_there(term):
    check_off(Script(after_super(term), below=True), PAST_LOGITS)


class Gated(Classifier):
    """Penalises its features in its own loss."""

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        return (
            outputs if labels is None else {**outputs, "loss": outputs["loss"] + 1e-4 * self.layer(x).square().mean()}
        )


def test_a_term_in_the_models_own_loss():
    check_off(Script(model=Gated), PAST_LOGITS)


def two_rare():
    """Two examples of the rare class, which the first steps do not meet."""
    rows = points(400)
    return [row for row in rows if row["labels"] < 2] + [row for row in rows if row["labels"] == 2][:2]


def test_the_weight_of_a_class_that_is_hardly_ever_met():
    """It is found within 16 steps by importance of that in which the class is met, and drawn by from then on."""
    weight = torch.tensor([1.0, 1.0, 30.0])
    ours = run(Script(model=lambda: Classifier(weight), data=two_rare), "presample", max_steps=120)
    on, weights = ours.drawn.tolist(), ours.trainer._objective.weights
    again = on.index(False, on.index(True))  # off while the weights are learnt
    assert ours.said == [] and again < 60 and weights.known and any(on[again:])
    torch.testing.assert_close(weights.of(torch.arange(3)), weight / 30, rtol=1e-3, atol=0)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("method", ["presample", "history", "auto"])
def test_an_override_that_leaves_examples_out(method, first):
    def trainer(base):
        class Filters(base):
            def compute_loss(self, model, inputs, *args, **kwargs):
                if self.state.global_step >= first:
                    inputs = {name: value[inputs["labels"] != 2] for name, value in inputs.items()}
                return super().compute_loss(model, inputs, *args, **kwargs)

        return Filters

    # Until a batch comes of which some are left out, nobody can know.
    ours = run(Script(trainer), method, max_steps=40)
    assert len(ours.said) == 1 and "the loss is computed of" in ours.said[0] and not ours.drawn[10:].any()


def test_a_step_that_is_left_out():
    def trainer(base):
        class Skips(base):
            def training_step(self, model, inputs, *args, **kwargs):
                if self.state.global_step % 5 == 3:
                    return torch.tensor(0.0)
                return super().training_step(model, inputs, *args, **kwargs)

        return Skips

    ours = run(Script(trainer), "presample", max_steps=20)
    assert len(ours.said) == 1 and not ours.drawn[5:].any()


def test_items_that_are_counted_otherwise():
    def trainer(base):
        class Counts(base):
            def _get_num_items_in_batch(self, batches, device):
                return torch.tensor(2 * sum(len(batch["labels"]) for batch in batches))

        return Counts

    check_off(Script(trainer, Counting), "counts the items of a step by itself")


def test_a_mean_of_ones_own_over_the_outputs():
    """It is not the loss that ``super()`` gave: from the second step on it is itself held against the head."""
    check_on(Script(after_super(own_mean)))


def test_a_mean_of_ones_own_below_is_the_loss_that_the_head_says():
    check_on(Script(after_super(own_mean), below=True))


def test_a_loss_that_changes_in_the_middle():
    """From step 6 on it has a term more: it was right until then, and is off from then on."""

    ours = run(Script(after_super(entropy_from_step_6)), "presample", max_steps=40)
    assert len(ours.said) == 1 and ours.drawn[1:6].any()
    assert not ours.drawn[1 + 16 + 1 :].any()  # one of 16 steps by importance is held against it


def test_a_barred_run_that_is_resumed_is_barred(tmp_path):
    script = Script(after_super(entropy_from_step_6), settings={"max_steps": 40, "save_strategy": "steps"})
    make(script, "presample", tmp_path, save_steps=20).train()
    resumed, found = make(script, "presample", tmp_path), Gradients()
    found.trainer = resumed
    resumed.add_callback(found)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert len(found.drawn) == 20 and not any(found.drawn)


# ---- Overrides that only look ----


def with_kwargs(base):
    class Passes(base):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, inputs, **kwargs)

    return Passes


def by_keyword(base):
    class Logs(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            if self.state.global_step % 20 == 10:
                self.log({"accuracy": float((outputs["logits"].argmax(-1) == inputs["labels"]).float().mean())})
            return (loss, outputs) if return_outputs else loss

    return Logs


def drops_the_count(base):
    class Short(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs, return_outputs)

    return Short


def in_the_step(base):
    class Times(base):
        def training_step(self, *args, **kwargs):
            self.steps_seen = getattr(self, "steps_seen", 0) + 1
            return super().training_step(*args, **kwargs)

    return Times


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("trainer", [with_kwargs, by_keyword, drops_the_count, in_the_step])
def test_an_override_that_calls_super_stays_on(trainer, below):
    check_on(Script(trainer, below=below), methods=("presample",), steps=60)


def test_an_override_that_calls_super_stays_on_by_history():
    check_on(Script(by_keyword), methods=("history",))


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("trainer", [by_keyword, in_the_step])
def test_accumulation_with_an_override_that_calls_super(trainer, below):
    """A mean over each micro-batch is left to who overrides it; one over the step needs nobody."""
    settings = {"gradient_accumulation_steps": 2}
    check_off(Script(trainer, below=below), LEFT, **settings)
    check_on(Script(trainer, Counting, below=below), ("presample",), steps=40, **settings)


# ---- Two losses a step, accumulation ----


def adversarial(base):
    class Adversarial(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            weight = model.layer.weight
            kept = weight.data.clone()
            weight.data.add_(0.5 * weight.grad / (weight.grad.norm() + 1e-12))
            second = self.compute_loss(
                model, self._prepare_inputs(dict(inputs)), num_items_in_batch=num_items_in_batch
            )
            self.accelerator.backward(second)
            weight.data = kept
            return loss

    return Adversarial


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_loss_in_the_training_step(accumulation, below):
    reason = "a step has 1 micro-batches, and 1 training steps with 2 losses" if accumulation == 1 else LEFT
    check_off(Script(adversarial, below=below), reason, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize("model", [Classifier, Counting])
@pytest.mark.parametrize("attributes", [{}, {"loss_is_scaled_for_ga": False}], ids=["nothing", "declared"])
def test_accumulation_with_a_loss_of_ones_own(attributes, model):
    check_off(Script(own_loss(weighted, **attributes), model), PAST_OURS, gradient_accumulation_steps=3, max_steps=9)


@pytest.mark.parametrize("below", [False, True])
def test_accumulation_with_a_loss_of_ones_own_declared_afterwards(below):
    script = Script(
        own_loss(F.cross_entropy),
        Counting,
        below=below,
        prepare=lambda trainer: setattr(trainer, "model_accepts_loss_kwargs", False),
    )
    reason = LEFT if below else PAST_OURS
    check_off(script, reason, gradient_accumulation_steps=3, max_steps=9)


@pytest.mark.parametrize("model", [Classifier, Counting])
def test_accumulation_with_the_models_own_loss_is_on(model):
    check_on(Script(model=model), methods=("presample",), gradient_accumulation_steps=2, steps=60)


class Averaging(Counting):
    """Takes the count, and divides by the examples of the micro-batch all the same, as a BERT does."""

    def forward(self, x, labels=None, **kwargs):
        return Classifier.forward(self, x, labels)


def test_accumulation_of_a_barred_run_has_the_scale_of_one_that_is_switched_off():
    # The plain Trainer would sum up the means of the micro-batches, see docs/heads.md.
    script = Script(model=lambda: Averaging(RARE))
    settings = {"gradient_accumulation_steps": 3, "max_steps": 9}
    ours = run(script, "presample", **settings)
    same(ours, run(script, "off", **settings))
    assert len(ours.said) == 1


def test_accumulation_of_a_barred_run():
    # The term is found at the second step; the first one and all others are the plain Trainer's as well.
    check_off(Script(after_super(entropy), Counting), "something is added", gradient_accumulation_steps=3, max_steps=9)


# ---- The user's own sampler and loader ----

LABELS = torch.stack([row["labels"] for row in points()])
EVEN = (1 / torch.bincount(LABELS).double())[LABELS]  # what gives each class the same share
TRAINED_ON, HELD_OUT = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(1)).split([72, 24])


class InReverse(torch.utils.data.Sampler):
    """An order of the user's own."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(range(len(self.data))[::-1])

    def __len__(self):
        return len(self.data)


def by_sampler(sampler):
    def trainer(base):
        class Sampled(base):
            def _get_train_sampler(self, *args):
                return sampler(self.train_dataset)

        return Sampled

    return trainer


def by_loader(sampler):
    def trainer(base):
        class Loads(base):
            def get_train_dataloader(self):
                return DataLoader(
                    self.train_dataset,
                    batch_size=self.args.train_batch_size,
                    collate_fn=self.data_collator,
                    sampler=sampler(self.train_dataset),
                )

        return Loads

    return trainer


def evenly(data):
    return WeightedRandomSampler(EVEN, EXAMPLES, replacement=True)


def evenly_by_its_labels(data):
    labels = torch.stack([row["labels"] for row in data])
    return WeightedRandomSampler((1 / torch.bincount(labels).double())[labels], len(labels))


def a_part(data):
    return SubsetRandomSampler(TRAINED_ON.tolist())


DRAWN_LIKE = {"evenly": EVEN / EVEN.sum(), "a part": torch.zeros(EXAMPLES).index_fill(0, TRAINED_ON, 1 / 72)}
SAMPLED = {
    "weighted": (by_sampler(evenly), "evenly"),
    "weighted, reads the data": (by_sampler(evenly_by_its_labels), "evenly"),
    "weighted, own loader": (by_loader(evenly), "evenly"),
    "subset": (by_sampler(a_part), "a part"),
    "subset, own loader": (by_loader(a_part), "a part"),
}


class Rows(Classifier):
    """Takes the number of each example, and keeps what it met in training."""

    def __init__(self):
        super().__init__()
        self.met = []

    def forward(self, x, labels=None, row=None):
        if self.training:
            self.met.append(row.clone())
        return super().forward(x, labels)


def numbered():
    return points(row=lambda label: torch.arange(len(label)))


def recorded(trainer):
    """A pass-through override that keeps the share that each row has of its step."""

    def made(base):
        class Recorded(trainer(base)):
            def compute_loss(self, model, inputs, *args, **kwargs):
                weights, _ = self._run.step.current
                items = len(inputs["row"]) if weights is None else self._objective.step_items
                shares = (torch.ones(len(inputs["row"])) if weights is None else weights) / items
                self.__dict__.setdefault("shares", []).append((inputs["row"], shares))
                return super().compute_loss(model, inputs, *args, **kwargs)

        return Recorded

    return made


def drawn_gradient(shares):
    """The gradient of the model's loss with each example counted as often as it is drawn."""
    model, rows = Classifier(), points()
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    (shares.float() * F.cross_entropy(model(x)["logits"], labels, reduction="none")).sum().backward()
    return flat(p.grad for p in model.parameters())


@pytest.mark.parametrize("method", ["presample", "auto"])
@pytest.mark.parametrize("kind", SAMPLED)
def test_a_sampler_of_ones_own_is_what_pools_are_drawn_from(kind, method):
    trainer, name = SAMPLED[kind]
    wanted, steps = DRAWN_LIKE[name].float(), 90
    script = Script(recorded(trainer), Rows, numbered)
    ours = run(script, method, max_steps=steps, learning_rate=0.0, logging_steps=50)
    assert ours.said == [] and ours.steps_on > 60
    check_mean(ours.gradients[ours.drawn], drawn_gradient(wanted))
    # The share of each class in what was trained on, and what was never to be trained on.
    each = [torch.zeros(CLASSES).index_add_(0, LABELS[rows], part) for rows, part in ours.trainer.shares]
    check_mean(torch.stack(each)[ours.drawn], torch.zeros(CLASSES).index_add_(0, LABELS, wanted))
    assert (wanted[torch.cat(ours.trainer.model.met)] > 0).all()


@pytest.mark.parametrize("kind", SAMPLED)
def test_what_is_remembered_cannot_stand_for_a_sampler_of_ones_own(kind):
    check_off(Script(SAMPLED[kind][0]), "the loader does not draw all examples alike", methods=("history",))


def test_weights_without_replacement_are_no_shares():
    def once(data):
        return WeightedRandomSampler(EVEN, EXAMPLES, replacement=False)

    check_off(Script(by_sampler(once)), "WeightedRandomSampler has replacement=False", methods=("presample",))


def part_of_the_loader(base):
    class Wraps(base):
        def get_train_dataloader(self):
            part = torch.utils.data.Subset(self.train_dataset, TRAINED_ON.tolist())
            return DataLoader(part, self.args.train_batch_size, True, collate_fn=self.data_collator)

    return Wraps


def another_loader(base):
    class Remakes(base):
        def get_train_dataloader(self):
            data = super().get_train_dataloader().dataset
            return DataLoader(data, self.args.train_batch_size, True, collate_fn=default_data_collator)

    return Remakes


@pytest.mark.parametrize("trainer", [part_of_the_loader, another_loader])
def test_another_loader_over_the_same_data(trainer):
    check_off(Script(trainer), "or is not the one that ImportanceTrainer makes", methods=("history",))
    check_on(Script(trainer), ("presample", "auto"), part() if trainer is part_of_the_loader else None, steps=60)


def part():
    return full_gradient(Script(data=lambda: [points()[i] for i in TRAINED_ON]))


ORDERED = {
    "sequential": (SequentialSampler, "in an order"),
    "own": (InReverse, "loader's InReverse may give an order"),
}


@pytest.mark.parametrize("way", [by_sampler, by_loader])
@pytest.mark.parametrize("kind", ORDERED)
def test_an_order_of_ones_own(kind, way):
    sampler, reason = ORDERED[kind]
    check_off(Script(way(sampler)), reason, methods=("presample", "history", "auto"))


def opens(worker):
    """Open in each worker what its data are read from."""
    HANDLE["file"] = points()


HANDLE = {}


class FromHandle(torch.utils.data.Dataset):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return HANDLE["file"][index]


@pytest.mark.filterwarnings(WORKERS_END)
def test_workers_are_set_up_as_the_users_own():
    def trainer(base):
        class Loads(base):
            def get_train_dataloader(self):
                return DataLoader(
                    self.train_dataset, 8, True, collate_fn=self.data_collator, num_workers=1, worker_init_fn=opens
                )

        return Loads

    ours = run(Script(trainer, data=FromHandle), "presample", max_steps=6)
    assert ours.steps_on == 5 and ours.said == []


# ---- What batches are ----


def packed(rows):
    """Two patches an example, in one row of patches, as some models of images take them."""
    return {
        "x": torch.cat([row["x"].expand(2, -1) for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


class Patches(Classifier):
    def logits(self, x):
        return self.layer(x.unflatten(0, (-1, 2)).mean(1))


def test_packed_images():
    script = Script(model=Patches, given={"data_collator": packed}, settings={"remove_unused_columns": False})
    check_off(script, "the batch entry 'x' has 16 rows for 8 examples", methods=("presample",))
    check_on(script, methods=("history",))  # where nothing is taken out of a batch it does not matter


def widening(entry, value):
    """A collator that gives batches of changing width, as padding to the longest of each does."""

    def collate(rows):
        width = 2 + sum(int(row["labels"]) for row in rows) % 31  # two alike are rare
        return {**default_data_collator(rows), entry: torch.full((len(rows), width), value)}

    return collate


class TakesMore(Classifier):
    def forward(self, x, labels=None, spectrum=None, attention_mask=None):
        return super().forward(x, labels)


@pytest.mark.parametrize(
    ("entry", "value"), [("spectrum", 1.0), ("attention_mask", -1e4)], ids=["unknown padding", "additive mask"]
)
def test_entries_of_different_shapes_whose_padding_is_not_known(entry, value):
    script = Script(
        model=TakesMore,
        given={"data_collator": widening(entry, value)},
        settings={"remove_unused_columns": False},
    )
    reason = f"the batch entry '{entry}' has rows of different shapes"
    check_off(script, reason, methods=("presample",))


def test_a_mask_is_padded_with_0():
    script = Script(
        model=TakesMore,
        given={"data_collator": widening("attention_mask", 1)},
        settings={"remove_unused_columns": False},
    )
    check_on(script, methods=("presample",), steps=60)


def twice_as_large(base):
    class Normalises(base):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "x": (inputs["x"] * 2 - 1) / 1.5}

    return Normalises


@pytest.mark.parametrize("below", [False, True])
def test_inputs_that_are_normalised_are_normalised_once(below):
    check_on(Script(twice_as_large, below=below))


@pytest.mark.parametrize(("examples", "batch"), [(8, 8), (20, 16), (32, 32), (5, 16)])
def test_few_examples(examples, batch):
    def data():
        return points(examples)

    settings = {"per_device_train_batch_size": batch, "max_steps": 6}
    few = f"train_dataset has {examples} examples, fewer than the pool of {3 * batch}"
    check_off(Script(data=data, settings=settings), few, methods=("presample",))
    ours = run(Script(data=data, settings=settings), "history", num_train_epochs=6, max_steps=-1)
    assert ours.said == [] and ours.trainer.state.global_step == 6 * -(-examples // batch)


class Positional(nn.Module):
    """Takes a tuple."""

    loss_type = "ForSequenceClassification"

    def __init__(self):
        super().__init__()
        self.inner = Classifier()

    def forward(self, x, labels):
        return self.inner(x, labels)


def test_batches_that_are_no_dict():
    def collate(rows):
        return torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])

    def trainer(base):
        class Unpacks(base):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                outputs = model(*inputs)
                return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        return Unpacks

    script = Script(trainer, Positional, given={"data_collator": collate}, settings={"remove_unused_columns": False})
    check_off(script, "a batch is a tuple and no dict")


class NoLabels(nn.Module):
    """Makes its own targets of its inputs."""

    loss_type = "ForSequenceClassification"

    def __init__(self, label="labels"):
        super().__init__()
        self.inner, self.label = Classifier(), label

    def forward(self, x, target=None):
        target = x[:, :CLASSES].argmax(-1) if target is None else target
        return self.inner(x, target)


def unlabelled():
    return [{"x": row["x"]} for row in points()]


def labelled_otherwise():
    return [{"x": row["x"], "target": row["labels"]} for row in points()]


@pytest.mark.parametrize("data", [unlabelled, labelled_otherwise])
def test_labels_that_are_missing_or_have_another_name(data):
    settings = {"label_names": ["target"]} if data is labelled_otherwise else {}
    check_off(Script(model=NoLabels, data=data, settings=settings), "A batch of train_dataset has no 'labels'")


def half_ignored():
    """The labels of whole batches are ignored, so that their mean is 0 / 0."""
    return [{**row, "labels": row["labels"] if i < 48 else torch.tensor(-100)} for i, row in enumerate(points())]


def test_a_batch_whose_labels_are_all_ignored():
    script = Script(data=half_ignored, settings={"per_device_train_batch_size": 2})
    check_off(script, "every label of a batch is ignored (-100), so its loss is 0 / 0", methods=("presample",))


def test_an_ignored_micro_batch_of_a_step_that_counts_its_items():
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    counted = full_gradient(Script(data=lambda: half_ignored()[:48]))
    script = Script(model=Counting, data=half_ignored, settings=settings)
    check_on(script, methods=("presample",), expected=counted, steps=40)


# ---- Scores of the user's own ----


def loss_of(outputs, labels):
    return F.cross_entropy(outputs["logits"], labels, reduction="none")


@pytest.mark.parametrize("method", ["presample", "history"])
def test_negative_scores_are_an_error(method):
    script = Script()
    with pytest.raises(ValueError, match=r"compute_score_func gave a score of -.*cannot be negative"):
        given = {"compute_score_func": lambda outputs, labels: loss_of(outputs, labels) - 1}
        run(replace(script, given=given), method)


def test_scores_that_become_negative_in_a_pool_are_an_error():
    calls = []

    def score(outputs, labels):
        calls.append(len(labels))
        return loss_of(outputs, labels) * (1 if len(calls) < 3 else -1)

    with pytest.raises(ValueError, match="cannot be negative"):
        run(Script(given={"compute_score_func": score}), "presample")


def test_a_score_with_a_third_argument_gets_the_batch():
    seen = []

    def score(outputs, labels, batch):
        seen.append(set(batch))
        return loss_of(outputs, labels) + batch["x"].square().sum(-1)

    ours = run(Script(given={"compute_score_func": score}), "presample")
    assert ours.steps_on > 9 and all({"x", "labels"} <= names for names in seen)


@pytest.mark.parametrize("method", ["presample", "history"])
def test_scores_of_zero_leave_the_gradient_unbiased(method):
    def score(outputs, labels):
        return (labels != 0).float()

    script = Script()
    ours = run(replace(script, given={"compute_score_func": score}), method, max_steps=250, learning_rate=0.0)
    assert ours.steps_on > 120
    check_mean(ours.gradients[ours.drawn], full_gradient(script))


# ---- Everything else that a script may be ----


class ReadsLoss(TrainerCallback):
    """Looks for a loss in every training log."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" not in logs:
            self.seen.append((logs["loss"], dict(logs)))


@pytest.mark.parametrize("method", ["presample", "history", "auto"])
def test_a_callback_that_reads_the_loss_of_every_training_log(method):
    callback = ReadsLoss()
    ours = run(Script(given={"callbacks": [callback]}), method, max_steps=120, logging_steps=5)
    assert ours.steps_on > 0 and len(callback.seen) == 24
    first = ours.drawn.tolist().index(True)
    switched = [logs.get("importance/switched_at") for _, logs in callback.seen]
    assert switched[: first // 5] == [None] * (first // 5) and switched[-1] is not None


class Noisy(Classifier):
    """Draws random numbers in evaluation as well."""

    def logits(self, x):
        return self.layer(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("method", ["presample", "history", "auto", "default"])
def test_a_model_that_draws_random_numbers_when_it_scores(method, monkeypatch):
    # Off, for such short runs do not pass these thresholds; but what scoring costs is measured.
    never = {
        "presample": {"tau_threshold": 2.7},
        "history": {"importance_method": "history", "importance_kwargs": {"margin": 50.0}},
        "auto": {"importance_method": "auto", "importance_kwargs": {"kappa": 1.0}},
        "default": {"presample_ratio": "auto", "tau_threshold": None, "importance_kwargs": {"margin": 50.0}},
    }
    monkeypatch.setitem(METHODS, "never", never[method])
    script = Script(model=Noisy)
    ours = run(script, "never")
    same(ours, run(script, None))
    assert ours.said == []


class Contrastive(nn.Module):
    """A loss that compares examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x, labels=None):
        z = self.layer(x)
        return {"loss": F.cross_entropy(z @ z.T, torch.arange(len(z))), "logits": z}


class Headless(Classifier):
    def forward(self, x, labels=None):
        return {"loss": self.loss(self.layer(x), labels), "scores": self.layer(x)}


class Detached(Classifier):
    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"loss": self.loss(logits, labels), "logits": logits.detach()}


class Probable(Classifier):
    """Gives probabilities for logits."""

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        return {**outputs, "logits": outputs["logits"].softmax(-1)}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Headless, "hold no 'logits'"),
        (Detached, "is no function of the logits"),
        (Probable, "is no function of the logits"),
    ],
)
def test_a_model_that_gives_no_logits(model, reason):
    check_off(Script(model=model), reason)


def test_a_head_that_nobody_knows():
    check_off(
        Script(model=Contrastive), "does not know how that of Contrastive splits", ("presample", "history", "auto")
    )


@pytest.mark.parametrize("model", [Classifier, Contrastive])
def test_an_evaluation_only_trainer(tmp_path, model):
    settings = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    found = [
        kind(model(), toys.arguments(tmp_path, **settings), eval_dataset=points()).evaluate()["eval_loss"]
        for kind in (Trainer, ImportanceTrainer)
    ]
    assert found[0] == found[1]


def test_split_batches():
    settings = {"accelerator_config": {"split_batches": True}}
    check_on(Script(settings=settings), methods=("presample", "history"))


# ---- compute_example_losses: the user says what the loss of each example is ----


def class_weights(outputs, inputs):
    return RARE[inputs["labels"]] * F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")


def sample_weights(outputs, inputs):
    return inputs["weight"] * F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")


def focal(outputs, inputs):
    loss = F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
    return (1 - (-loss).exp()) ** 2 * loss


TEACHER = Classifier()
TEACHER.layer.weight.data *= 2


def distillation(outputs, inputs):
    with torch.no_grad():
        teacher = TEACHER(inputs["x"])["logits"].softmax(-1)
    own = F.cross_entropy(outputs["logits"], inputs["labels"], reduction="none")
    return own + F.kl_div(outputs["logits"].log_softmax(-1), teacher, reduction="none").sum(-1)


def label_weights(outputs, inputs):
    logits, labels = outputs["logits"], inputs["labels"]
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=RARE, reduction="none").mean(-1)


def weighing():
    return points(weight=lambda label: 0.5 + label)


RECIPES = {
    "class weights": (class_weights, points),
    "sample weights": (sample_weights, weighing),
    "focal": (focal, points),
    "distillation": (distillation, points),
    "several labels": (label_weights, several),
}


KEEPS = {"remove_unused_columns": False}


def as_argument(losses, data, model):
    return Script(given={"compute_example_losses": losses}, data=data, model=model, settings=KEEPS)


def as_method(losses, data, model):
    def trainer(base):
        class Says(base):
            def compute_example_losses(self, outputs, inputs):
                return losses(outputs, inputs)

        return Says

    return Script(trainer, data=data, model=model, settings=KEEPS)


def as_plain(losses, data, model):
    """The plain Trainer with an overridden loss that takes the same mean."""

    def trainer(base):
        class Overrides(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(inputs["x"])
                loss = losses(outputs, inputs).mean()
                return (loss, outputs) if return_outputs else loss

        return Overrides

    return Script(trainer, data=data, model=model, settings=KEEPS)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", [as_argument, as_method])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_examples_switched_off(recipe, way, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6, "learning_rate": 1e-3}
    plain, ours = (
        run(as_plain(*RECIPES[recipe], Classifier), None, **settings),
        run(way(*RECIPES[recipe], Classifier), "off", **settings),
    )
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=1e-5, atol=1e-6)
    assert ours.losses == pytest.approx(plain.losses, abs=1e-6)
    assert ours.said == []


@pytest.mark.parametrize("model", [Counting, Averaging])
def test_losses_of_examples_whatever_the_model_takes(model):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 1e-3}
    plain = run(as_plain(class_weights, points, Classifier), None, **settings)
    ours = run(as_argument(class_weights, points, model), "off", **settings)
    torch.testing.assert_close(ours.gradients, plain.gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_of_examples_with_importance_sampling(recipe):
    expected = full_gradient(as_plain(*RECIPES[recipe], Classifier))
    script = as_argument(*RECIPES[recipe], Classifier)
    check_on(script, methods=("presample",), expected=expected, steps=50)
    if recipe == "sample weights":  # one that needs more than the labels
        check_on(script, methods=("history",), expected=expected)


@pytest.mark.parametrize("way", [as_argument, as_method])
def test_losses_of_examples_with_importance_sampling_and_accumulation(way):
    expected = full_gradient(as_plain(focal, points, Classifier))
    script = way(focal, points, Classifier)
    check_on(script, methods=("presample",), expected=expected, steps=60, gradient_accumulation_steps=2)


def in_batch(outputs, inputs):
    z = outputs["logits"]
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


@pytest.mark.parametrize("method", ["presample", "history"])
def test_losses_of_examples_that_depend_on_the_others(method):
    ours, plain = (
        run(as_argument(in_batch, points, Classifier), method),
        run(as_plain(in_batch, points, Classifier), None),
    )
    torch.testing.assert_close(ours.parameters, plain.parameters, rtol=1e-4, atol=1e-6)
    (said,) = ours.said
    assert ours.steps_on == 0 and "its gradient at the logits points elsewhere" in said


class Embedding(Classifier):
    """Gives no logits."""

    def forward(self, x, labels=None):
        return {"embedding": self.layer(x)}


def test_losses_of_examples_of_a_model_without_logits():
    def losses(outputs, inputs):
        return F.cross_entropy(outputs["embedding"], inputs["labels"], reduction="none")

    ours, plain = (
        run(as_argument(losses, points, Embedding), "presample"),
        run(as_plain(losses, points, Embedding), None),
    )
    torch.testing.assert_close(ours.parameters, plain.parameters, rtol=1e-4, atol=1e-6)
    (said,) = ours.said
    assert ours.steps_on == 0 and "hold no 'logits'" in said


def test_losses_of_examples_of_another_shape_are_an_error():
    script = as_argument(lambda outputs, inputs: class_weights(outputs, inputs).mean(), points, Classifier)
    with pytest.raises(ValueError, match=r"one loss an example, shape \(8,\), but it gave torch.Size\(\[\]\)"):
        run(script, "presample")


# ---- What Hugging Face's own tests of the Trainer met ----


class ListOfBatches(ImportanceTrainer):
    """Gives a list of batches for a loader."""

    def get_train_dataloader(self):
        return list(super().get_train_dataloader())


def test_a_loader_that_is_no_torch_loader_trains_as_plain_trainer_does(tmp_path, caplog):
    class PlainList(Trainer):
        def get_train_dataloader(self):
            return list(super().get_train_dataloader())

    data = toys.sentences(64)
    with caplog.at_level("WARNING", "hf_importance"):
        ours = toys.run(ListOfBatches, toys.bert(), toys.always_on(tmp_path, max_steps=4), data)
    plain = toys.run(PlainList, toys.bert(), toys.arguments(tmp_path, max_steps=4), data)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_importance")]
    assert len(said) == 1 and "its loader is a list" in said[0]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value)


class TwoOutputs(torch.nn.Module):
    """Gives a tuple: the loss, if there are labels, and two outputs."""

    def __init__(self):
        super().__init__()
        self.inner = toys.bert()
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        found = (logits, 2 * logits)
        return found if labels is None else (torch.nn.functional.cross_entropy(logits, labels), *found)


def test_predictions_are_whole_where_the_loss_of_each_example_is_given(tmp_path):
    def losses(outputs, inputs):
        return torch.nn.functional.cross_entropy(outputs[0], inputs["labels"], reduction="none")

    data = toys.sentences(64)
    torch.manual_seed(0)
    ours = ImportanceTrainer(TwoOutputs(), toys.always_on(tmp_path), train_dataset=data, compute_example_losses=losses)
    plain = Trainer(ours.model, toys.arguments(tmp_path), train_dataset=data)
    found, wanted = ours.predict(data).predictions, plain.predict(data).predictions
    assert len(found) == len(wanted) == 2
    assert all((one == other).all() for one, other in zip(found, wanted, strict=True))


class OneNumber(torch.nn.Module):
    """Gives one number an example, without a second dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6) / 50)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": input_ids.float() @ self.weight}


def test_outputs_of_one_number_an_example_are_drawn_by(tmp_path):
    def losses(outputs, inputs):
        return (outputs["logits"] - inputs["labels"].float()).square()

    arguments = toys.always_on(tmp_path, max_steps=6, learning_rate=1e-4)
    ours = ImportanceTrainer(OneNumber(), arguments, train_dataset=toys.sentences(96), compute_example_losses=losses)
    ours.train()
    assert ours.state.log_history[-1]["importance/steps_on"] >= 4


class DrawsInEvaluation(torch.nn.Module):
    """Draws a random number in every forward pass, in evaluation too."""

    loss_type = "ForSequenceClassification"

    def __init__(self):
        super().__init__()
        self.inner = toys.bert(dropout=0.1)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits + 0.05 * torch.randn(4)
        found = {"logits": logits}
        return found if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels), **found}


def test_scoring_leaves_the_random_stream_where_it_was(tmp_path):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 8}  # within an epoch
    whole = toys.run(ImportanceTrainer, DrawsInEvaluation(), toys.always_on(tmp_path, **settings), toys.sentences(96))
    assert whole.state.log_history[-1]["importance/steps_on"] >= 10
    resumed = ImportanceTrainer(
        DrawsInEvaluation(), toys.always_on(tmp_path, **settings), train_dataset=toys.sentences(96)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name

"""Every architecture's head says what its model's own loss is: in value, in gradient, by example, and per step.

The oracle is always the model itself, called with its labels; the laws are the same for all.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toys
from architectures import ARCHITECTURES, CLASSES, LENGTH, PAD, Architecture, table
from torch import Tensor, nn
from toys import arguments, check_off
from transformers import Trainer

from hf_importance import ImportanceTrainer
from hf_importance.batches.entries import WEIGHTS
from hf_importance.heads import losses, scores
from hf_importance.heads.choose import head_of
from hf_importance.heads.tasks import TokenHead
from hf_importance.objective.scorer import evaluation_mode, score_outputs

# The model's own advice on how EncoderDecoderModel is trained; we train it that way.
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")

SIZE = 8
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.25, 1.5, 0.75])


@dataclass
class Case:
    architecture: Architecture
    model: nn.Module
    batch: dict[str, Tensor]
    folder: str

    def trainer(self, kind: type[Trainer] = ImportanceTrainer, **overrides) -> Trainer:
        args = arguments(self.folder, **{"per_device_train_batch_size": SIZE, "tau_threshold": 1.5, **overrides})
        rows = split(self.architecture.batch(3 * SIZE, seed=1), 1)
        dataset = [{name: value[0] for name, value in row.items()} for row in rows]
        return kind(model=self.model, args=args, train_dataset=dataset, eval_dataset=dataset[:5])

    def scores(self, trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), evaluation_mode(self.model):
            outputs = self.model(**trainer._objective.head.model_inputs(batch))
        return score_outputs(outputs, batch, trainer._objective.head, "upper_bound")


@pytest.fixture(
    scope="module",
    params=[pytest.param(a, id=f"{a.model}, {a.task}", marks=toys.since(a.since)) for a in ARCHITECTURES],
)
def case(request, tmp_path_factory) -> Case:
    architecture = request.param
    model = architecture.build()
    return Case(architecture, model, architecture.batch(SIZE), str(tmp_path_factory.mktemp("run")))


def split(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(next(iter(batch.values())))
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, count, size)]


def scored(trainer: Trainer) -> int:
    """How many examples were scored in forward passes of their own."""
    return trainer.state.log_history[-1]["importance/examples_scored"]


def weighted(batch: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    return {**batch, WEIGHTS: weights}


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_direction_and_length(found: Tensor, expected: Tensor) -> None:
    # Entries are sums of cancelling terms: rounding is relative to the whole.
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def items(architecture: Architecture, batch: dict[str, Tensor]) -> Tensor:
    """What the mean of the model's loss is taken over, of each example."""
    if architecture.task == "causal LM":
        return (batch["labels"][:, 1:] != -100).sum(1)
    if architecture.task == "segmentation":
        return (batch["labels"] != 255).flatten(1).sum(1)
    if architecture.task in ("token classification", "masked LM", "sequence to sequence"):
        return (batch["labels"] != -100).sum(1)
    return torch.ones(len(next(iter(batch.values()))))


def without_auxiliary(model: nn.Module) -> nn.Module:
    """A mixture of experts balances the load of the whole batch, which is no sum over examples."""
    if hasattr(model, "router_aux_loss_coef"):
        model = copy.deepcopy(model)
        model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.0
    return model


def test_weights_of_one_give_the_models_own_loss_and_gradient(case):
    trainer, model = case.trainer(), case.model.train()
    freeze_batch_norm(model)  # a weighted step normalises with the running statistics
    model.zero_grad()
    own = model(**case.batch).loss
    own.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = trainer.compute_loss(model, weighted(case.batch, torch.ones(SIZE)))
    loss.backward()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    assert_same_direction_and_length(gradients(model), expected)


def test_a_weighted_loss_is_the_weighted_sum_of_the_examples_own_losses(case):
    case = Case(case.architecture, without_auxiliary(case.model), case.batch, case.folder)
    trainer, model = case.trainer(), case.model.eval()
    count = items(case.architecture, case.batch)
    with torch.no_grad():
        own = torch.stack([model(**row).loss for row in split(case.batch, 1)])
        loss = trainer.compute_loss(model, weighted(case.batch, WEIGHT))
    torch.testing.assert_close(loss, (WEIGHT * own * count).sum() / count.sum(), rtol=1e-4, atol=1e-6)


def test_a_score_is_the_norm_of_the_loss_gradient_at_the_logits(case):
    found = case.scores(case.trainer(), case.batch)
    model, expected = case.model.eval(), []
    for row, count in zip(split(case.batch, 1), items(case.architecture, case.batch), strict=True):
        outputs = model(**row)
        names = ("start_logits", "end_logits") if "start_positions" in row else ("logits",)
        parts = torch.autograd.grad(outputs.loss * count, [outputs[name] for name in names])
        expected.append(torch.cat([part.flatten() for part in parts]).norm())
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, torch.stack(expected), rtol=5e-4, atol=1e-5)


def test_a_score_does_not_change_with_the_padding_of_its_neighbours(case):
    if not case.architecture.pads or case.architecture.task == "question answering":
        pytest.skip("its inputs have one size, or its loss is a softmax over all positions, padding among them")
    longer = {name: pad(name, value) for name, value in case.batch.items()}
    trainer = case.trainer()
    torch.testing.assert_close(case.scores(trainer, longer), case.scores(trainer, case.batch), rtol=1e-4, atol=1e-6)


def pad(name: str, value: Tensor) -> Tensor:
    if value.dim() == 1 or (value.is_floating_point() and name == "labels"):
        return value
    fill = {"input_ids": PAD, "labels": -100}.get(name, 0)
    return F.pad(value, (0, 4 if value.shape[-1] == LENGTH else 90), value=fill)


@pytest.mark.parametrize("weights", [None, WEIGHT], ids=["uniform", "weighted"])
def test_every_split_of_a_step_into_micro_batches_has_the_same_loss_and_gradient(case, weights):
    case = Case(case.architecture, without_auxiliary(case.model), case.batch, case.folder)
    batch = case.batch if weights is None else weighted(case.batch, weights)
    found = [step(case, split(batch, SIZE // count)) for count in (1, 2, 4)]
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-6)
        assert_same_direction_and_length(gradient, found[0][1])


def step(
    case: Case, batches: list[dict[str, Tensor]], learn_from: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One optimizer step's loss and gradient, by the hooks that Trainer's loop calls, first on ``learn_from``."""
    # BatchNorm normalises by micro-batch, unless its statistics are frozen.
    trainer, model = case.trainer(gradient_accumulation_steps=len(batches), batch_norm="frozen"), case.model
    if learn_from is not None:
        own, count = trainer.get_batch_samples(iter(split(learn_from, SIZE // 2)), 2, torch.device("cpu"))
        trainer.training_step(model, own[0], count)
    model.zero_grad()
    drawn, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    total = sum(trainer.training_step(model, one, count) for one in drawn)
    return total, toys.gradient(model.parameters())


def freeze_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_evaluation_and_prediction_are_the_plain_trainers(case):
    ours, plain = case.trainer(gradient_accumulation_steps=2), case.trainer(Trainer)
    # As it is within a run: what the last optimizer step counted is still there.
    ours.get_batch_samples(iter(split(case.batch, SIZE // 2)), 2, torch.device("cpu"))
    metrics = [{k: v for k, v in t.evaluate().items() if k == "eval_loss"} for t in (ours, plain)]
    assert metrics[0] == metrics[1] and "eval_loss" in metrics[0]
    (found, loss), (expected, own) = predicted(ours), predicted(plain)
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()
    assert loss == own


def predicted(trainer: Trainer) -> tuple[list, float | str]:
    """What it predicts and the loss; or its error: not every release gathers the caches that some models give."""
    try:
        found = trainer.predict(trainer.eval_dataset)
    except TypeError as error:
        if "_pad_across_processes" not in str(error):
            raise
        return [], str(error)
    return nested(found.predictions), found.metrics["test_loss"]


def nested(value) -> list:
    return [leaf for entry in value for leaf in nested(entry)] if isinstance(value, tuple) else [value]


def test_a_run_goes_on_with_importance_sampling_on(case):
    case = Case(case.architecture, copy.deepcopy(case.model), case.batch, case.folder)
    trainer = case.trainer(
        tau_threshold=1 + 1e-9, momentum=0.0, per_device_train_batch_size=4, max_steps=3, learning_rate=1e-4
    )
    trainer.train()
    assert scored(trainer) > 0
    assert trainer._objective.scale.over_step in (None, case.architecture.over_step)


def test_the_docs_print_this_matrix():
    assert table() in (Path(__file__).parent.parent / "docs/heads.md").read_text()


# ---- Tokens ----


def one(model: str, task: str, tmp_path, **settings) -> Case:
    architecture = next(a for a in ARCHITECTURES if (a.model, a.task) == (model, task))
    return Case(architecture, architecture.build(**settings), architecture.batch(SIZE), str(tmp_path))


def test_tokens_are_scored_in_bounded_pieces(monkeypatch, generator):
    logits, labels = torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    expected = scores.upper_bound(logits.view(15, 11), labels.view(15)).view(3, 5)
    sizes, upper_bound = [], scores.upper_bound
    monkeypatch.setattr(scores, "PIECE", 40)
    monkeypatch.setattr(scores, "upper_bound", lambda z, *rest: sizes.append(z.numel()) or upper_bound(z, *rest))
    torch.testing.assert_close(scores.token_norms(logits, labels), expected)
    assert max(sizes) <= 40 and sum(sizes) == logits.numel()


def test_token_losses_without_a_graph_come_in_bounded_pieces(monkeypatch, generator):
    logits, labels = torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    expected = losses.token_cross_entropy(logits, labels)
    sizes, cross_entropy = [], losses.cross_entropy
    monkeypatch.setattr(losses, "PIECE", 40)
    monkeypatch.setattr(losses, "cross_entropy", lambda z, *rest: sizes.append(z.numel()) or cross_entropy(z, *rest))
    with torch.no_grad():
        torch.testing.assert_close(losses.token_cross_entropy(logits, labels), expected)
    assert max(sizes) <= 40 and sum(sizes) == logits.numel()


def test_a_well_fitted_token_keeps_its_digits():
    logits = torch.tensor([[[30.0, 0.0, 0.0], [0.0, 0.0, 30.0]]])
    found = scores.token_norms(logits, torch.tensor([[0, 2]]))
    expected = 6**0.5 * torch.tensor(-30.0).exp().item()
    assert found.flatten().tolist() == pytest.approx([expected, expected], rel=1e-5)


def test_the_sum_of_norms_bounds_a_shared_gradient_and_the_root_is_that_of_all_logits(generator):
    # The gradient at a bias that all tokens share is the sum of the tokens' gradients.
    logits, labels = torch.randn(4, 6, 5, generator=generator), torch.randint(0, 5, (4, 6), generator=generator)
    bias, leaf = torch.zeros(4, 1, 5, requires_grad=True), logits.clone().requires_grad_()
    shared, own = torch.autograd.grad(losses.token_cross_entropy(leaf + bias, labels).sum(), (bias, leaf))
    norms = scores.token_norms(logits, labels)
    assert (shared.flatten(1).norm(dim=1) <= scores.sum_of_norms(norms)).all()
    torch.testing.assert_close(scores.root_of_squares(norms), own.flatten(1).norm(dim=1))
    alike = torch.randn(1, 1, 5, generator=generator).expand(1, 6, 5)
    found = scores.token_norms(alike, torch.zeros(1, 6, dtype=torch.long))
    assert float(scores.sum_of_norms(found)) == pytest.approx(6 * float(found[0, 0]), rel=1e-6)


@pytest.mark.parametrize(
    "model, task",
    [
        ("LlamaForCausalLM", "causal LM"),
        ("GPT2LMHeadModel", "causal LM"),
        ("BertForTokenClassification", "token classification"),
        ("BertForSequenceClassification", "one class"),
        ("BertForMultipleChoice", "multiple choice"),
    ],
)
def test_label_smoothing_is_the_trainers(model, task, tmp_path):
    case = one(model, task, tmp_path)
    plain, ours = (case.trainer(kind, label_smoothing_factor=0.2) for kind in (Trainer, ImportanceTrainer))
    expected = plain.compute_loss(case.model, dict(case.batch))
    found = ours.compute_loss(case.model, weighted(case.batch, torch.ones(SIZE)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.compute_loss(case.model, dict(case.batch)), expected, rtol=0, atol=0)
    head = ours._objective.head
    outputs = case.model.eval()(**head.model_inputs(case.batch))
    (gradient,) = torch.autograd.grad(head.losses(outputs, case.batch).sum(), outputs.logits)
    torch.testing.assert_close(
        head.upper_bound(outputs, case.batch), gradient.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("model, task", [("GPT2LMHeadModel", "causal LM"), ("LlamaForCausalLM", "causal LM")])
def test_items_are_what_trainer_counts_where_the_loss_is_divided_by_it(model, task, tmp_path):
    case = one(model, task, tmp_path)
    trainer = case.trainer(max_steps=1)
    trainer.train()  # the first step of a run tells what the loss is divided by
    trainer._run = None
    case.model.train()
    _, count = trainer.get_batch_samples(iter([case.batch]), 1, torch.device("cpu"))
    assert int(trainer._objective.scale.items(case.batch)) == int(count)
    # So a step of equal weights has the same loss, on as off.
    uniform = trainer.compute_loss(case.model, dict(case.batch), num_items_in_batch=count)
    trainer._objective.step_items = float(trainer._objective.scale.items(case.batch))
    on = trainer.compute_loss(case.model, weighted(case.batch, torch.ones(SIZE)), num_items_in_batch=count)
    torch.testing.assert_close(on, uniform, rtol=1e-5, atol=1e-6)


def test_a_balancing_loss_is_added_as_often_on_as_off(tmp_path):
    case = one("MixtralForCausalLM", "causal LM", tmp_path)
    steps = [case.batch, weighted(case.batch, torch.ones(SIZE))]
    off, on = (step(case, split(batch, 4), learn_from=case.batch) for batch in steps)
    without = one("MixtralForCausalLM", "causal LM", tmp_path, router_aux_loss_coef=0.0)
    torch.testing.assert_close(on[0], off[0], rtol=1e-5, atol=1e-6)
    assert_same_direction_and_length(on[1], off[1])
    assert abs(off[0] - step(without, split(case.batch, 4))[0]) > 0.05


def test_packed_rows_bring_their_own_shifted_labels(generator):
    logits, labels = torch.randn(2, 6, 5, generator=generator), torch.randint(0, 5, (2, 6), generator=generator)
    head, shifted = TokenHead(shift=True, label_smoothing=0.0), F.pad(labels, (0, 1), value=-100)[:, 1:]
    for name in ("losses", "upper_bound"):
        packed = getattr(head, name)({"logits": logits}, {"shift_labels": shifted})
        torch.testing.assert_close(packed, getattr(head, name)({"logits": logits}, {"labels": labels}))
    assert int(head.items({"shift_labels": shifted})) == int(head.items({"labels": labels})) == 10


def test_logits_of_a_tuned_prompt_stand_in_front(generator):
    logits, labels = torch.randn(2, 8, 5, generator=generator), torch.randint(0, 5, (2, 6), generator=generator)
    found = TokenHead(shift=True, label_smoothing=0.0).losses({"logits": logits}, {"labels": labels})
    expected = F.cross_entropy(logits[:, 1:-1].transpose(1, 2), labels, reduction="none").sum(1)
    torch.testing.assert_close(found, expected)


# ---- What a model is called with ----


@pytest.mark.parametrize("model", ["T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"])
def test_a_decoder_reads_the_labels_that_its_model_would_give_it(model, tmp_path):
    case = one(model, "sequence to sequence", tmp_path)
    head, model = case.trainer()._objective.head, case.model.eval()
    given = head.model_inputs(weighted(case.batch, WEIGHT))
    assert set(given) == {"input_ids", "attention_mask", "decoder_input_ids"}
    torch.testing.assert_close(model(**given).logits, model(**case.batch).logits, rtol=0, atol=0)
    given["decoder_input_ids"] += 1
    assert (
        head.model_inputs({**given, "labels": case.batch["labels"]})["decoder_input_ids"] is given["decoder_input_ids"]
    )


# ---- Question answering ----


def test_answers_outside_the_text_are_ignored(tmp_path):
    case = one("BertForQuestionAnswering", "question answering", tmp_path)
    start, end = case.batch["start_positions"].clone(), case.batch["end_positions"].clone()
    start[2], end[2], start[3] = LENGTH, 99, -1  # outside, outside, and what transformers counts as the first token
    batch = {**case.batch, "start_positions": start, "end_positions": end}
    trainer, model = case.trainer(), case.model.eval()
    assert float(trainer._objective.head.items(batch)) == SIZE - 1
    assert float(case.scores(trainer, batch)[2]) == 0
    loss = trainer.compute_loss(model, weighted(batch, torch.ones(SIZE)))
    torch.testing.assert_close(loss, model(**batch).loss)


# ---- Losses from elsewhere ----


def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
    """A user's loss for tokens."""
    total = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def test_a_users_loss_function_works_for_tokens(tmp_path):
    case = one("BertForTokenClassification", "token classification", tmp_path)
    own, users = case.trainer(), case.trainer()
    users.compute_loss_func = summed_cross_entropy
    users._objective.head = head_of(case.model, 0.0, summed_cross_entropy)
    torch.testing.assert_close(case.scores(users, case.batch), case.scores(own, case.batch), rtol=1e-4, atol=1e-6)
    found = users.compute_loss(case.model, weighted(case.batch, WEIGHT))
    torch.testing.assert_close(found, own.compute_loss(case.model, weighted(case.batch, WEIGHT)))


def test_the_docs_loss_function_trains(tmp_path):
    code = (Path(__file__).parent.parent / "docs/heads.md").read_text().split("```python\n")[2].split("\ntrainer")[0]
    exec(code, names := {"F": F})
    case = one("BertForSequenceClassification", "one class", tmp_path)
    args = arguments(tmp_path, tau_threshold=1 + 1e-9, momentum=0.0, per_device_train_batch_size=4, max_steps=3)
    data = [{name: value[0] for name, value in row.items()} for row in split(case.architecture.batch(24), 1)]
    trainer = ImportanceTrainer(case.model, args, train_dataset=data, compute_loss_func=names["focal_loss"])
    trainer.train()
    assert scored(trainer) > 0


class Foreign(nn.Module):
    """A model from outside transformers: no config, and outputs of its own form."""

    def __init__(self, form: str, tokens: bool = False) -> None:
        super().__init__()
        self.form, self.tokens = form, tokens
        self.loss_type = "ForTokenClassification" if tokens else "ForSequenceClassification"
        self.embedding = nn.Embedding(40, 8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.embedding(input_ids)
        logits = self.classifier(hidden if self.tokens else hidden.mean(1))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if self.form == "dict":
            return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
        return (logits,) if loss is None else (loss, logits)


@pytest.mark.parametrize("tokens", [False, True], ids=["one class", "tokens"])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_a_foreign_model_says_how_its_loss_splits_by_its_loss_type(form, tokens, tmp_path):
    torch.manual_seed(0)
    task = "token classification" if tokens else "one class"
    like = next(a for a in ARCHITECTURES if a.family == "BERT" and a.task == task)
    case = Case(like, Foreign(form, tokens), like.batch(SIZE), str(tmp_path))
    model, trainer = case.model, case.trainer(tau_threshold=1 + 1e-9, momentum=0.0, max_steps=3)
    own = model(**case.batch)
    found = trainer.compute_loss(model, weighted(case.batch, torch.ones(SIZE)))
    torch.testing.assert_close(found, own["loss"] if form == "dict" else own[0])
    trainer.train()
    assert scored(trainer) > 0


@pytest.mark.parametrize(
    "name",
    [
        "DetrForObjectDetection",
        "Wav2Vec2ForCTC",
        "CLIPModel",
        "BertForPreTraining",
        "ViTMAEForPreTraining",
        "BertModel",
    ],
)
def test_losses_that_are_no_sum_over_examples_are_known_by_name(name, tmp_path, caplog, generator):
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            z = self.layer(x)
            return {"loss": (z @ z.T).square().mean(), "logits": z}

    kind = type(name, (Pairs,), {})
    assert head_of(kind(), 0.0, None) is None
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(i % 2)} for i in range(64)]
    expected = rf"how that of {name} splits.*ForTokenClassification.*compute_example_losses"
    check_off(caplog, expected, kind, arguments(tmp_path, gradient_accumulation_steps=2), data)


def test_a_loss_that_is_not_its_tasks_is_the_plain_trainers(tmp_path, caplog):
    case = one("BertForTokenClassification", "token classification", tmp_path)
    kind = type(case.model)

    class Scaled(kind):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            return {**outputs, "loss": 1.3 * outputs["loss"]} if "loss" in outputs else outputs

    def build():
        model = copy.deepcopy(case.model)
        model.__class__ = Scaled
        return model

    trainer = case.trainer(remove_unused_columns=False)
    check_off(caplog, "not the plain mean that its task stands for", build, trainer.args, trainer.train_dataset)


def test_outputs_without_logits_are_refused_in_words(tmp_path):
    case = one("BertForQuestionAnswering", "question answering", tmp_path)
    with pytest.raises(ValueError, match=r"no 'start_logits'.*docs/heads\.md"):
        case.trainer()._objective.head.losses({"logits": torch.zeros(SIZE, 2)}, case.batch)
    with pytest.raises(ValueError, match="no 'start_positions' and no 'end_positions', only"):
        case.trainer()._objective.head.labels({"input_ids": None})


class LabelsOfItsOwn(nn.Module):
    """Its task is known by its name, but its batches have no ``labels``."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Linear(3, CLASSES)

    def forward(self, x, target):
        return {"loss": F.cross_entropy(self.classifier(x), target)}


def test_without_importance_sampling_a_loss_without_labels_is_the_plain_trainers(tmp_path, generator):
    data = [{"x": torch.randn(3, generator=generator), "target": torch.tensor(i % CLASSES)} for i in range(16)]
    settings = {"importance_sampling": False, "gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": 0.1}
    args = arguments(tmp_path, per_device_train_batch_size=4, **settings)
    losses = []
    for kind in (Trainer, ImportanceTrainer):
        trainer = kind(LabelsOfItsOwn(), args, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]

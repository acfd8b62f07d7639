"""What reaches the backends: real runs, offline, read back from the files that each backend wrote.

TensorBoard is among the test requirements; the others run where ``pip install -e '.[reporting]'`` has put them.
"""

import ast
import json
import logging
import sqlite3
import struct
from pathlib import Path

import pytest
import toys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_reporting import KEYS

from hf_importance import ImportanceTrainer

OFFLINE = {
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{here}"},
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{here}", "WANDB_SILENT": "true"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{here}/mlflow.db"},
    "trackio": {"TRACKIO_DIR": "{here}"},
}


def read_tensorboard(here: Path):
    """Give every scalar as ``{name: [(step, value), ...]}``, and the hyperparameters."""
    events = EventAccumulator(str(here)).Reload()
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return points, json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])


def wandb_records(file: Path):
    """Decode an offline run: protobuf records in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:  # too little of the block is left for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_wandb(here: Path):
    import wandb

    wandb.finish()
    (file,) = here.glob("wandb/offline-run-*/run-*.wandb")
    points, config = {}, {}
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        updates = {"history": record.history.item, "config": record.config.update}.get(kind, [])
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}
        if kind == "config":
            config |= values
        for name, value in values.items() if kind == "history" else ():
            points.setdefault(name, []).append((values["train/global_step"], value))
    return points, config


def read_mlflow(here: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{here}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    points = {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in history.items()}
    return points, {name: parsed(value) for name, value in run.data.params.items()}


def parsed(value: str):
    """MLflow keeps every parameter as text."""
    try:
        return float(value)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(value, value)


def read_trackio(here: Path):
    database = sqlite3.connect(here / "huggingface.db")
    points = {}
    for (row,) in database.execute("select metrics from metrics order by step"):
        entry = json.loads(row)
        for name, value in entry.items():
            points.setdefault(name, []).append((entry["train/global_step"], value))
    ((config,),) = database.execute("select config from configs")
    database.close()
    return points, json.loads(config)


# Where each has {"momentum": 0.0} of importance_kwargs.
MOMENTUM = {
    "tensorboard": lambda found: found["importance_kwargs"]["momentum"],
    "wandb": lambda found: found["importance_kwargs"]["momentum"],
    "mlflow": lambda found: ast.literal_eval(found["importance_kwargs"])["momentum"],
    "trackio": lambda found: found["importance_kwargs"]["momentum"],
}
READ = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


@pytest.fixture
def warned():
    """Messages of transformers' warnings."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the backends' own
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the backends' own
@pytest.mark.parametrize("backend", READ)
def test_a_backend_holds_every_key_the_switch_and_the_arguments(tmp_path, digits, monkeypatch, backend, warned):
    here = tmp_path / backend
    here.mkdir()
    for name, value in OFFLINE[backend].items():
        monkeypatch.setenv(name, value.format(here=here))
    pytest.importorskip(backend, reason=f"{backend} is not installed: pip install -e '.[reporting]'")
    args = toys.always_on(tmp_path / "out", report_to=backend, max_steps=6, logging_steps=3, scoring_batch_size=24)
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    points, hyperparameters = READ[backend](here)

    prefix = "importance/" if backend == "mlflow" else "train/importance/"
    ours = {name.removeprefix(prefix): series for name, series in points.items() if name.startswith(prefix)}
    assert ours.keys() == KEYS | {"steps_on", "scoring_seconds", "largest_tau"}  # the three are of the end alone
    for key, series in ours.items():
        logged = [(e["step"], e[f"importance/{key}"]) for e in trainer.state.log_history if f"importance/{key}" in e]
        assert [step for step, _ in series] == [step for step, _ in logged]
        assert [value for _, value in series] == pytest.approx([value for _, value in logged])
    # The switch: on after the first, uniform step, between two logging steps.
    assert ours["active"] == [(3, 1.0), (6, 1.0)]
    assert ours["switches"] == ours["switched_at"] == [(3, 1), (6, 1)]
    expected = {"importance_sampling": True, "presample_ratio": 3.0, "scoring_batch_size": 24}
    assert {name: hyperparameters[name] for name in expected} == expected
    assert MOMENTUM[backend](hyperparameters) == 0.0
    # A value that a backend cannot hold is dropped with a warning. The names of the warned-about keys are in it.
    assert not [message for message in warned if "dropped" in message]


def test_report_to_none_writes_nothing_and_says_the_same(tmp_path, digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = toys.always_on(tmp_path / "out", report_to="none")
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, digits.select(range(128)))
    assert "importance/tau" in trainer.state.log_history[-2]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

"""What an importance step costs over a uniform one, on real texts and images, in seconds of the process on the CPU.

    python examples/benchmark_real_step.py --data path/to/data --models path/to/models --rounds 3

MiniLM on SST-2 and MobileNetV2 on clothing10. Uniform steps and importance steps follow each other within one run, so
both meet the same load; loading, collating and the optimizer are in them.
``--against FOLDER`` runs another version of the package in turn with this one, each run a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {"three times": (3.0, 1.0, False), "half as many again": (1.5, 0.5, True)}  # pool / b, kept / b, varies


def texts(data, models):
    """Give MiniLM, SST-2 and what pads it."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    folder = f"{models}/minilm-l6-h384-fp16"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype="float32")
    rows = Dataset.from_parquet(f"{data}/sst2_sentences/train.parquet").select(range(600))
    text, label = (
        next(c for c in rows.column_names if c in names) for names in (("text", "sentence"), ("label", "labels"))
    )
    encode = lambda batch: {**tokenizer(batch[text], truncation=True, max_length=128), "labels": batch[label]}  # noqa: E731
    return model, rows.map(encode, batched=True, remove_columns=rows.column_names), DataCollatorWithPadding(tokenizer)


def images(data, models):
    """Give MobileNetV2 and clothing10 at 96 pixels, decoded as they are read."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageClassification

    folder = f"{models}/mobilenet_v2_0.35_imagenet"
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=10, ignore_mismatched_sizes=True)
    rows = Dataset.from_parquet(f"{data}/clothing10_128px/train.parquet")

    def pixels(image):
        array = np.asarray(image.convert("RGB").resize((96, 96)), dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)

    def read(batch):
        return {"pixel_values": [pixels(image) for image in batch["image"]], "labels": batch["label"]}

    return model, rows.with_transform(read), None


def one_run(part, way, data, models, steps):
    """Print the seconds of each step by its kind, as JSON."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    from hf_importance import ImportanceTrainer, Pool, Sampler, resample

    class InTurn(Sampler):
        """Trains uniformly and by importance, step by step in turn."""

        def pool(self):
            size = self.run.batch_size
            ratio, kept, varies = KINDS[way]
            return Pool(int(ratio * size), int(kept * size), varies=varies) if self.run.step() % 2 else None

        def keep(self, pool):
            return resample(pool.scores, pool.kept, generator=pool.generator)

    class Times(TrainerCallback):
        """Seconds of the process from the end of one step to the end of the next."""

        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.process_time())

    torch.set_num_threads(1)
    set_seed(0)
    model, rows, collator = (texts if part == "text" else images)(data, models)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=32,
            max_steps=steps,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            learning_rate=1e-5,
        )
        times, kind = Times(), Trainer if way == "plain" else ImportanceTrainer
        given = {"sampler": Sampler() if way == "off" else InTurn()} if way != "plain" else {}
        trainer = kind(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=[times], **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    took = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)][3:]  # of steps 4, 5, ... counted from 0
    uniform, importance = took[0::2], took[1::2]
    print(json.dumps({"uniform": uniform, "importance": importance} if way in KINDS else {"all": took}))


def main():
    """Run all in turn, and print ratios: median, smallest and largest over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--parts", nargs="+", default=["text", "image"])
    parser.add_argument("--ways", nargs="+", default=["plain", "off", *KINDS])
    parser.add_argument("--against")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        one_run(*given.run, given.data, given.models, given.steps)
        return
    versions = {"this": str(Path(__file__).parents[1]), **({"before": given.against} if given.against else {})}
    for part in given.parts:
        found: dict[tuple[str, str], list[dict]] = {}
        for turn in range(given.rounds):
            runs = [(version, way) for way in given.ways for version in versions]
            for version, way in runs if turn % 2 else runs[::-1]:
                command = [sys.executable, __file__, "--data", given.data, "--models", given.models]
                command += ["--steps", str(given.steps), "--run", part, way]
                environment = {**os.environ, "PYTHONPATH": versions[version]}
                printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                steps = json.loads(printed.splitlines()[-1])
                found.setdefault((version, way), []).append({k: statistics.median(v) for k, v in steps.items()})
        for way in given.ways:
            for version in versions:
                if way in KINDS:
                    report(part, version, f"{way}: importance / uniform", ratios_of(found[version, way]))
                elif way == "off" and (version, "plain") in found:
                    pairs = zip(found[version, "off"], found[version, "plain"], strict=True)
                    report(part, version, "off / plain", [one["all"] / base["all"] for one, base in pairs])
            if given.against and way in KINDS:
                pairs = zip(ratios_of(found["this", way]), ratios_of(found["before", way]), strict=True)
                report(part, "this / before", f"{way}: the same", [one / before for one, before in pairs])


def ratios_of(rounds):
    """Give an importance step over a uniform one, by round."""
    return [one["importance"] / one["uniform"] for one in rounds]


def report(part, version, what, ratios):
    """Print one line."""
    print(
        f"{part:6} {version:14} {what:48} {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Kill real training processes at random moments, restart them, and see that they end as if nothing had been.

Each run trains 40 steps with the switch flapping and a checkpoint every second step. It is killed with SIGKILL, all of
its ranks, at a random moment, and started again with ``resume_from_checkpoint=True``, until it comes to its end. Told
after every restart: it resumed from the newest whole checkpoint, where "whole" means equal, file by file, to what the
run that was never killed wrote at that step. Told at the end: the parameters are equal to the bit.

    python tests/launched/killed.py --kills 50 --ranks 1 --seed 0
    python tests/launched/killed.py --kills 5 --signal SIGINT --while scoring
    python tests/launched/killed.py --kills 0 --one-rank 6      # kill one of two ranks, and time the other's end

The processes are forked from this one, which has imported everything and computed nothing, so that a restart costs
no import. Ranks find each other by the environment that ``torchrun`` sets.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import toys
from safetensors.torch import load_file

from hf_importance import ImportanceTrainer

STEPS, EVERY = 40, 2
PHASES = ("starting", "training", "scoring", "saving", "ended")


class Flapping(ImportanceTrainer):
    """Goes on and off every few steps, and says in shared memory what it is doing and where it resumed from."""

    shared = None

    def doing(self, phase):
        if self.shared is not None:
            self.shared[0] = PHASES.index(phase)

    def get_batch_samples(self, *args, **kwargs):
        found = super().get_batch_samples(*args, **kwargs)
        self.doing("training")
        return found

    def _save_checkpoint(self, *args, **kwargs):
        self.doing("saving")
        super()._save_checkpoint(*args, **kwargs)
        self.doing("training")

    def _load_from_checkpoint(self, folder, *args, **kwargs):
        super()._load_from_checkpoint(folder, *args, **kwargs)
        if self.shared is not None:
            self.shared[1] = int(Path(folder).name.split("-")[1])


def build(folder, ranks, keep):
    args = toys.always_on(
        folder, max_steps=STEPS, save_strategy="steps", save_steps=EVERY, logging_steps=1, save_total_limit=keep,
        per_device_train_batch_size=16 // ranks, ddp_timeout=60,
    )  # fmt: skip
    trainer = Flapping(toys.bert(dropout=0.1), args, train_dataset=toys.sentences(128))

    def score(outputs, labels):
        if not trainer.model.training:
            trainer.doing("scoring")
        uneven = trainer.state.global_step // 3 % 2 == 0
        return 1.0 + (labels % 3).float() if uneven else torch.ones(len(labels))

    trainer.compute_score_func = score
    return trainer


def child(folder, ranks, rank, port, shared, keep, resume):
    """Train to the end, in a process of its own; never returns."""
    status = 1
    try:
        log = os.open(f"{folder}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({**{key: str(value) for key, value in where.items()}, "MASTER_PORT": str(port)})
        trainer = build(folder, ranks, keep)
        trainer.shared = shared
        assert trainer.args.world_size == ranks
        trainer.train(resume_from_checkpoint=resume)
        trainer.doing("ended")
        if rank == 0:
            torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "end.pt")
        toys.leave_processes()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def start(folder, ranks, keep=3, resume=False):
    """Give the process ids of all ranks, and the memory in which each says what it does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids, memory = [], []
    for rank in range(ranks):
        shared = mmap.mmap(-1, 2)
        pid = os.fork()
        if pid == 0:
            child(folder, ranks, rank, port, shared, keep, resume)
        pids.append(pid)
        memory.append(shared)
    return pids, memory


def wait(pids, seconds, memory=None):
    """Give the exit statuses by process id of those that end within some seconds, counted from the first step."""
    ended, until = {}, time.monotonic() + seconds
    while len(ended) < len(pids) and time.monotonic() < until:
        if memory is not None and memory[0][0] == PHASES.index("starting"):
            until = time.monotonic() + seconds
        for pid in pids:
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return ended


def caught(pids, memory, phase, ended):
    """Stop the ranks and say whether the first is in a phase; where not, they go on. Those that ended are noted."""
    for pid in pids:
        if pid not in ended:
            os.kill(pid, signal.SIGSTOP)
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                ended[pid] = os.waitstatus_to_exitcode(status)
    if PHASES[memory[0][0]] == phase:
        return True
    for pid in pids:
        if pid not in ended:
            os.kill(pid, signal.SIGCONT)
    return False


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)  # where it was caught in a phase
    for pid in pids:
        os.waitpid(pid, 0)


def different(folder, reference):
    """Compare a checkpoint, file by file, with that of the run that was never killed; give what differs."""
    original = reference / folder.name
    try:
        state, expected = (json.loads((at / "trainer_state.json").read_text()) for at in (folder, original))
    except (OSError, ValueError) as error:
        return str(error)
    if state["global_step"] != expected["global_step"]:
        return "global_step"
    for file in original.iterdir():
        if not (folder / file.name).exists():
            return f"{file.name} is missing"
        # Times; the folder's name; and BERT notes its problem_type in its config when it first computes a loss itself,
        # which is later where a run is resumed while on.
        if file.name in ("trainer_state.json", "training_args.bin", "config.json"):
            continue
        if (folder / file.name).stat().st_size != file.stat().st_size:
            return f"{file.name} has {(folder / file.name).stat().st_size} bytes, not {file.stat().st_size}"
    model, other = (load_file(at / "model.safetensors") for at in (folder, original))
    return next((name for name in other if not torch.equal(model[name], other[name])), None)


def newest_whole(folder, reference):
    """Give the step of the newest checkpoint that is, and what is wrong with each newer one."""
    wrong = {}
    for step in sorted((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), reverse=True):
        wrong[step] = different(folder / f"checkpoint-{step}", reference)
        if wrong[step] is None:
            return step, wrong
    return 0, wrong


def uninterrupted(folder, ranks):
    """Run to the end, keeping every checkpoint, and give how long it took from its first step."""
    pids, memory = start(folder, ranks, keep=None)
    wait(pids, 0.01, memory)
    began = time.monotonic()
    if set(wait(pids, 200).values()) != {0}:
        raise SystemExit(f"the run that is not killed failed: {Path(f'{folder}.0.log').read_text()[-2000:]}")
    return time.monotonic() - began


def last_state(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["ImportanceStateCallback"]["attributes"]["importance"]
    return {name: value for name, value in saved.items() if name != "clock"}  # times


def kill_again_and_again(root, ranks, kills, random_moment, number=signal.SIGKILL, phase=None):
    reference = root / "reference"
    reference.mkdir(parents=True)
    seconds = uninterrupted(reference, ranks)
    tally, half_written, runs, killed = Counter(), 0, 0, 0
    while killed < kills:
        folder = root / f"run{runs}"
        folder.mkdir()
        runs += 1
        ended = {}
        while set(ended.values()) != {0}:
            expected, wrong = newest_whole(folder, reference)
            half_written += any(step > expected for step in wrong)
            pids, memory = start(folder, ranks, resume=expected > 0)
            # One in ten before its first step, perhaps.
            counted_from_first_step = memory if random_moment.random() < 0.9 else None
            moment = random_moment.uniform(0, 0.5) * seconds if killed < kills else 200
            ended = wait(pids, moment, counted_from_first_step)
            while phase is not None and len(ended) < ranks and not caught(pids, memory, phase, ended):
                ended.update(wait([pid for pid in pids if pid not in ended], 0.001))
            if len(ended) < ranks:
                tally[PHASES[memory[0][0]]] += 1
                kill([pid for pid in pids if pid not in ended], number)
                killed += 1
                if memory[0][0] != PHASES.index("starting") and memory[0][1] != expected:
                    raise SystemExit(f"resumed from step {memory[0][1]}, not {expected}: {wrong}")
            elif set(ended.values()) != {0}:
                raise SystemExit(f"it failed: {Path(f'{folder}.0.log').read_text()[-3000:]}")
        one, other = (torch.load(at / "end.pt") for at in (folder, reference))
        if not all(torch.equal(one[name], other[name]) for name in other):
            raise SystemExit(f"{folder} ended with other parameters")
        if last_state(folder) != last_state(reference):
            raise SystemExit(f"{folder} ended with another state of importance sampling")
        shutil.rmtree(folder)
    found = {
        "signal": number.name,
        "ranks": ranks,
        "kills": killed,
        "runs": runs,
        "killed_while": dict(tally),
        "half_written": half_written,
    }
    return {**found, "switches_a_run": last_state(reference)["run"]["switches"], "seconds_a_run": round(seconds, 1)}


def kill_one_rank(root, trials, random_moment):
    """Kill rank 1 of 2 at a random moment after its start; rank 0 must end with an error by itself."""
    found = []
    for trial in range(trials):
        folder = root / f"one{trial}"
        folder.mkdir(parents=True)
        pids, memory = start(folder, 2)
        while memory[1][0] == 0:
            time.sleep(0.01)
        time.sleep(random_moment.uniform(0.0, 0.5))
        phase = PHASES[memory[1][0]]
        began = time.monotonic()
        kill(pids[1:])
        ended = wait(pids[:1], 120)
        if not ended:
            kill(pids[:1])
            raise SystemExit("rank 0 hangs after rank 1 was killed")
        message = Path(f"{folder}.0.log").read_text().strip().splitlines()[-1]
        found.append({"while": phase, "seconds": round(time.monotonic() - began, 2), "status": ended[pids[0]],
                      "error": message[:160]})  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    parser.add_argument("--while", dest="phase", choices=PHASES, help="wait until it does this")
    parser.add_argument("--one-rank", type=int, default=0, metavar="TRIALS")
    given = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as root:
        if given.kills:
            number = signal.Signals[given.signal]
            found = kill_again_and_again(Path(root), given.ranks, given.kills, moments, number, given.phase)
            print(json.dumps(found), flush=True)
        if given.one_rank:
            print(json.dumps(kill_one_rank(Path(root), given.one_rank, moments)), flush=True)


if __name__ == "__main__":
    main()

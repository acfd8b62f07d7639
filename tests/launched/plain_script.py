"""What a user's script looks like that says nothing of CPUs: run by ``tests/test_distributed.py`` under a launcher."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import toys

from hf_importance import ImportanceTrainer

args = toys.arguments(Path(sys.argv[1]) / "out", use_cpu=False, max_steps=2)
toys.run(ImportanceTrainer, toys.bert(), args, toys.sentences())

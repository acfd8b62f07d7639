"""Run the suite's part on exactness and resume with other releases: ``python tests/try_versions.py``.

    python tests/try_versions.py                # the lowest set that pyproject.toml allows, and the newest there is
    python tests/try_versions.py 5.10.4 5.16.1  # these releases of transformers, beside

Each set gets a virtual environment of its own, of the Python that runs this. docs/versions.md has what it prints.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from hf_importance.reporting.markdown import line, lines

ROOT = Path(__file__).parents[1]
PART = ["off_is_exact", "right_or_off", "normalisation", "resume", "resume_distributed", "faults", "saved_state"]
PART += ["changed_settings", "sampler_laws"]
TOOLS = ["scikit-learn", "matplotlib", "tensorboard", "evaluate"]
TOOLS += ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]
SHOWN = ("transformers", "accelerate", "datasets", "torch")


def lowest() -> list[str]:
    """Give the lower bounds of pyproject.toml, where it has one."""
    (given,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)', given)
    return [f"{name}=={version}.*" for name, version in bounds]


def run(python: Path | str, *command: str, **given: object) -> subprocess.CompletedProcess:
    """Run it in an environment where nothing but this working tree comes in from elsewhere."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *command], env=variables, text=True, **given)


def install(folder: Path, wanted: list[str]) -> Path:
    """Make a virtual environment with these releases, and give its Python."""
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", str(folder), check=True)
    run(python, "-m", "pip", "install", "-q", *wanted, *TOOLS, check=True)
    return python


def row(python: Path | str) -> tuple[list[object], bool]:
    """Run the part, and give the cells of its line of the table and whether nothing failed."""
    names = ", ".join(f"'{name}'" for name in SHOWN)
    code = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, [{names}]))"
    versions = run(python, "-c", code, capture_output=True, check=True).stdout.split()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in PART]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
        run(python, "-m", "pytest", *options, *files, cwd=ROOT, stdout=2)
        counts = ElementTree.parse(report).find("testsuite").attrib
    total, skipped = int(counts["tests"]), int(counts["skipped"])
    failed = int(counts["failures"]) + int(counts["errors"])
    cells = [*versions, total - skipped - failed, skipped, failed, f"{float(counts['time']):.0f} s"]
    return cells, failed == 0


def made(sets: list[list[str]]) -> Iterator[Path]:
    """Make one environment at a time: with a build of torch for GPUs each takes some gigabytes."""
    for wanted in sets:
        with tempfile.TemporaryDirectory() as folder:
            yield install(Path(folder), wanted)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="of transformers, in place of the lowest and the newest")
    parser.add_argument("--torch", help="what pip is given for torch, such as torch==2.13.0; else the set's own")
    parser.add_argument("--lowest", action="store_true", help="the lowest set only")
    parser.add_argument("--python", action="append", default=[], help="of an environment that is there; makes none")
    given = parser.parse_args()
    others = ["accelerate", "datasets", "torch"]
    sets = [[f"transformers=={release}", *others] for release in given.releases]
    sets = sets or [lowest(), *([] if given.lowest else [["transformers", *others]])]
    if given.torch:
        sets = [[given.torch, *(name for name in wanted if not name.startswith("torch"))] for wanted in sets]
    fine = True
    versions = ["Python", *SHOWN]
    print(*lines([*versions, "passed", "skipped", "failed", "took"], text=len(versions)), sep="\n", flush=True)
    for python in given.python or made(sets):
        cells, passed = row(python)
        print(line(cells), flush=True)
        fine = fine and passed
    sys.exit(not fine)


if __name__ == "__main__":
    main()

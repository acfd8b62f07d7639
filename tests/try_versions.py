"""Run the suite's part on exactness and resume with other releases: ``python tests/try_versions.py``.

    python tests/try_versions.py                # the lowest set that pyproject.toml allows, and the newest there is
    python tests/try_versions.py 5.10.4 5.16.1  # these releases of transformers, beside

Each set gets a virtual environment of its own, with torch as --torch says. What it prints stands in docs/versions.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
PART = ["off_is_exact", "right_or_off", "normalisation", "resume", "resume_distributed", "faults", "saved_state"]
PART += ["changed_settings", "sampler_laws"]
TOOLS = ["scikit-learn", "matplotlib", "tensorboard", "evaluate", "pytest", "pytest-timeout", "pytest-xdist"]
SHOWN = ("transformers", "accelerate", "datasets", "torch")


def lowest() -> list[str]:
    """Give the lower bounds of pyproject.toml, of all but torch."""
    (given,) = re.findall(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)', given)
    return [f"{name}=={version}.*" for name, version in bounds if name != "torch"]


def run(python: Path | str, *command: str, **given: object) -> subprocess.CompletedProcess:
    """Run it in an environment where nothing but this working tree comes in from elsewhere."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *command], env=variables, text=True, **given)


def install(folder: Path, wanted: list[str], torch: str) -> Path:
    """Make a virtual environment with these releases, and give its Python."""
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", str(folder), check=True)
    run(python, "-m", "pip", "install", "-q", torch, *wanted, *TOOLS, "hypothesis", check=True)
    return python


def row(python: Path | str, folder: Path) -> tuple[str, bool]:
    """Run the part, and give its row of the table and whether nothing failed."""
    names = ", ".join(f"'{name}'" for name in SHOWN)
    code = f"import platform, importlib.metadata as m; print(platform.python_version(), *map(m.version, [{names}]))"
    versions = run(python, "-c", code, capture_output=True, check=True).stdout.split()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in PART]
    report = folder / "report.xml"
    run(
        python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}", *files, cwd=ROOT, stdout=2
    )
    counts = ElementTree.parse(report).find("testsuite").attrib
    total, skipped = int(counts["tests"]), int(counts["skipped"])
    failed = int(counts["failures"]) + int(counts["errors"])
    cells = [*versions, total - skipped - failed, skipped, failed, f"{float(counts['time']):.0f} s"]
    return "| " + " | ".join(map(str, cells)) + " |", failed == 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", help="of transformers, in place of the lowest and the newest")
    parser.add_argument("--torch", default="torch", help="what pip is given for torch, such as torch==2.13.0")
    parser.add_argument("--lowest", action="store_true", help="the lowest set only")
    parser.add_argument("--python", action="append", default=[], help="of an environment that is there; makes none")
    given = parser.parse_args()
    sets = [[f"transformers=={release}", "accelerate", "datasets"] for release in given.releases]
    newest = [] if given.lowest else [["transformers", "accelerate", "datasets"]]
    sets = sets or [lowest(), *newest]
    fine = True
    print("| Python |", " | ".join(SHOWN), "| passed | skipped | failed | took |")
    print("|---" * 5 + "|--:" * 4 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made = (install(Path(folder, str(i)), wanted, given.torch) for i, wanted in enumerate(sets))
        for python in given.python or made:
            line, passed = row(python, Path(folder))
            print(line, flush=True)
            fine = fine and passed
    sys.exit(not fine)


if __name__ == "__main__":
    main()

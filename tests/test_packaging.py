"""The wheel: it builds, installs and imports alone, with its types, and brings nothing but the package."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_those_that_the_documents_tell():
    bounds = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    said = (ROOT / "docs" / "versions.md").read_text()
    for name, version in re.findall(r'"(\w+)>=([\d.]+)', bounds):
        assert f"`{name}>={version}" in said


@pytest.mark.slow  # builds in an environment of its own, which pip fills from the index
def test_a_wheel_installs_and_imports_alone(tmp_path):
    def pip(*arguments):
        subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, cwd=tmp_path)

    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_importance/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_importance"}
    pip("install", "--no-deps", "--target", str(tmp_path / "alone"), str(wheel))
    code = "import hf_importance; print(hf_importance.__file__); hf_importance.ImportanceTrainer"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "alone")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "alone"))

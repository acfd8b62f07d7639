"""What the documents show: every block of Python runs, every command names what exists, every link leads somewhere."""

import re
from pathlib import Path

import pytest
import torch
import toys
import yaml
from torch import nn
from torch.nn import functional

import hf_importance
from hf_importance import ImportanceTrainer

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "model_cards" / "README.md", ROOT / "examples" / "paper" / "README.md")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *PAGES]
PROJECT = (ROOT / "pyproject.toml").read_text()


def blocks(language):
    """Give every fenced block of a language, named by document and line."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 1
            found.append(pytest.param(block[1], id=f"{document.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture
def reader(tmp_path, digits, monkeypatch):
    """What a reader has at hand: the usual imports, a model, arguments, data, and a trainer that has trained."""
    monkeypatch.chdir(tmp_path)
    small = digits.select(range(64))
    args = toys.arguments(tmp_path, max_steps=2, logging_steps=1)
    names = {"torch": torch, "nn": nn, "F": functional, "ImportanceTrainer": ImportanceTrainer, "args": args}
    trainer = toys.run(ImportanceTrainer, toys.vit(), args, small)
    return {**names, "model": toys.vit(), "dataset": small, "data": small, "trainer": trainer}


@pytest.mark.parametrize("source", blocks("python"))
def test_a_block_of_python_runs(source, reader):
    exec(compile(source, "block", "exec"), reader)


@pytest.mark.parametrize("source", blocks("diff"))
@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_diff_train(source, side, reader):
    lines = [line[1:] for line in source.splitlines() if line[:1] in (side, " ")]
    assert len(lines) < len(source.splitlines())
    exec(compile("\n".join(lines), "diff", "exec"), reader)
    assert reader["trainer"].state.global_step == 24  # 64 examples by 8, three times
    assert type(reader["trainer"]).__name__ == ("Trainer" if side == "-" else "ImportanceTrainer")


def test_the_reference_names_all_that_is_public():
    named = re.findall(r"^::: hf_importance\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    public = [name for name, thing in vars(hf_importance).items() if callable(thing)]
    assert sorted(named) == sorted(public)


@pytest.mark.parametrize("source", blocks("bash"))
def test_a_command_names_scripts_and_extras_that_exist(source):
    for script in re.findall(r"\S+/\S+\.py", source):
        assert (ROOT / script).exists()
    for extra in re.findall(r"\.\[(\w+)\]", source):
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE)
    for file in re.findall(r"-c (\S+)", source):
        assert (ROOT / file).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_tests_that_are_named_exist(document):
    written = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", document.read_text()):
        assert f"def {name}(" in written, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_one_version_everywhere():
    version, licence = hf_importance.__version__, re.search(r'^license = "(.+)"', PROJECT, re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and citation["license"] == licence
    assert citation["preferred-citation"]["url"] in (ROOT / "README.md").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

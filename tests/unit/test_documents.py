"""Documents: links lead somewhere, tables are those of the recorded results, and each result has one place."""

import re
import sys

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import record

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(text):
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target.read_text()), f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    """Python files in backticks, by their paths from the project's root or from the package."""
    named = re.findall(r"`([\w-]+/[\w/-]+\.py)`", document.read_text())
    assert not [path for path in named if not ((ROOT / path).exists() or (ROOT / "cola_ray" / path).exists())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_the_recorded_results(document):
    assert record.with_tables(document.read_text()) == document.read_text(), "make results updates them"


def test_every_result_has_one_table():
    texts = [document.read_text() for document in DOCUMENTS]
    for file in (ROOT / "docs" / "results").glob("*.json"):
        assert sum(text.count(f"<!-- {file.stem} -->") for text in texts) == 1, file.name


def test_a_result_without_a_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="nowhere: no document in docs/ has the lines <!-- nowhere -->"):
        record.record("nowhere", {"figure": 1})
    assert not list(tmp_path.iterdir())

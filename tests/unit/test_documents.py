"""Documents: links lead somewhere, tables are those of recorded results, each result has one place; and the site."""

import ast
import html
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import record

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SITE = ROOT / "docs" / "site" / "mkdocs.yml"


def text_of(document):
    """A document, or the text cells of a notebook."""
    if document.suffix != ".ipynb":
        return document.read_text()
    cells = json.loads(document.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(text):
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(document), flags=re.DOTALL)
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


# --- the site ---------------------------------------------------------------------------------------------------------


def in_navigation(entry):
    """Pages of an entry of ``nav``, in order."""
    if isinstance(entry, str):
        return [entry]
    return [page for below in (entry.values() if isinstance(entry, dict) else entry) for page in in_navigation(below)]


def test_every_page_is_in_the_navigation_once():
    """But for the report, which benchmarks.md shows with its pictures; readme.md is made of README.md."""
    pages = in_navigation(yaml.safe_load(SITE.read_text())["nav"])
    assert sorted(pages) == sorted([*(page.name for page in (ROOT / "docs").glob("*.md")), "readme.md"])
    assert pages[0] == "index.md"


def test_every_page_is_linked_from_the_first_one():
    linked = re.findall(r"\]\(([\w./-]+)", (ROOT / "docs" / "index.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= {*linked}


def test_what_the_reference_names_is_there():
    """Packages, modules and classes behind ``:::``, as far as it takes no import of them: the files, and the names."""
    import cola_ray

    for page in ("api.md", "settings.md"):
        for path in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE):
            parts = path.split(".")
            if len(parts) == 2:
                assert parts[1] in cola_ray.__all__, path
                continue
            file = ROOT.joinpath(*parts).with_suffix(".py")
            if not file.exists():
                file = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
                defined = {getattr(one, "name", "") for one in ast.parse(file.read_text()).body}
                assert parts[-1] in defined, path


def test_every_branch_of_the_settings_is_in_the_reference():
    from cola_ray.settings.config import Config

    named = re.findall(
        r"^::: cola_ray\.settings\.\w+\.(\w+)$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE
    )
    branches = [
        field.annotation.__name__ for field in Config.model_fields.values() if "Config" in str(field.annotation)
    ]
    assert sorted(named) == sorted(branches)


def text_in(page):
    """What a page says, without its markup."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


@pytest.mark.timeout(600)
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocstrings", reason="make docs installs it")
    pytest.importorskip("material", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-f", str(SITE), "-d", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    loads = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\shref=["']?(?:https?:)?//"""
    )
    for page in pages:
        assert not loads.search(page.read_text()), page.name
    api = (tmp_path / "site" / "api.html").read_text()
    settings = (tmp_path / "site" / "settings.html").read_text()
    assert 'id="cola_ray.Config.seed"' in settings
    assert 'id="cola_ray.Config.learns_values"' not in settings, "what nobody can set"
    assert "# go on after a stop\ncola_ray rl --preset tiny --resume\n" in text_in(tmp_path / "site" / "recipes.html")
    for shown in ('id="cola_ray.run"', 'id="cola_ray.CoLAForCausalLM.forward"', "the word after", "beam"):
        assert shown in api


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_without_outputs(notebook):
    book = json.loads(notebook.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = book["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        wanted = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
            compile("".join(cell["source"]), notebook.name, "exec")
        assert {*cell} == wanted
        assert all(line.endswith("\n") for line in cell["source"][:-1])

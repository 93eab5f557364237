"""What the site needs beyond the documents as they stand in the repository, where GitHub shows them too.

README.md at the root                the page readme.md
links to sources, ../cola_ray/x.py   pages sources/cola_ray/x.py.md, which show the file
```python file=x.py                  a block with that title
wide commands, "cola_ray x  # why"   with the comment above, where it is seen without scrolling

Docstrings are made Markdown by docstrings.py beside it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".ipynb": "json"}
FENCED = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1$", flags=re.MULTILINE | re.DOTALL)
COMMENTED = re.compile(r"^(\S.*?) {2,}(# .+)$", flags=re.MULTILINE)
SEEN = 80  # characters of a block that the site shows at once
# A link to a file beside docs/; what such a page calls ../cola_ray/x.py, the README calls cola_ray/x.py.
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([\w./-]+)(#[\w-]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    readme = re.sub(r"\]\((?!\w+:|#)([\w./-]+)(#[\w-]+)?\)", _from_the_root, readme)
    files.append(File.generated(config, "readme.md", content=readme))
    texts = [readme, *(page.content_string for page in files.documentation_pages() if page.src_uri != "readme.md")]
    for path in sorted({found[2] for text in texts for found in OUTSIDE.finditer(text)} - {"README.md"}):
        files.append(File.generated(config, f"sources/{path}.md", content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    if page.file.src_uri.startswith("sources/"):
        return markdown
    markdown = FENCED.sub(_commented_above, OUTSIDE.sub(_to_a_page, markdown))
    return re.sub(r"^```(\w+) file=(\S+)$", _titled, markdown, flags=re.MULTILINE)


def _from_the_root(link: re.Match[str]) -> str:
    inside = (ROOT / "docs" / link[1]).exists()
    return link[0] if inside else f"](../{link[1]}{link[2] or ''})"


def _to_a_page(link: re.Match[str]) -> str:
    """Also from pages in folders, which say ../ once more."""
    up, path, anchor = link[1][3:], link[2], link[3] or ""
    return f"]({up}readme.md{anchor})" if path == "README.md" else f"]({up}sources/{path}.md)"


def _commented_above(block: re.Match[str]) -> str:
    fence, language, lines = block.groups()
    if language or all(len(line) <= SEEN for line in lines.splitlines()):
        return block[0]
    above = COMMENTED.sub(r"\2\n\1", lines)
    return block[0] if above == lines else f"{fence}bash\n{above}{fence}"


def _titled(fence: re.Match[str]) -> str:
    return f'```{LANGUAGES.get(Path(fence[2]).suffix, "text")} title="{fence[2]}"'


def _shown(path: str) -> str:
    file = ROOT / path
    fence, language = "`" * 6, LANGUAGES.get(file.suffix, "text")
    unsearched = "---\nsearch:\n  exclude: true\n---\n\n"  # which would hide the documents behind the sources
    return f"{unsearched}# {path}\n\n{fence}{language}\n{file.read_text().rstrip()}\n{fence}\n"

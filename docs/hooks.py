"""What the site takes from elsewhere in the repository: pages, and the files they link to.

Links stay as they are written, relative to the file they stand in, so that they work in the repository as well. A link
out of `docs/` leads to the page made of its target, or to a copy of it below `repository/` in the site.
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

#: Pages made of files outside of docs/: page -> file.
ORIGINS = {
    "index.md": "README.md",
    "tutorial.md": "examples/tutorial.ipynb",
    "datasets.md": "dataset/README.md",
    "changelog.md": "CHANGELOG.md",
}
PAGES = {origin: page for page, origin in ORIGINS.items()}

LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(?=[)#])")
USAGE = re.compile(r"\{\{ cli\.(\w+) \}\}")
TUPLE = re.compile(r"(?<!`)<(?=[a-z]+(?: [a-z]+)*, )")
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """List the pages of docs/ that the navigation does not name, behind the other guides."""
    guides = next(entry["Guides"] for entry in config["nav"] if "Guides" in entry)
    named = {page for entry in guides for page in entry.values()} | set(ORIGINS)
    guides += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of :data:`ORIGINS`, and what any page links to outside of docs/."""
    for page, origin in ORIGINS.items():
        files.append(File.generated(config, page, content=text_of(ROOT / origin)))
    for page in list(files.documentation_pages()):
        for _, target in links(page.content_string, origin_of(page.src_uri)):
            if outside(target) and target not in PAGES:
                copy(target, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links out of docs/ into links within the site, and fill in the texts of the command line."""
    markdown = USAGE.sub(lambda match: constants(ROOT / "recbole_raserec" / "cli_help.py")[match[1]], markdown)
    here = page.file.src_uri
    changed, last = [], 0
    for match, target in links(markdown, origin_of(here)):
        changed.append(markdown[last : match.start()])
        changed.append(posixpath.relpath(place_of(target), posixpath.dirname(here) or "."))
        last = match.end()
    return TUPLE.sub("&lt;", "".join([*changed, markdown[last:]]))  # <prefix, next item> is no tag


def text_of(path: Path) -> str:
    """Markdown of a file; of a notebook, its text and code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    name = path.name
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"This page is the notebook [examples/{name}]({name}), without what it prints.")
    return "\n\n".join(parts) + "\n"


def constants(path: Path) -> dict[str, str]:
    """The texts that a module assigns to names, without importing it."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        node.targets[0].id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def links(markdown: str, origin: str) -> Iterator[tuple[re.Match[str], str]]:
    """Relative links of a page outside of code blocks, each with the path it leads to, from the root."""
    fenced = [match.span() for match in FENCED.finditer(markdown)]
    for match in LINK.finditer(markdown):
        if not any(start <= match.start() < end for start, end in fenced):
            yield match, posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[0]))


def origin_of(page: str) -> str:
    """The file of the repository that a page is made of."""
    copied = page.startswith("repository/")
    return page[len("repository/") :] if copied else ORIGINS.get(page, f"docs/{page}")


def outside(target: str) -> bool:
    """Whether a path of the repository is no file of docs/."""
    return not target.startswith("docs/")


def place_of(target: str) -> str:
    """Where the site has a path of the repository."""
    if not outside(target):
        return target[len("docs/") :]
    if target in PAGES:
        return PAGES[target]
    listing = (ROOT / target).is_dir()
    return f"repository/{target}/index.md" if listing else f"repository/{target}"


def copy(target: str, files: Any, config: Any) -> None:
    """Copy a file of the repository into the site, or a folder with a page that lists it.

    A path that is missing is left to MkDocs, which warns of the link.
    """
    path, place = ROOT / target, place_of(target)
    if target.startswith("..") or files.get_file_from_path(place) is not None:
        return
    if path.is_file():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    elif path.is_dir():
        below = sorted(
            posixpath.join(os.path.relpath(folder, path), name)
            for folder, _, names in os.walk(path)
            for name in names
            if not name.endswith(".pyc")
        )
        below = [posixpath.normpath(name) for name in below]
        for name in below:
            files.append(File.generated(config, f"repository/{target}/{name}", abs_src_path=str(path / name)))
        lines = [f"# {target}", "", *(f"- [{name}]({name})" for name in below), ""]
        files.append(File.generated(config, place, content="\n".join(lines)))

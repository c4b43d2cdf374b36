"""Makes the site of files all over the repository, under the paths they have in it.

A link from one file to another is therefore the same in the repository and in the site, and MkDocs checks it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

#: What the site takes from outside of docs/: pages, and the figures they link to.
OUTSIDE = ("*.md", "LICENSE", "dataset/*.md", "results/*.*")

#: The tutorial as a page.
NOTEBOOK, TUTORIAL = "examples/tutorial.ipynb", "examples/tutorial.md"

HELP = re.compile(r"\{\{ help ?(\w*) \}\}")


def on_files(files: Files, config: Any) -> Files:
    """Give the files of docs/ their path from the root, and add those from outside of it."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    docs = [f"docs/{file.src_uri}" for file in files if file.src_dir == config.docs_dir]
    outside = [path.relative_to(ROOT).as_posix() for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]
    ours = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in [*docs, *outside, NOTEBOOK]]
    return Files([*theme, *ours, File.generated(config, TUTORIAL, content=notebook())])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in `{{ help COMMAND }}`; links to the notebook lead to its page."""
    if page.file.src_uri != TUTORIAL:
        markdown = markdown.replace("tutorial.ipynb)", "tutorial.md)")
    return HELP.sub(lambda match: command_help(match[1]), markdown)


def notebook() -> str:
    """Text and code of the tutorial as Markdown."""
    name = Path(NOTEBOOK).name
    parts = []
    for cell in json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"This page is the notebook [{name}]({name}), without its output.")
    return "\n\n".join(parts) + "\n"


def command_help(command: str) -> str:
    """What `recbole-raserec COMMAND --help` prints, of the package that is installed beside MkDocs."""
    program = str(Path(sys.executable).with_name("recbole-raserec"))
    words = [program, *([command] if command else []), "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

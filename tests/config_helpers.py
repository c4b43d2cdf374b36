"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError


def problems(model="RaSeRec", dataset="ml-100k", **arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config(model, dataset, **{"argv": [], **arguments})
    return caught.value.problems


def only_problem(**arguments) -> str:
    found = problems(**arguments)
    assert len(found) == 1, found
    return found[0]


def write(folder: Path, text: str, name: str = "options.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)

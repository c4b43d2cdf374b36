"""Downloading one of RecBole's data set archives. What comes over the network is not trusted.

Only regular atomic files are taken out of an archive, each into the data set's own folder; an archive with a path that
leads elsewhere is refused as a whole. Nothing is left behind by a download that fails or is interrupted.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import yaml
from tqdm import tqdm

from recbole_raserec.errors import DatasetError

SUFFIXES = (".inter", ".user", ".item", ".kg", ".link", ".net")
TIMEOUT = 20  # seconds without an answer
_CHUNK = 1 << 20


def recbole_urls() -> dict[str, str]:
    """RecBole's own table: data set name -> URL of the zip archive with its atomic files."""
    spec = importlib.util.find_spec("recbole")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        table = Path(folder) / "properties" / "dataset" / "url.yaml"
        if table.is_file():
            return yaml.safe_load(table.read_text(encoding="utf-8"))
    return {}


def fetch(url: str, folder: Path, dataset: str) -> None:
    """Download the archive at `url` and put its atomic files into `folder`, named after `dataset`.

    Files that stand in `folder` already are kept. The ``.inter`` file comes last: once it is there, all are.

    Raises:
        DatasetError: no connection, an incomplete or damaged or unsafe archive, or no room on the disk.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{dataset}.") as scratch:
            archive = Path(scratch) / "archive.zip"
            _download(url, archive)
            unpacked = _unpack(archive, Path(scratch) / "files", PurePosixPath(url).stem, dataset)
            folder.mkdir(exist_ok=True)
            for path in sorted(unpacked, key=lambda path: path.suffix == ".inter"):
                if not (folder / path.name).exists():
                    os.replace(path, folder / path.name)
    except urllib.error.HTTPError as error:
        raise DatasetError(str(error)) from None
    except urllib.error.URLError as error:
        raise DatasetError(str(error.reason)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DatasetError(str(error) or type(error).__name__) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DatasetError(f"what it returned is not a readable zip archive ({error})") from None


def _download(url: str, target: Path) -> None:
    if not url.startswith(("https://", "http://")):
        raise DatasetError("not a web address")
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(target, "wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        if size > shutil.disk_usage(target.parent).free:
            raise DatasetError(f"no room on the disk for {size:,} bytes")
        with tqdm(total=size or None, desc=f"Downloading {url}", unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if size and file.tell() != size:
            raise DatasetError(f"the connection broke after {file.tell():,} of {size:,} bytes")


def _unpack(archive: Path, folder: Path, stem: str, dataset: str) -> list[Path]:
    """Extract the atomic files, `stem` in their names replaced by `dataset`; the paths written."""
    folder.mkdir()
    written = {}
    with zipfile.ZipFile(archive) as content:
        members = [member for member in content.infolist() if not member.is_dir()]
        for member in members:
            parts = member.filename.split("/")
            if ".." in parts or parts[0] == "" or "\\" in member.filename or ":" in parts[0]:
                raise DatasetError(f"the archive is unsafe: it holds the path {member.filename!r}")
        atomic = [member for member in members if PurePosixPath(member.filename).suffix in SUFFIXES]
        inter = [member for member in atomic if member.filename.endswith(".inter")]
        if sum(member.file_size for member in atomic) > shutil.disk_usage(folder).free:
            raise DatasetError("no room on the disk for the unpacked files")
        for member in atomic:
            path = PurePosixPath(member.filename)
            name = path.stem.replace(stem, dataset)
            if inter == [member]:
                name = dataset
            with content.open(member) as source, open(folder / f"{name}{path.suffix}", "wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            written[name + path.suffix] = folder / f"{name}{path.suffix}"
    if f"{dataset}.inter" not in written:
        listed = ", ".join(member.filename for member in members[:8]) or "nothing"
        raise DatasetError(f"the archive holds no interactions of {dataset}: {listed}")
    return list(written.values())

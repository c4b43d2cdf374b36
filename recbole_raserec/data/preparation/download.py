"""A data set's atomic files, before RecBole looks for them: found and checked, downloaded, or one clear error.

What comes over the network is not trusted. Only regular atomic files are taken out of an archive, each into the data
set's own folder; an archive with a path that leads elsewhere is refused as a whole. Nothing is left behind by a
download that fails or is interrupted.
"""

from __future__ import annotations

import difflib
import http.client
import importlib.util
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml
from tqdm import tqdm

from recbole_raserec.config import Config
from recbole_raserec.data.preparation.atomic import check_inter
from recbole_raserec.data.preparation.convert import prepare_file
from recbole_raserec.errors import DatasetError

SUFFIXES = (".inter", ".user", ".item", ".kg", ".link", ".net")
TIMEOUT = 20  # seconds without an answer
ATOMIC_FILES = "https://github.com/RUCAIBox/RecSysDatasets"
AMAZON_2014 = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"
AMAZON_2018 = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
AMAZON_2023 = "https://amazon-reviews-2023.github.io/"
MOVIELENS = "https://grouplens.org/datasets/movielens/"
_CHUNK = 1 << 20


def recbole_urls() -> dict[str, str]:
    """RecBole's own table: data set name -> URL of the zip archive with its atomic files."""
    spec = importlib.util.find_spec("recbole")  # importing it takes seconds
    (folder,) = spec.submodule_search_locations if spec and spec.submodule_search_locations else (".",)
    table = Path(folder) / "properties" / "dataset" / "url.yaml"
    return yaml.safe_load(table.read_text(encoding="utf-8")) if table.is_file() else {}


def fetch(url: str, folder: Path, dataset: str) -> None:
    """Download the archive at `url` and put its atomic files into `folder`, named after `dataset`.

    Files that stand in `folder` already are kept. The `.inter` file comes last: once it is there, all are.

    Raises:
        DatasetError: There is no connection, no room on the disk, or the archive is incomplete, damaged or unsafe.
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
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise DatasetError(str(why) or type(error).__name__) from None
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
            name = dataset if inter == [member] else path.stem.replace(stem, dataset)
            with content.open(member) as source, open(folder / f"{name}{path.suffix}", "wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
    if not (folder / f"{dataset}.inter").is_file():
        listed = ", ".join(member.filename for member in members[:8]) or "nothing"
        raise DatasetError(f"the archive holds no interactions of {dataset}: {listed}")
    return list(folder.iterdir())


def inter_files(folder: str | os.PathLike, dataset: str, benchmark: Sequence[str] | None = None) -> list[Path]:
    """The interaction files that RecBole will read from the data set's own `folder`.

    `benchmark` is RecBole's option `benchmark_filename`, the names of ready-made splits.
    """
    names = [f"{dataset}.inter"] if benchmark is None else [f"{dataset}.{part}.inter" for part in benchmark]
    return [Path(folder) / name for name in names]


def ensure_dataset(config: Config) -> Path:
    """The run's (first) interaction file, there and usable: prepared from the file that the run names, or downloaded
    where RecBole has one.

    Raises:
        DatasetError: It is missing and cannot be downloaded, or it is no atomic file with the columns the run needs.
    """
    dataset, folder, benchmark = config["dataset"], Path(config["data_path"]), config["benchmark_filename"]
    if config["dataset_file"]:
        prepare_file(config)
    files, failure = inter_files(folder, dataset, benchmark), ""
    there = all(path.is_file() for path in files)
    if not there and benchmark is None and (url := recbole_urls().get(dataset)):
        try:
            fetch(url, folder, dataset)
        except DatasetError as error:
            failure = f"{url}: {error}"
    if failure or not all(path.is_file() for path in files):
        raise DatasetError(_missing(folder, dataset, files, failure))
    for path in files:
        check_inter(path, *required_columns(config))
    return files[0]


def required_columns(config: Config) -> tuple[dict[str, str], str, str]:
    """The columns that a run needs of its interaction files, type by name; the separator; the encoding."""
    required = {config["USER_ID_FIELD"]: "token", config["ITEM_ID_FIELD"]: "token"}
    if config["TIME_FIELD"] and config["benchmark_filename"] is None:
        required |= {config["TIME_FIELD"]: "float"} if (config["eval_args"] or {}).get("order", "TO") == "TO" else {}
    return required, config["field_separator"] or "\t", config["encoding"] or "utf-8"


def _missing(folder: Path, dataset: str, files: Sequence[Path], failure: str) -> str:
    """The message for a data set that is not there."""
    data_path = Path(os.path.abspath(folder)).parent
    urls = recbole_urls()
    verdict = " and cannot be downloaded" if failure or dataset not in urls else ""
    lines = [f"The data set {dataset!r} is not there{verdict}."]
    lines += [f"  Looked for: {Path(os.path.abspath(path))}" for path in files if not path.is_file()]
    if failure:
        lines.append(f"  Download failed: {failure}")
    there = sorted({path.parent.name for path in data_path.glob("*/*.inter")})
    near = difflib.get_close_matches(dataset, {**dict.fromkeys(there), **urls}, n=3, cutoff=0.75)
    if dataset not in urls and near:
        lines.append(f"  A similar name: {', '.join(near)}")
    if there:
        lines.append(f"  Data sets in {data_path}: {', '.join(there)}")
    lines.append(f"  If it lies elsewhere: --data_path=DIR, the directory that contains the folder {dataset}/.")
    if dataset == "planted":
        lines.append(f"  To make it, in the source tree: python dataset/planted/generate.py --output={data_path}")
        return "\n".join(lines)
    if dataset in urls:
        lines.append(f"  Ready-made atomic files: {urls[dataset]}")
        lines.append(f"    unpack into {data_path / dataset} and rename the .inter file to {dataset}.inter")
    page, raw, options = _raw(dataset, urls.get(dataset, ""))
    lines += [f"  Raw data: {page}", "    then convert it:"]
    lines.append(f"    recbole-raserec prepare --input={raw} {options} --output={data_path} --name={dataset}")
    return "\n".join(lines)


def _raw(dataset: str, url: str) -> tuple[str, str, str]:
    """Where the raw data of `dataset` is published, the file to take and the converter's options for it."""
    category = url.rpartition("/")[2].replace("Amazon_", "", 1).replace(".zip", "") or "CATEGORY"
    if dataset.startswith("ml-"):
        return MOVIELENS, f"ratings.{'dat' if dataset in ('ml-1m', 'ml-10m') else 'csv'}", "--format=ratings --k_core=5"
    if not dataset.startswith("amazon-") or dataset == "amazon-m2":
        return f"the publisher of {dataset} ({ATOMIC_FILES} lists many)", "FILE", "--format=sequences|ratings|amazon"
    of_year = {"-23": (AMAZON_2023, f"{category}.jsonl.gz"), "-18": (AMAZON_2018, f"{category}_5.json.gz")}
    page, raw = of_year.get(dataset[-3:], (AMAZON_2014, f"reviews_{category}_5.json.gz"))
    return page, raw, "--format=amazon --k_core=5"

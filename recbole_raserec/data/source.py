"""Finding a data set's atomic files, before RecBole looks for them: found and fit, downloaded, or one clear error."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_raserec.data.atomic import check_inter
from recbole_raserec.data.fetch import fetch, recbole_urls
from recbole_raserec.errors import DatasetError

ATOMIC_FILES = "https://github.com/RUCAIBox/RecSysDatasets"
AMAZON_2014 = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"
AMAZON_2018 = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
AMAZON_2023 = "https://amazon-reviews-2023.github.io/"
MOVIELENS = "https://grouplens.org/datasets/movielens/"


def inter_files(folder: str | os.PathLike, dataset: str, benchmark: Sequence[str] | None = None) -> list[Path]:
    """The interaction files RecBole will read from `folder`.

    Args:
        folder: the data set's own folder (``data_path`` of a RecBole configuration, which ends with the name).
        dataset: its name.
        benchmark: RecBole's option ``benchmark_filename``, the names of ready-made splits.
    """
    names = [f"{dataset}.inter"] if benchmark is None else [f"{dataset}.{part}.inter" for part in benchmark]
    return [Path(folder) / name for name in names]


def locate(data_path: str | os.PathLike, dataset: str, benchmark: Sequence[str] | None = None) -> Path:
    """The (first) interaction file of `dataset` under `data_path`; nothing is downloaded.

    Raises:
        DatasetError: it is not there: where it was looked for, where to get it, how to convert it.
    """
    folder = Path(data_path) / dataset
    files = inter_files(folder, dataset, benchmark)
    if not all(path.is_file() for path in files):
        raise DatasetError(_missing(folder, dataset, files))
    return files[0]


def ensure_dataset(config: Any) -> Path:
    """Make sure that the run's data set is there and usable, downloading RecBole's copy if there is one.

    Args:
        config: a RecBole configuration.

    Returns:
        The (first) interaction file.

    Raises:
        DatasetError: it is missing and cannot be downloaded, or it is no atomic file with the columns the run needs.
    """
    dataset, folder, benchmark = config["dataset"], Path(config["data_path"]), config["benchmark_filename"]
    files = inter_files(folder, dataset, benchmark)
    if not all(path.is_file() for path in files):
        url = recbole_urls().get(dataset)
        failure = ""
        if url and benchmark is None:
            try:
                fetch(url, folder, dataset)
            except DatasetError as error:
                failure = f"{url}: {error}"
        if failure or not all(path.is_file() for path in files):
            raise DatasetError(_missing(folder, dataset, files, failure))
    required = {config["USER_ID_FIELD"]: "token", config["ITEM_ID_FIELD"]: "token"}
    if config["TIME_FIELD"] and benchmark is None and (config["eval_args"] or {}).get("order", "TO") == "TO":
        required[config["TIME_FIELD"]] = "float"
    for path in files:
        check_inter(path, required, config["field_separator"] or "\t", config["encoding"] or "utf-8")
    return files[0]


def _missing(folder: Path, dataset: str, files: Sequence[Path], failure: str = "") -> str:
    """The message for a data set that is not there."""
    data_path = Path(os.path.abspath(folder)).parent
    urls = recbole_urls()
    verdict = " and cannot be downloaded" if failure or dataset not in urls else ""
    lines = [f"The data set {dataset!r} is not there{verdict}."]
    lines += [f"  Looked for: {Path(os.path.abspath(path))}" for path in files if not path.is_file()]
    if failure:
        lines.append(f"  Download failed: {failure}")
    there = sorted(path.parent.name for path in data_path.glob("*/*.inter"))
    near = difflib.get_close_matches(dataset, [*dict.fromkeys([*there, *urls])], n=3, cutoff=0.75)
    if dataset not in urls and near:
        lines.append(f"  A similar name: {', '.join(near)}")
    if there:
        lines.append(f"  Data sets in {data_path}: {', '.join(dict.fromkeys(there))}")
    lines.append(f"  If it lies elsewhere: --data_path=DIR, the directory that contains the folder {dataset}/.")
    if dataset == "planted":
        lines.append(f"  To make it: python -m recbole_raserec.data.synthetic --output={data_path}")
        return "\n".join(lines)
    if dataset in urls:
        lines.append(f"  Ready-made atomic files: {urls[dataset]}")
        lines.append(f"    unpack into {data_path / dataset} and rename the .inter file to {dataset}.inter")
    page, raw, options = _raw(dataset, urls.get(dataset, ""))
    lines.append(f"  Raw data: {page}")
    lines.append("    then convert it:")
    lines.append(f"    recbole-raserec prepare --input={raw} {options} --output={data_path} --name={dataset}")
    return "\n".join(lines)


def _raw(dataset: str, url: str) -> tuple[str, str, str]:
    """Where the raw data of `dataset` is published, the file to take and the converter's options for it."""
    category = url.rpartition("/")[2].replace("Amazon_", "", 1).replace(".zip", "") or "CATEGORY"
    if dataset.startswith("amazon-") and dataset.endswith("-23"):
        return AMAZON_2023, f"{category}.jsonl.gz", "--format=amazon --k_core=5"
    if dataset.startswith("amazon-") and dataset.endswith("-18"):
        return AMAZON_2018, f"{category}_5.json.gz", "--format=amazon --k_core=5"
    if dataset.startswith("amazon-") and dataset != "amazon-m2":
        return AMAZON_2014, f"reviews_{category}_5.json.gz", "--format=amazon --k_core=5"
    if dataset.startswith("ml-"):
        return (
            MOVIELENS,
            "ratings.dat" if dataset in ("ml-1m", "ml-10m") else "ratings.csv",
            "--format=ratings --k_core=5",
        )
    return f"the publisher of {dataset} ({ATOMIC_FILES} lists many)", "FILE", "--format=sequences|ratings|amazon"

"""The interactions as RecBole's data sets read them with a configuration of this package: checked, and in exact order.

`recbole_raserec.compat` puts these functions around steps of RecBole's `Dataset`; `step` is RecBole's.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
from recbole.utils import FeatureType, ModelType

from recbole_raserec.data.preparation.atomic import MISSING
from recbole_raserec.data.preparation.download import inter_files, required_columns
from recbole_raserec.errors import ConfigError, DatasetError, shown

#: The name that RecBole gives to the user and the item of number 0.
PADDING = "[PAD]"
_FILTERS = ("val_interval", "user_inter_num_interval", "item_inter_num_interval")
_BLOCK = 1 << 24  # bytes searched at once
_EXACT = 2**53  # integers from here on are not all floats


def read_log(dataset: Any, step: Callable[[], None]) -> None:
    """Read the interactions; a DatasetError names the line at fault. Times are as they stand in the file."""
    benchmark, layout = dataset.benchmark_filename_list, required_columns(dataset.config)
    paths = [path for path in inter_files(dataset.dataset_path, dataset.dataset_name, benchmark) if path.is_file()]
    for path in paths if benchmark is None else []:
        check_rows(path, *layout)
    try:
        step()
    except (ValueError, csv.Error) as error:
        for path in paths:
            find_fault(path, *layout)
        raise DatasetError(f"{', '.join(map(str, paths)) or dataset.dataset_path} cannot be read: {error}") from error
    log, time = dataset.inter_feat, dataset.time_field
    if benchmark is None and log is not None and time in log and dataset.field2type[time] == FeatureType.FLOAT:
        times = log[time].to_numpy()
        if time in layout[0] and not np.isfinite(times).all():
            find_fault(paths[0], *layout)
        log[time] = exact_integers(paths[0], time, times, *layout[1:])


def check_rows(path: Path, required: dict[str, str], separator: str = "\t", encoding: str = "utf-8") -> None:
    """Look at every line of an atomic file for what pandas reads in silence, without taking it apart where all is well.

    Arguments as of `check_inter`.

    Raises:
        DatasetError: a line has too few or too many columns, a quote that does not close its field, or a user or item
            with the name of the padding.
    """
    mark = separator.encode(encoding)
    plain = len(mark) == 1 and "\n".encode(encoding) == b"\n"
    with open(path, "rb") as file:
        width = file.readline().count(mark)
        while plain and (block := file.read(_BLOCK) + file.readline()):
            values = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
            ends, marks = (np.flatnonzero(values == each) for each in (ord("\n"), mark[0]))
            plain = bool((np.diff(np.searchsorted(marks, ends), prepend=0) == width).all())
            plain = plain and b'"' not in block and PADDING.encode() not in block
    if not plain:
        find_fault(path, required, separator, encoding)


def find_fault(path: Path, required: dict[str, str], separator: str, encoding: str) -> None:
    """Raise a DatasetError that names the first line at fault, if there is one; arguments as of `check_inter`."""
    with open(path, encoding=encoding, newline="\n") as file:
        columns = [name.partition(":")[::2] for name in file.readline().rstrip("\r\n").split(separator)]
        for number, line in enumerate(file, start=2):
            fields, problem = line.rstrip("\r\n").split(separator), ""
            if len(fields) != len(columns) and fields != [""]:
                problem = f"{len(fields)} columns, but the header names {len(columns)}"
            for (name, kind), value in zip(columns, fields) if fields != [""] and not problem else []:
                bare, needed = value.strip('" '), name in required
                if value[:1] == '"' and not re.fullmatch('"[^"]*"', value):
                    problem = f"{name} is {value[:40]}, whose quote does not close the field; remove the quote"
                elif kind == "float" and (needed or bare not in MISSING) and not _is_number(bare, finite=needed):
                    problem = f"{name} is {value[:40]!r}, which is no {'finite ' if needed else ''}number"
                elif needed and bare == PADDING:
                    problem = f"{name} is {PADDING}, RecBole's name of the padding; rename it"
            if problem:
                raise DatasetError(f"{path.absolute()}, line {number}: {problem}.")


def _is_number(text: str, finite: bool) -> bool:
    try:
        return bool(np.isfinite(float(text))) or not finite
    except ValueError:
        return False


def exact_integers(path: Path, name: str, values: np.ndarray, separator: str, encoding: str) -> np.ndarray:
    """The column `name` of an atomic file, of which `values` are the float64: int64 where floats cannot hold them."""
    if np.abs(values).max(initial=0) < _EXACT:
        return values
    column = f"{name}:float"
    read: dict[str, Any] = {"sep": separator, "usecols": [column], "dtype": np.int64, "encoding": encoding}
    try:
        with np.errstate(invalid="ignore"):  # pandas compares what it casts
            return pd.read_csv(path, **read)[column].to_numpy()
    except (ValueError, OverflowError):  # written as floats
        return values


def drop_repeats(dataset: Any, step: Callable[[], None]) -> None:
    """`rm_dup_inter`; equal times keep the order of the file."""
    keep, log = dataset.config["rm_dup_inter"], dataset.inter_feat
    if keep is None or dataset.time_field not in log:
        return step()
    log = log.sort_values(dataset.time_field, kind="stable")
    dataset.inter_feat = log.drop_duplicates([dataset.uid_field, dataset.iid_field], keep=keep)
    return None


def filter_log(dataset: Any, step: Callable[[], None]) -> None:
    """Leave out what the options leave out; an error if they name a column that is not there, or nothing is left."""
    unknown = [field for field in dataset.config["val_interval"] or {} if field not in dataset.field2type]
    if unknown:
        known = ", ".join(dataset.field2type)
        raise ConfigError([f"val_interval: {unknown[0]} is no column that is loaded; choose among {known}"])
    before, where = len(dataset.inter_feat), f"The data set {dataset.dataset_name!r}"
    try:
        step()
    except ValueError:
        if len(dataset.inter_feat):
            raise
    items = dataset.inter_feat[dataset.iid_field]
    if not len(items):
        given = {name: dataset.config[name] for name in _FILTERS}
        named = [f"{name}: {shown(value)}" for name, value in given.items() if value not in (None, "[0,inf)")]
        raise DatasetError(f"{where}: none of its {before:,} interactions are left by {', '.join(named) or 'filters'}.")
    if items.nunique() < 2:
        raise DatasetError(f"{where} has one item alone, {items.iloc[0]}; two or more can be ranked.")


def sort_log(dataset: Any, step: Callable[[], None]) -> None:
    """Number users and items, as they come in the file; then put each user's interactions into the order of the times.

    RecBole's own sorts, by times as float32, are stable and keep that order.
    """
    step()
    log, time, options = dataset.inter_feat, dataset.time_field, dataset.config["eval_args"] or {}
    if dataset.benchmark_filename_list is not None or time not in log or options.get("order", "TO") != "TO":
        return
    users, sequential = log[dataset.uid_field].to_numpy(), dataset.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    grouped = sequential or "LS" in options["split"] or options.get("group_by") == "user"
    order, otherwise = in_time_order(users if grouped else np.zeros_like(users), log[time].to_numpy())
    log = log if order is None else log.iloc[order].reset_index(drop=True)
    dataset.inter_feat = log if log[time].dtype == np.float64 else log.astype({time: np.float64})
    if otherwise:
        who = f"{otherwise:,} of {dataset.user_num - 1:,} users'" if grouped else "The"
        alone = "RecBole alone, with times rounded to 32 bits, would order them otherwise"
        getLogger().info(f"{who} interactions follow the times in the file, where {alone}")


def in_time_order(groups: np.ndarray, times: np.ndarray) -> tuple[Optional[np.ndarray], int]:
    """Rows of a log in which each group's are sorted by time; equal times keep the order of the rows.

    A group keeps the places that its rows have, so that a log that is sorted by user and time stays as it is.

    Returns:
        row numbers, int [N], or None: they are sorted; in how many groups float32 times give another order.
    """
    places = np.argsort(groups, kind="stable")
    if ((np.diff(groups[places]) != 0) | (np.diff(times[places]) >= 0)).all():
        return None, 0
    rows = np.lexsort((times, groups))
    order = np.empty_like(rows)
    order[places] = rows
    owners, rounded = groups[rows], times[rows].astype(np.float32)
    alike = (owners[1:] == owners[:-1]) & (rounded[1:] == rounded[:-1])
    return order, len(np.unique(owners[1:][alike & (rows[1:] < rows[:-1])]))

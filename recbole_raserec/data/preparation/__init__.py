"""From raw logs to RecBole's atomic files: reading, filtering, downloading, generating."""

from recbole_raserec.data.preparation.convert import Options, name_problems, prepare
from recbole_raserec.data.preparation.download import ensure_dataset, inter_files, recbole_urls
from recbole_raserec.data.preparation.log import drop_repeats, filter_log, read_log, sort_log

__all__ = [
    "Options", "drop_repeats", "ensure_dataset", "filter_log", "inter_files", "name_problems", "prepare", "read_log",
    "recbole_urls", "sort_log",
]  # fmt: skip

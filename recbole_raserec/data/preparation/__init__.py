"""From raw logs to RecBole's atomic files: reading, filtering, downloading, generating."""

from recbole_raserec.data.preparation.atomic import check_rows, exact_integers, find_fault
from recbole_raserec.data.preparation.convert import Options, name_problems, prepare
from recbole_raserec.data.preparation.download import ensure_dataset, inter_files, recbole_urls, required_columns

__all__ = [
    "Options", "check_rows", "ensure_dataset", "exact_integers", "find_fault", "inter_files", "name_problems",
    "prepare", "recbole_urls", "required_columns",
]  # fmt: skip

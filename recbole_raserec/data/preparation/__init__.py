"""From raw logs to RecBole's atomic files: reading, filtering, downloading, generating."""

from recbole_raserec.data.preparation.convert import Options, prepare
from recbole_raserec.data.preparation.download import ensure_dataset, inter_files, recbole_urls

__all__ = ["Options", "ensure_dataset", "inter_files", "prepare", "recbole_urls"]

"""What tests of items with text share: a log whose items have titles, categories and brands."""

from __future__ import annotations

from pathlib import Path

from conftest import random_log, write_log

ITEMS = 25
KINDS = ("red lipstick", "blue train", "garden chair", "running shoe", "pencil case")
#: Options of a small run with text; TF-IDF, so that nothing else is needed.
TEXT = {"item_vectors": "both", "item_text_encoder": "tfidf", "item_text_size": 12}
ATTRIBUTES = {"item_attributes": ["categories", "brand"]}


def row(item: int) -> dict[str, str]:
    """The columns of an item; item 0 has no text."""
    kind = item % len(KINDS)
    described = {
        "title": f"{KINDS[kind]} number {item}",
        "categories": f"Shop > {KINDS[kind]}",
        "brand": f"b{item % 3}",
    }
    return {"item_id": f"i{item}", **(described if item else dict.fromkeys(described, ""))}


def write_items(directory: Path, name: str = "tiny", items: int = ITEMS) -> None:
    """Write the `.item` file beside the log."""
    lines = ["item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token"]
    lines += ["\t".join(row(item).values()) for item in range(items)]
    path = Path(directory) / name / f"{name}.item"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_data(directory: Path) -> None:
    """Log and items."""
    write_log(directory, "tiny", random_log(0))
    write_items(directory)

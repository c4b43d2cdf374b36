"""Which options of stage i a run reads: not all where patterns are mined alone, or the set was made before."""

from __future__ import annotations

from typing import Any

from recbole_raserec.configuration.options import REGENERATION

#: Options that mined patterns depend on.
MINING = ("regen_span", "regen_min_support", "regen_pattern_length")


def trains_regenerator(config: Any) -> bool:
    """Whether stage i of a run learns to generate: not where patterns are mined alone, or the set was made before."""
    return bool(config["regeneration"] and not config["regenerated_data"] and config["regen_rows"] != "patterns")


def regeneration_options(config: Any) -> list[str]:
    """The options of stage i that decide what a run trains on, beside the content of `regenerated_data`."""
    if not config["regeneration"]:
        return []
    names = ["regeneration", "regen_rows"]
    if config["regeneration"] == "personalised":
        names += [name for name in REGENERATION if name.startswith("regen_personal")]
    if trains_regenerator(config):
        known = {*names, "regenerated_data"}
        names += [name for name in REGENERATION if name not in known and not name.startswith("regen_personal")]
    elif not config["regenerated_data"]:
        names += MINING
    return sorted(names)

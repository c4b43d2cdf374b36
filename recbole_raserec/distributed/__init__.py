"""The processes of one run: how they start, and what they tell each other."""

from recbole_raserec.distributed.group import Group, current
from recbole_raserec.distributed.launch import cores, layout_of, silence, start

__all__ = ["Group", "cores", "current", "layout_of", "silence", "start"]

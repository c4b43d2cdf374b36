"""A small data set with planted patterns that retrieval recalls and a small parametric model cannot store.

Users belong to many small communities. Each community has a *story*: its own random circle of items, which a member
walks from a random offset, with popular items strewn in. All stories draw on the same few items, so that an item, or
even a pair, is followed by many different ones; only the longer context tells whose story it is. The next step then
stands in the prefixes of the few other members who passed there: near neighbours recall it, while a model with a few
thousand weights has to fit every story at once.

The file in ``dataset/planted`` is made by ``python -m recbole_raserec.data.preparation.planted --output=dataset``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME = "planted"
SEED = 2025
NOISE = 0.15  # chance that a popular item stands before a step of the story
SPREAD = 3  # a member walks WALK +- SPREAD steps
WALK = 18
HEAD = 5.0  # popularity of the item of rank r is proportional to 1 / (r + HEAD)


class Log(NamedTuple):
    """Interactions sorted by user, then time; ids count from 0.

    Attributes:
        users: int64 [N], non-decreasing.
        items: int64 [N].
        times: int64 [N], ticks of one clock for all users: no two interactions share a tick.
        communities: int64 [users], the community of each user (the truth behind the data; not written to the file).
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    communities: np.ndarray


def planted(users: int = 600, items: int = 240, seed: int = SEED, community: int = 10, story: int = 50) -> Log:
    """Generate the interactions.

    Only uniform doubles are drawn from PCG64, and every order comes from a stable sort, so that a seed gives the same
    log under every numpy version.

    Args:
        users: number of users.
        items: number of items; a story draws its items from all of them, without repeating one.
        seed: seed of the generator.
        community: members of a community (the last one may have fewer).
        story: items of a story.

    Raises:
        ValueError: `users` or `community` is below 1, `story` is longer than `items`, or too short for a walk that
            does not come round to its own start.
    """
    if users < 1 or community < 1:
        raise ValueError(f"users={users} and community={community} must be at least 1.")
    longest = WALK + SPREAD
    if not longest <= story <= items:
        raise ValueError(f"story={story} must lie between {longest} (the longest walk) and items={items}.")
    rng = np.random.Generator(np.random.PCG64(seed))
    membership = np.arange(users) // community
    stories = np.argsort(rng.random((int(membership[-1]) + 1, items)), axis=1, kind="stable")[:, :story]

    lengths = WALK - SPREAD + _below(rng.random(users), 2 * SPREAD + 1)  # [users]
    starts = _below(rng.random(users), story)  # [users]
    steps = np.arange(longest)
    walks = stories[membership[:, None], (starts[:, None] + steps) % story]  # [users, longest]
    shares = np.cumsum(1.0 / (np.arange(items) + HEAD))
    popular = np.searchsorted(shares / shares[-1], rng.random((users, longest)), side="right")
    popular = np.minimum(popular, items - 1)

    # Noise stands before a step and never last: a sequence always ends with a step of its story.
    pairs = np.stack([popular, walks], axis=2)  # [users, longest, 2]
    kept = np.stack([rng.random((users, longest)) < NOISE, np.ones((users, longest), dtype=bool)], axis=2)
    kept &= (steps < lengths[:, None])[:, :, None]
    owners = np.broadcast_to(np.arange(users)[:, None, None], kept.shape)[kept]  # [N]

    # One clock: a user arrives at a random moment and acts at its own pace, so that users overlap in time.
    begins, paces = rng.random(users), 0.002 + 0.018 * rng.random(users)
    position = np.arange(len(owners)) - np.searchsorted(owners, owners)
    moments = begins[owners] + position * paces[owners]
    times = np.empty(len(owners), dtype=np.int64)
    times[np.argsort(moments, kind="stable")] = np.arange(len(owners))
    return Log(owners.astype(np.int64), pairs[kept].astype(np.int64), times, membership)


def _below(uniform: np.ndarray, bound: int) -> np.ndarray:
    """Whole numbers in [0, bound) from doubles in [0, 1)."""
    return np.floor(uniform * bound).astype(np.int64)


def write(log: Log, path: Path) -> None:
    """Write the log as a RecBole atomic file, atomically (users ``u1..``, items ``i1..``)."""
    from recbole_raserec.storage import replacing

    rows = [f"u{u + 1}\ti{i + 1}\t{t}" for u, i, t in zip(log.users.tolist(), log.items.tolist(), log.times.tolist())]
    text = "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n"
    with replacing(path) as part:
        part.write_bytes(text.encode("ascii"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: write ``OUTPUT/planted/planted.inter``."""
    parser = argparse.ArgumentParser(prog="python -m recbole_raserec.data.preparation.planted", description=__doc__)
    parser.add_argument("--output", default="dataset", help="directory of the data sets (default: dataset)")
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--items", type=int, default=240)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(argv)
    path = Path(options.output) / NAME / f"{NAME}.inter"
    log = planted(users=options.users, items=options.items, seed=options.seed)
    write(log, path)
    print(f"{path}: {options.users} users, {len(np.unique(log.items))} items, {len(log.items)} interactions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

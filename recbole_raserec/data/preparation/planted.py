"""A small data set with planted patterns that retrieval recalls and a small parametric model cannot store.

Users belong to many small communities. Each community has a *story*: its own random circle of items, which a member
walks from a random offset, with popular items strewn in. All stories draw on the same few items, so that an item, or
even a pair, is followed by many different ones; only the longer context tells whose story it is. The next step then
stands in the prefixes of the few other members who passed there: near neighbours recall it, while a model with a few
thousand weights has to fit every story at once.

The file in `dataset/planted` is made by `python -m recbole_raserec.data.preparation.planted --output=dataset`.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from recbole_raserec.data.preparation.atomic import Log, write_inter

NAME = "planted"
SEED = 2025
NOISE = 0.15  # chance that a popular item stands before a step of the story
SPREAD = 3  # a member walks WALK +- SPREAD steps
WALK = 18
HEAD = 5.0  # popularity of the item of rank r is proportional to 1 / (r + HEAD)


def planted(users: int = 600, items: int = 240, seed: int = SEED, community: int = 10, story: int = 50) -> Log:
    """Generate the interactions.

    Only uniform doubles are drawn from PCG64, and every order comes from a stable sort, so that a seed gives the same
    log under every numpy version.

    Args:
        users: number of users.
        items: number of items; a story draws its items from all of them, without repeating one.
        seed: seed of the generator.
        community: members of a community (the last one may have fewer); user u belongs to community u // community.
        story: items of a story.

    Returns:
        Interactions of users `u1`, `u2`, ... with items `i1`, `i2`, ..., sorted by user, then time (ticks of one clock:
        no two share one), without ratings.

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
    times = np.empty(len(owners))
    times[np.argsort(moments, kind="stable")] = np.arange(len(owners))
    names = (
        np.array([f"{kind}{n + 1}" for n in range(count)], dtype=object) for kind, count in (("u", users), ("i", items))
    )
    return Log(owners, pairs[kept], np.full(len(owners), np.nan), times, *names)


def _below(uniform: np.ndarray, bound: int) -> np.ndarray:
    """Whole numbers in [0, bound) from doubles in [0, 1)."""
    return np.floor(uniform * bound).astype(np.int64)


@click.command(help=__doc__)
@click.option("--output", default="dataset", show_default=True, help="directory of the data sets")
@click.option("--users", default=600, show_default=True)
@click.option("--items", default=240, show_default=True)
@click.option("--seed", default=SEED, show_default=True)
def main(output: str, users: int, items: int, seed: int) -> None:
    path, log = Path(output) / NAME / f"{NAME}.inter", planted(users, items, seed)
    write_inter(log, path)
    click.echo(f"{path}: {users} users, {len(np.unique(log.items))} items, {len(log.items)} interactions")


if __name__ == "__main__":
    main()

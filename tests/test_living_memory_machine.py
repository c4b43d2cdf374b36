"""A memory against a list of entries: adds, removals, expiry, merges, files and searches in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from living_memory_helpers import HIDDEN, rows

from recbole_raserec.retrieval.memory import MemoryBank


class Model:
    """What a bank ought to hold: a list of entries, None where one was removed."""

    def __init__(self):
        self.entries = []

    def add(self, block):
        for i in range(len(block["keys"])):
            entry = {name: block[name][i] for name in ("keys", "targets", "users", "positions", "times")}
            entry["owners"] = {}
            if "owners" in block:
                of = block["owners"][0] == i
                entry["owners"] = dict(zip(block["owners"][1][of].tolist(), block["owners"][2][of].tolist()))
            self.entries.append(entry)

    def remove(self, gone):
        before = sum(e is not None for e in self.entries)
        self.entries = [None if e is None or gone(e) else e for e in self.entries]
        return before - sum(e is not None for e in self.entries)

    def forget(self, user):
        for entry in self.entries:
            if entry is not None:
                entry["owners"].pop(user, None)
        return self.remove(lambda e: e["users"] == user or (e["users"] < 0 and len(e["owners"]) < 2))

    def allowed(self, user, position, time):
        found = []
        for i, e in enumerate(self.entries):
            if e is None or (e["users"] == user >= 0 and e["positions"] >= position):
                continue
            if len(e["owners"]) == 2 and e["owners"].get(user, -1) >= position:
                continue
            if time is not None and not e["times"] < time:
                continue
            found.append(i)
        return found

    def best(self, query, top_k, user, position, time=None):
        found = self.allowed(user, position, time)
        unit = query.astype(np.float64) / np.linalg.norm(query)
        unit = unit.astype(np.float32).astype(np.float64)
        scores = []
        for i in found:
            key = self.entries[i]["keys"].astype(np.float64)
            key = (key / np.linalg.norm(key)).astype(np.float32).astype(np.float64)
            scores.append((-np.float32((unit * key).sum()), i))
        return [i for _, i in sorted(scores)[:top_k]]


@settings(max_examples=40, stateful_step_count=25, deadline=None)
class Life(RuleBasedStateMachine):
    """Adds, removals, merges, saves and searches in any order: always what a list of entries would give."""

    @initialize(scope=st.sampled_from(["history", "past"]), seed=st.integers(0, 10**6))
    def begin(self, scope, seed):
        self.rng, self.scope = np.random.default_rng(seed), scope
        self.bank, self.model = self.empty(), Model()

    def empty(self):
        return MemoryBank(HIDDEN, index="flat", scope=self.scope)

    @rule(size=st.integers(0, 6), patterns=st.booleans())
    def add(self, size, patterns):
        if patterns and not size:
            return
        block = rows(self.rng, size, patterns=patterns)
        ids = self.bank.add(**block)
        assert ids.tolist() == list(range(len(self.model.entries), len(self.model.entries) + size))
        self.model.add(block)

    @rule(user=st.integers(-1, 8))
    def forget(self, user):
        assert self.bank.forget(user) == (0 if user < 0 else self.model.forget(user))

    @rule(time=st.integers(0, 20))
    def expire(self, time):
        assert self.bank.expire(time) == self.model.remove(lambda e: e["times"] < time)

    @rule(size=st.integers(1, 5), user=st.integers(0, 7))
    def merge(self, size, user):
        other, block, more = self.empty(), rows(self.rng, size, patterns=True), rows(self.rng, size)
        single = Model()
        for part in (block, more):
            other.add(**part)
            single.add(part)
        other.forget(user)
        single.forget(user)
        ids = self.bank.merge(other)
        left = [e for e in single.entries if e is not None]
        assert len(ids) == len(left)
        self.model.entries += left

    @rule()
    def search(self):
        queries = self.rng.standard_normal((4, HIDDEN)).astype(np.float32)
        users, positions = self.rng.integers(-1, 9, 4), self.rng.integers(0, 10, 4)
        times = self.rng.integers(0, 22, 4).astype(float) if self.rng.random() < 0.7 else None
        found = self.bank.search(queries, 3, users, positions, times=times)
        for q in range(4):
            time = times[q] if times is not None and self.scope == "past" else None
            wanted = self.model.best(queries[q], 3, users[q], positions[q], time)
            assert found.ids[q][found.mask[q]].tolist() == wanted

    @precondition(lambda self: len(self.model.entries))
    @rule()
    def reload(self):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.bank.save(folder)
            self.bank = MemoryBank.load(folder)
            self.bank.search(np.ones((1, HIDDEN)), 1, None, None)
            for column in self.bank._columns.values():
                column.writable()  # copies the map before the files go

    @invariant()
    def same_entries(self):
        if not hasattr(self, "bank"):
            return
        assert len(self.bank) == len(self.model.entries)
        assert self.bank.live == sum(e is not None for e in self.model.entries)
        for i, entry in enumerate(self.model.entries):
            if entry is None:
                assert self.bank.gone[i]
                assert not self.bank.keys[i].any()
                assert (self.bank.targets[i], self.bank.users[i]) == (0, -1)
            else:
                np.testing.assert_array_equal(self.bank.keys[i], entry["keys"])
                assert self.bank.support[i] == max(len(entry["owners"]), 1)


TestLife = Life.TestCase

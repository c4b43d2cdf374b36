"""Memory that was freed and is still held: given back when a process has grown by it."""

from __future__ import annotations

import platform

import pytest
import torch

from recbole_raserec.kernels import allocator
from recbole_raserec.kernels.allocator import FreedMemory, peak_memory_mb, resident_mb


def test_memory_is_given_back_when_the_process_has_doubled(monkeypatch):
    held, given = iter([300.0, 500.0, 250.0, 490.0, 510.0, 260.0]), []
    monkeypatch.setattr(allocator, "resident_mb", lambda: next(held))
    monkeypatch.setattr(allocator, "_trim", lambda: given.append(1) is None)
    freed = FreedMemory()
    assert [freed.bound() for _ in range(6)] == [False, False, False, False, True, False]
    assert len(given) == 1


def test_the_peak_is_that_of_this_process():
    held = resident_mb()
    block = torch.ones(30 << 18)  # 30 MiB
    assert 20 < held < resident_mb() <= peak_memory_mb() + 1
    assert block.all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_holes_between_tensors_go_back():
    allocator._trim()  # what earlier tests left free would hold the tensors
    before = resident_mb()
    freed = FreedMemory()
    freed._least = before / 4
    tensors = [torch.ones(16_000) for _ in range(4000)]  # of 64 kB, 244 MiB: below what is mapped one by one
    kept = tensors[::100]
    grown = resident_mb()
    assert grown > before + 200
    tensors.clear()
    assert freed.bound()
    assert resident_mb() < grown - 150
    assert all(bool((tensor == 1).all()) for tensor in kept)


def test_a_training_looks_after_each_epoch(tiny_run, monkeypatch):
    from recbole.trainer import Trainer

    epochs, looked = [], []
    train = Trainer._train_epoch
    monkeypatch.setattr(FreedMemory, "bound", lambda self: looked.append(len(epochs)))
    monkeypatch.setattr(Trainer, "_train_epoch", lambda *args, **kwargs: epochs.append(1) or train(*args, **kwargs))
    tiny_run("SASRec", epochs=3)
    assert looked == [1, 2, 3]

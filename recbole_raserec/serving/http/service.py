"""The command ``serve``: its options and limits, and the life of a server from the first load to the last save."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

from recbole_raserec.distributed import cores
from recbole_raserec.serving.http.settings import Settings, log, log_error


class Service:
    """A recommender at work: threads for reading calls, one for changes, and saves from time to time.

    Args:
        recommender: that keeps a journal. settings: of the server.
    """

    def __init__(self, recommender: Any, settings: Settings):
        self.recommender, self.settings = recommender, settings
        workers = settings.workers or min(4, cores())
        share = (max(1, cores() // workers),)
        self.readers = ThreadPoolExecutor(workers, "read", _threads, share)
        # Changes come one after the other anyway; a save keeps them waiting, and must not keep readers waiting.
        self.writer = ThreadPoolExecutor(1, "write", _threads, share)
        self.ready = True
        self._stopping = threading.Event()
        self._saver: Optional[threading.Thread] = None

    def start(self) -> None:
        """Save every ``save_every`` seconds from now on."""
        if self.settings.save_every:
            self._saver = threading.Thread(target=self._save_repeatedly, name="save", daemon=True)
            self._saver.start()

    def save(self) -> int:
        """Save, if there is anything to; the number of changes that were not saved before."""
        changes = int(self.recommender.unsaved)
        if changes:
            self.recommender.save()
            log("saved", changes=changes)
        return changes

    def stop(self) -> None:
        """Finish what runs, save and let go of the directory.

        Raises:
            OSError: it could not be saved; the journal has everything then.
        """
        self.ready = False
        self._stopping.set()
        self.readers.shutdown()
        self.writer.shutdown()
        if self._saver is not None:
            self._saver.join()
        try:
            self.save()
        finally:
            self.recommender.close()

    def _save_repeatedly(self) -> None:
        while not self._stopping.wait(self.settings.save_every):
            try:
                self.writer.submit(self.save).result()
            except Exception as error:  # the journal has the changes, and the next save may succeed
                log_error("not saved", error)


def _threads(number: int) -> None:
    """Both are settings of the calling thread."""
    import faiss
    import torch

    torch.set_num_threads(number)
    faiss.omp_set_num_threads(number)

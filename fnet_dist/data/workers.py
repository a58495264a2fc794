"""DataLoader workers that live as long as the run, and end with it whatever happens."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import tee
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyleDataset

from fnet_dist.processes import exit_with_parent


class ReadWorkers:
    """Processes that apply `read` to items, in order, ahead of the caller. They start at the first item; close them."""

    def __init__(self, read: Callable[[Any], Any], num_workers: int, *, pin_memory: bool) -> None:
        self._order = _Order()
        # fork: workers share the data set's memory, and it need not be picklable, as a lambda is not. Python 3.14's own
        # choice, forkserver, would import torch in each worker and copy the data set into it.
        self._loader: DataLoader[Any] = DataLoader(
            _Read(read),
            batch_size=None,  # an item is a whole batch
            sampler=self._order,
            collate_fn=_unchanged,
            num_workers=num_workers,
            worker_init_fn=_init_worker,
            pin_memory=pin_memory,  # else non_blocking copies would block
            persistent_workers=True,
            multiprocessing_context="fork",
            # Without its own generator the loader would draw from the process's random state and change the training.
            generator=torch.Generator().manual_seed(0),
        )
        self._processes: list[BaseProcess] = []
        self._iterator: Any = None

    def read(self, items: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Yield (item, result) for each of `items`, which may be endless. A second call ends the first."""
        self._order.items, read = tee(items)
        before = multiprocessing.active_children()
        self._iterator = iter(self._loader)
        if not self._processes:
            self._processes = [child for child in multiprocessing.active_children() if child not in before]
        yield from zip(read, self._iterator, strict=False)

    def close(self) -> None:
        """End the processes."""
        if self._iterator is not None:
            # torch ends workers with the last reference, which an error's traceback may hold, and leaves stuck ones.
            self._iterator.__del__()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._iterator = [], None


class _Order:
    """The loader's sampler: the items of the reading in progress."""

    items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.items


class _Read(MapStyleDataset[Any]):
    """A function as the data set that a DataLoader expects."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._function = read

    def __getitem__(self, item: Any) -> Any:
        return self._function(item)


def _unchanged(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    """Ignore signals that the rank handles; end when the rank sends SIGTERM or dies.

    Slurm and Ctrl-C signal whole process groups: a worker that obeyed would fail the step it reads for. But the rank's
    own SIGTERM must end it: multiprocessing sends one at exit and then waits without limit. A killed rank sends none.
    """
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    # Only sigwaitinfo gives the sender of a signal: a Python handler gets none.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

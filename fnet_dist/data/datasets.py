"""The interface through which training reads samples, and its two implementations.

Nothing here knows a shape or a class: `build_dataset` in fnet_dist/dataset.py does.
"""

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as MapStyleDataset

from fnet_dist.config.schema import DataConfig
from fnet_dist.processes import exit_with_parent

Batch = tuple[Tensor, Tensor]
Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a data set in manifest.json, tables and plots."""

    name: str
    sha256: str  # of the content: ranks and later starts of a run must find the same
    class_names: tuple[str, ...]
    config: DataConfig  # with the choices made, as config.json records them
    is_synthetic: bool = False  # not the data that was asked for: every table and plot warns


class Dataset(ABC):
    """Labelled samples, read by index. Subclasses implement `__len__` and `batch`."""

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """Return inputs (n, ...) float32 and targets (n,) on the device, of the samples at `indices`, (n,) int64."""

    def batches(self, index_batches: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """Yield `batch` of each of `index_batches` in order. A caller that stops early must close the generator."""
        for indices in index_batches:
            yield self.batch(indices)


class InMemoryDataset(Dataset):
    """All samples on the device as bytes, normalised there when read: no worker and no host copy in the hot loop."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, normalize: Normalize, device: torch.device, info: DatasetInfo
    ) -> None:
        """Copy `inputs` (n, ...) uint8 and `targets` (n,) to `device`; `normalize` turns uint8 inputs into float32."""
        super().__init__(info)
        self._inputs, self._targets = inputs.to(device), targets.to(device, torch.int64)
        self._normalize, self._device = normalize, device

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples at `indices`, without waiting for the GPU."""
        indices = indices.to(self._device, non_blocking=True)
        return self._normalize(self._inputs.index_select(0, indices)), self._targets.index_select(0, indices)


class MapStyle(Protocol):
    """The input of StreamedDataset: any map-style torch Dataset of (float tensor, int target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class StreamedDataset(Dataset):
    """A map-style torch Dataset, prefetched by `num_workers` processes; with 0, read in this process.

    A sample should depend on its index alone: workers restart with every call of `batches`, always with the same seed.
    """

    def __init__(self, dataset: MapStyle, num_workers: int, device: torch.device, info: DatasetInfo) -> None:
        super().__init__(info)
        self._dataset, self._num_workers, self._device = dataset, num_workers, device

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples at `indices`, read in this process."""
        return self._to_device(default_collate([self._dataset[index] for index in indices.tolist()]))

    def batches(self, index_batches: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """Yield the same batches, prefetched from `index_batches`, which may be endless; closing ends the workers."""
        if self._num_workers == 0:
            yield from super().batches(index_batches)
            return
        loader = DataLoader(
            cast("MapStyleDataset[tuple[Tensor, int]]", self._dataset),
            batch_sampler=(indices.tolist() for indices in index_batches),
            num_workers=self._num_workers,
            worker_init_fn=_init_worker,
            pin_memory=self._device.type == "cuda",  # else non_blocking copies would block
            # Without its own generator the loader would draw from the process's random state and change the training.
            generator=torch.Generator().manual_seed(0),
        )
        before = multiprocessing.active_children()
        prefetched = iter(loader)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        try:
            for batch in prefetched:
                yield self._to_device(batch)
        finally:
            # torch ends workers with the last reference, which an error's traceback may hold, and leaves stuck ones.
            prefetched._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public name for it
            for worker in workers:
                worker.kill()
                worker.join()

    def _to_device(self, batch: list[Tensor]) -> Batch:
        inputs, targets = (part.to(self._device, non_blocking=True) for part in batch)
        return inputs, targets


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

"""How samples reach the model: what the trainer asks of a data set, and the two ways to carry one.

Nothing here knows a shape or a class; `build_dataset` in data.py says what is carried.
"""

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as MapStyleDataset

from fnet_dist.config.schema import DataConfig
from fnet_dist.processes import exit_with_parent

Batch = tuple[Tensor, Tensor]


class Dataset(ABC):
    """Labelled samples, asked for by index.

    `name` is what tables and pictures call the data, `sha256` that of its content, `config` the settings as used;
    `stand_in` says that it takes the place of the real data, which every table and picture then says loudly.
    """

    def __init__(
        self, *, name: str, sha256: str, class_names: tuple[str, ...], config: DataConfig, is_synthetic: bool = False
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.class_names = class_names
        self.config = config
        self.is_synthetic = is_synthetic

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """The samples at `indices`, (n,) int64 on the CPU: inputs (n, ...) float32 and targets (n,), on the device."""

    def batches(self, index_batches: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """`batch` of each of `index_batches`, in their order; whoever stops early closes the generator."""
        for indices in index_batches:
            yield self.batch(indices)


class InMemoryDataset(Dataset):
    """All samples on the device as bytes, normalised there when asked for: no worker and no copy in the hot loop."""

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        normalize: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        name: str,
        sha256: str,
        class_names: tuple[str, ...],
        config: DataConfig,
        is_synthetic: bool = False,
    ) -> None:
        """`inputs` (n, ...) uint8 and `targets` (n,) are kept on `device`; `normalize` makes uint8 inputs float32."""
        super().__init__(name=name, sha256=sha256, class_names=class_names, config=config, is_synthetic=is_synthetic)
        self._inputs = inputs.to(device)
        self._targets = targets.to(device, torch.int64)
        self._normalize = normalize
        self._device = device

    def __len__(self) -> int:
        return len(self._targets)

    def batch(self, indices: Tensor) -> Batch:
        """The samples at `indices`; on a GPU nothing here waits for it."""
        indices = indices.to(self._device, non_blocking=True)
        return self._normalize(self._inputs.index_select(0, indices)), self._targets.index_select(0, indices)


class MapStyle(Protocol):
    """What StreamedDataset reads: any map-style torch Dataset of (float tensor, int target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class StreamedDataset(Dataset):
    """A map-style torch Dataset, read ahead by `num_workers` processes.

    With num_workers = 0 samples are read in this process. The samples should depend on their index alone: workers
    start anew with every call of `batches`, always with the same seed.
    """

    def __init__(
        self,
        dataset: MapStyle,
        num_workers: int,
        device: torch.device,
        *,
        name: str,
        sha256: str,
        class_names: tuple[str, ...],
        config: DataConfig,
        is_synthetic: bool = False,
    ) -> None:
        super().__init__(name=name, sha256=sha256, class_names=class_names, config=config, is_synthetic=is_synthetic)
        self._dataset = dataset
        self._num_workers = num_workers
        self._device = device

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor) -> Batch:
        """The samples at `indices`, read in this process."""
        return self._to_device(default_collate([self._dataset[index] for index in indices.tolist()]))

    def batches(self, index_batches: Iterable[Tensor]) -> Generator[Batch, None, None]:
        """The same batches in the same order, read ahead; `index_batches` may be endless, and is taken from early.

        Closing the generator ends the workers.
        """
        if self._num_workers == 0:
            yield from super().batches(index_batches)
            return
        loader = DataLoader(
            cast("MapStyleDataset[tuple[Tensor, int]]", self._dataset),
            batch_sampler=(indices.tolist() for indices in index_batches),
            num_workers=self._num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self._device.type == "cuda",
            # Without its own generator the loader would draw from the process's random state.
            generator=torch.Generator().manual_seed(0),
        )
        before = multiprocessing.active_children()
        read_ahead = iter(loader)
        workers = [child for child in multiprocessing.active_children() if child not in before]
        try:
            for batch in read_ahead:
                yield self._to_device(batch)
        finally:
            # torch ends them when the last reference is gone, which an error's traceback holds; a stuck one stays.
            read_ahead._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public name for it
            for worker in workers:
                worker.kill()
                worker.join()

    def _to_device(self, batch: list[Tensor]) -> Batch:
        inputs, targets = (part.to(self._device, non_blocking=True) for part in batch)
        return inputs, targets


def _leave_signals_to_the_parent(worker: int) -> None:
    """Slurm and Ctrl-C signal whole process groups: a worker that obeyed would fail the step it reads for.

    The parent's own SIGTERM still ends it: multiprocessing sends one at exit, and then waits without limit. So does its
    death: a rank that is killed has no time to send one.
    """
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

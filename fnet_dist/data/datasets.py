"""The interface through which training reads samples, and its two implementations.

Nothing here knows a shape or a class: `build_dataset` of the recipe does.
"""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from fnet_dist.config.load_recipe import short_path
from fnet_dist.config.recipe_sections import DataConfig
from fnet_dist.data.workers import ReadWorkers
from fnet_dist.errors import DataError, FnetError, SampleError
from fnet_dist.seeding import seed_sample

Batch = tuple[Any, Any]  # inputs and targets: tensors, or any nesting of them in tuples, lists and dicts
Transform = Callable[[Any, int, Tensor], Any]  # (inputs, key, indices) -> inputs


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a data set in manifest.json, tables and plots."""

    name: str
    sha256: str  # of the content: ranks and later starts of a run must find the same
    class_names: tuple[str, ...] = ()  # of a classifier: reports show its confusion matrix and figures per class
    config: DataConfig | None = None  # with choices made, as config.json records them; None: the one given
    is_synthetic: bool = False  # not the data that was asked for: every table and plot warns


class Dataset(ABC):
    """Samples, read by index. Subclasses implement `__len__` and `batch`.

    `key` is a number made of the run's seed and the epoch: what is random about a sample is a function of the key and
    the sample's index (`sample_random(key, indices, count)`), and of nothing else.
    """

    index_device = torch.device("cpu")  # where training keeps an epoch's indices

    def __init__(self, info: DatasetInfo, sample_weights: Tensor | None = None) -> None:
        """With `sample_weights` (samples,), an epoch draws as many samples, with replacement and these weights."""
        self.info = info
        self.sample_weights = sample_weights

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def batch(self, indices: Tensor, key: int) -> Batch:
        """Return inputs and targets, on the device, of the samples at `indices`, (n,) int64."""

    def batches(self, index_batches: Iterable[Tensor], key: int) -> Generator[Batch, None, None]:
        """Yield `batch` of each of `index_batches` in order. A caller that stops early must close the generator."""
        for indices in index_batches:
            with read_errors(self.info.name, indices):
                batch = self.batch(indices, key)
            yield batch

    def close(self) -> None:
        """End the processes that read samples, if there are some."""
        return


class InMemoryDataset(Dataset):
    """All samples on the device, as bytes if you like: no worker and no host copy in the hot loop."""

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        device: torch.device,
        info: DatasetInfo,
        *,
        transform: Transform | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        """Copy `inputs` and `targets`, whose tensors are (samples, ...), to `device`.

        `transform(inputs, key, indices)` changes the inputs of a batch there: it normalises bytes, or augments.
        """
        super().__init__(info, sample_weights)
        self._inputs, self._targets = (map_tensors(each, lambda part: part.to(device)) for each in (inputs, targets))
        self._transform, self.index_device = transform, device
        lengths = {len(each) for part in (inputs, targets) for each in tensors_in(part)}
        if len(lengths) != 1:
            raise DataError(f"{info.name}: inputs and targets of {sorted(lengths)} samples, expected one length")
        [self._count] = lengths

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor, key: int) -> Batch:
        """Return the samples at `indices`, without waiting for the GPU."""
        indices = indices.to(self.index_device, non_blocking=True)
        inputs, targets = (
            part.index_select(0, indices)
            if isinstance(part, Tensor)
            else map_tensors(part, lambda each: each.index_select(0, indices))
            for part in (self._inputs, self._targets)
        )
        return (inputs if self._transform is None else self._transform(inputs, key, indices)), targets


class MapStyle(Protocol):
    """The input of StreamedDataset: any map-style torch Dataset of (input, target)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class _ReadError:
    """The exception of a sample, as text: pickling an exception of a user's own class may fail."""

    text: str


class StreamedDataset(Dataset):
    """A map-style torch Dataset, prefetched by `num_workers` processes; with 0, read in this process.

    Before each sample the default generators of torch, random and numpy are seeded with the key and the sample's index:
    its random transforms are the same whichever worker, rank or attempt reads it.
    """

    def __init__(
        self,
        dataset: MapStyle,
        num_workers: int,
        device: torch.device,
        info: DatasetInfo,
        *,
        collate: Callable[[list[Any]], Batch] = default_collate,
        transform: Transform | None = None,
        sample_weights: Tensor | None = None,
    ) -> None:
        """`collate` makes a batch of samples, in the worker; `transform` is InMemoryDataset's, on `device`."""
        super().__init__(info, sample_weights)
        self._dataset, self._collate, self._transform, self._device = dataset, collate, transform, device
        self._workers = ReadWorkers(self._read, num_workers, pin_memory=device.type == "cuda") if num_workers else None

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Tensor, key: int) -> Batch:
        """Return the samples at `indices`, read in this process."""
        return self._to_device(self._read((key, indices.tolist())), indices, key)

    def batches(self, index_batches: Iterable[Tensor], key: int) -> Generator[Batch, None, None]:
        """Yield the same batches, prefetched from `index_batches`, which may be endless."""
        if self._workers is None:
            yield from super().batches(index_batches, key)
            return
        for (_, indices), batch in self._workers.read((key, indices.tolist()) for indices in index_batches):
            with read_errors(self.info.name, torch.tensor(indices)):
                on_device = self._to_device(batch, torch.tensor(indices), key)
            yield on_device

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()

    def _read(self, item: tuple[int, list[int]]) -> Any:
        """Return the batch of (key, indices), or a _ReadError. In a worker, or in this process."""
        key, indices = item
        index = None
        try:
            samples = []
            for index in indices:
                seed_sample(key, index)
                samples.append(self._dataset[index])
            index = None
            return self._collate(samples)
        except Exception as error:
            which = f"sample {index:,}" if index is not None else f"collate of samples {indices[:4]}"
            return _ReadError(f"{self.info.name}: {which}: {_describe(error)}")

    def _to_device(self, batch: Any, indices: Tensor, key: int) -> Batch:
        if isinstance(batch, _ReadError):
            raise SampleError(batch.text)
        inputs, targets = map_tensors(batch, lambda part: part.to(self._device, non_blocking=True))
        if self._transform is not None:
            inputs = self._transform(inputs, key, indices.to(self._device, non_blocking=True))
        return inputs, targets


@contextmanager
def read_errors(name: str, indices: Tensor) -> Iterator[None]:
    """Turn an exception in the block, which reads the samples at `indices`, into a SampleError of one line."""
    try:
        yield
    except FnetError:
        raise
    except Exception as error:
        which = ", ".join(f"{index:,}" for index in indices[:4].tolist()) + (" ..." if len(indices) > 4 else "")
        raise SampleError(f"{name}: sample{'s' * (len(indices) > 1)} {which}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Return "Type: text (file:line)"; of the frames the innermost that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/site-packages/torch/" not in frame.filename]
    where = f"{short_path((own or frames)[-1].filename)}:{(own or frames)[-1].lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})"


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return `value`, a nesting of tuples, lists and dicts, with `function` applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(each, function) for name, each in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_tensors(each, function) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple takes each
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a nesting of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]

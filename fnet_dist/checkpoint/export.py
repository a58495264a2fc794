"""Write the files of a finished run: final weights, and predictions of the test set."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fnet_dist.checkpoint.storage import CorruptCheckpointError, best_step, read_checkpoint
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, write_atomically

THUMBNAILS = 40  # test images that are shown with their predictions


def save_model(run: RunDir, step: int, path: Path) -> None:
    """Copy the weights of the checkpoint of `step` to `path`, atomically. Raise CorruptCheckpointError if it differs
    from what was written."""
    write_atomically(path, read_checkpoint(run.checkpoint(step)).model)


def save_best_model(run: RunDir) -> None:
    """Write the weights of the best evaluation; warn if its checkpoint cannot be read."""
    if (step := best_step(run)) is None:
        return
    try:
        save_model(run, step, run.best_model)
    except CorruptCheckpointError as error:
        LOGGER.warning(f"no {run.best_model.name}: {error}")


@dataclass(frozen=True)
class Predictions:
    """The predictions of a classifier on the test set, in its order.

    `predicted` and `true` (n,) int64 are classes, `losses` (n,) each sample's cross entropy. `inputs_of` returns the
    inputs of the samples at some indices.
    """

    step: int
    predicted: Tensor
    true: Tensor
    losses: Tensor
    inputs_of: Callable[[Tensor], Any]


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Write what `fnet report` and W&B show of the test set, atomically; they then need neither torch nor the data.

    Of the first samples, and of those with the highest losses, the inputs become thumbnails if they are images,
    (k, 1 or 3, height, width) or (k, height, width): uint8, channels last.
    """
    tensors = {"predicted": predictions.predicted, "true": predictions.true, "losses": predictions.losses.float()}
    count = min(THUMBNAILS, len(predictions.true))
    worst = predictions.losses.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)[:count]
    tensors |= {"thumbnail_index": torch.arange(count), "worst_index": worst}
    for name, index in (("thumbnails", "thumbnail_index"), ("worst_thumbnails", "worst_index")):
        if (images := _images(predictions.inputs_of(tensors[index]))) is not None:
            tensors[name] = images
    write_atomically(path, save(tensors, {"step": str(predictions.step)}))


def _images(inputs: Any) -> Tensor | None:
    """Return `inputs` as uint8 images, each scaled to its full range; None if they are none."""
    if not isinstance(inputs, Tensor):
        return None
    images = inputs.cpu()
    images = images[:, 0] if images.ndim == 4 and images.shape[1] == 1 else images
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[1] == 3)):
        return None
    images = images.movedim(1, -1) if images.ndim == 4 else images
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    shape = (-1, *[1] * (images.ndim - 1))
    scaled = (images - low.view(shape)) / (high - low).clamp_min(1e-12).view(shape)  # one value: not divided by zero
    return (scaled * 255).round().to(torch.uint8).contiguous()

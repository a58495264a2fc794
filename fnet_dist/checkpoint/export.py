"""Write the files of a finished run: final weights, and predictions of the test set."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fnet_dist.checkpoint.storage import CorruptCheckpointError, best_step, read_checkpoint
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import RunDir, write_atomically


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


def save_predictions(path: Path, predicted: Tensor, true: Tensor, inputs: Tensor | None, indices: Tensor) -> None:
    """Write what `fnet report` shows of the test set, atomically; the report then needs neither torch nor the data.

    `predicted` and `true` (n,) int64 are classes in the data set's order. `inputs` (k, ...) of the samples `indices`
    (k,) become thumbnails if they are images, (k, 1 or 3, height, width) or (k, height, width): uint8, channels last.
    """
    tensors = {"predicted": predicted, "true": true}
    if inputs is None:
        write_atomically(path, save(tensors))
        return
    images = inputs[:, 0] if inputs.ndim == 4 and inputs.shape[1] == 1 else inputs
    if images.ndim == 3 or (images.ndim == 4 and images.shape[1] == 3):
        images = images.movedim(1, -1) if images.ndim == 4 else images
        low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
        shape = (-1, *[1] * (images.ndim - 1))
        # Each scaled to its full range; an image of one value must not divide by zero.
        scaled = (images - low.view(shape)) / (high - low).clamp_min(1e-12).view(shape)
        tensors |= {"thumbnails": (scaled * 255).round().to(torch.uint8).cpu().contiguous(), "thumbnail_index": indices}
    write_atomically(path, save(tensors))

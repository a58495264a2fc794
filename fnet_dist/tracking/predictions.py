"""Show a classifier's predictions on the test set in W&B: its own confusion chart, and a table of the worst samples."""

from pathlib import Path
from typing import Any

import numpy as np
import wandb
from safetensors import safe_open

from fnet_dist.run.run_dir import RunDir, read_manifest
from fnet_dist.tracking.rows import Row

MAX_CLASSES = 100  # of the chart, which has a row for each pair


def media_of(run: RunDir, row: Row) -> dict[str, Any]:
    """Return charts and tables that belong to `row`; {} for all rows but those of predictions.

    Nor has one whose files were replaced, as by the longer training of a finished run.
    """
    if "predictions/best_step" not in row:
        return {}
    last, best = row["trainer/step"], row["predictions/best_step"]
    media = _media(run, run.predictions, last, "")
    return media | (_media(run, run.best_predictions, best, "_best") if best != last else {})


def _media(run: RunDir, path: Path, step: float, suffix: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("step") != f"{step:.0f}":
                return {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except FileNotFoundError:
        return {}
    true, predicted, losses, worst = (tensors[name] for name in ("true", "predicted", "losses", "worst_index"))
    has_class = true >= 0  # a loss may ignore others
    names = [*(read_manifest(run)["dataset"].get("class_names") or ())]
    names += [f"class {number}" for number in range(len(names), int(max(true.max(), predicted.max())) + 1)]
    columns: list[str | int] = ["sample", "true", "predicted", "loss"]
    rows: list[list[Any]] = [
        [int(i), names[true[i]] if has_class[i] else "ignored", names[predicted[i]], float(losses[i])] for i in worst
    ]
    if "worst_thumbnails" in tensors:
        columns.insert(1, "image")
        for cells, image in zip(rows, tensors["worst_thumbnails"], strict=True):
            cells.insert(1, wandb.Image(np.squeeze(image)))
    media: dict[str, Any] = {f"predictions/samples{suffix}": wandb.Table(columns=columns, data=rows)}
    if len(names) <= MAX_CLASSES:
        media[f"predictions/confusion{suffix}"] = wandb.plot.confusion_matrix(
            y_true=true[has_class].tolist(),
            preds=predicted[has_class].tolist(),
            class_names=names,
            title=f"Confusion at step {step:.0f}",
        )
    return media

"""Define a recipe: the module with your data, model, loss and metrics. You need to read no other page of ours.

A job file names it: `recipe = "my_lab.cifar"` (`--recipe` overrides), a module in the current directory, on PYTHONPATH
or installed. `Recipe` below lists what the module has. `from fnet_dist.recipe import ...` gives all that it needs of
ours: base classes of settings (without importing torch), data sets, ready losses and metrics, `sample_random`.

A batch is (inputs, targets). Both are tensors, or tuples, lists or dicts of tensors, nested as you like, of any type
and shape; `model(inputs)` and `loss(outputs, targets)` get them as the data set returns them.

Two rules keep the promises of README.md. A sample depends on its index and, if it is augmented, on its draws alone, and
its draws come from torch's, random's or numpy's default generators (StreamedDataset seeds them before each sample) or
from `sample_random`. And the loss is a sum over samples, with the weight to divide it by.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fnet_dist.config.fields import NonNegativeInt, PathText, PositiveInt, Section, setting
from fnet_dist.config.load_recipe import load_recipe
from fnet_dist.config.recipe_sections import ClassifierLossConfig, DataConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fnet_dist.data.datasets import Dataset, DatasetInfo, InMemoryDataset, StreamedDataset
    from fnet_dist.loss import ClassifierLoss, Loss, build_classifier_loss
    from fnet_dist.metrics import Classification, Language, Metrics, Regression
    from fnet_dist.seeding import sample_random

__all__ = [
    "Classification",
    "ClassifierLoss",
    "ClassifierLossConfig",
    "DataConfig",
    "Dataset",
    "DatasetInfo",
    "InMemoryDataset",
    "Language",
    "Loss",
    "Metrics",
    "NonNegativeInt",
    "PathText",
    "PositiveInt",
    "Recipe",
    "Regression",
    "Section",
    "StreamedDataset",
    "build_classifier_loss",
    "sample_random",
    "setting",
]


class Recipe(Protocol):
    """The names in a recipe's module. Those up to `build_model` are required.

    An exception in one of these functions ends the start with one line: file, line and text (exit code 2). An exception
    while a sample is read names the sample (exit code 65).
    """

    # Settings: `[data]` and `[model]` of a job file, checked and listed by --help. Each class derives from ours, gives
    # each setting by `name: type = setting("meaning", default)`, and may refuse combinations: `conflict(self, config)`
    # returns a line, or None. Fields that do not change the result (paths, workers) say `changes_result=False`.
    DataConfig: type[DataConfig]
    ModelConfig: type[Section]

    def build_dataset(self, config: Any, split: Literal["train", "test"], device: "torch.device") -> "Dataset":
        """Return the samples of `split`, given the settings `[data]`: one of

        - InMemoryDataset: tensors, kept on `device`; a `transform` of whole batches there.
        - StreamedDataset: any map-style torch Dataset, read by DataLoader workers; `collate` for variable lengths.
        - a subclass of Dataset, which returns whole batches by itself, as from np.memmap.

        All may have `sample_weights`. `info` names the data, its sha256 (of the content, or of the list of files: ranks
        and later starts compare it) and, of a classifier, its classes. All ranks call this at the same time.
        """
        ...

    def build_model(self, config: Any, train_data: "Dataset") -> "nn.Module":
        """Return the model on the CPU, given the settings `[model]`; take sizes from `train_data`, not from settings.

        Its weights come from torch's default generator, which is seeded before.
        """
        ...

    # Optional from here on.

    LossConfig: type[Section]  # `[loss]`, for build_loss

    def build_loss(self, config: Any, train_data: "Dataset") -> "Loss":
        """Return the loss, given the settings `[loss]`. Left out: a classifier's loss, with ClassifierLossConfig."""
        ...

    metrics: "Metrics | tuple[Metrics, ...]"  # of an evaluation, besides the loss: Classification(), or your own

    def parameter_groups(self, model: "nn.Module", config: Any) -> Iterable[Mapping[str, Any]]:
        """Return the optimizer's groups, given the settings `[model]`: {"params": [...]} of all that is trained.

        "lr_scale" multiplies optim.lr and its schedule, "weight_decay" replaces optim.weight_decay.
        """
        ...

    def missing_data(self, config: Any) -> str | None:
        """Return what is missing of the data and how to get it, or None. `fnet submit` asks before it sends a job."""
        ...

    def has_real_data(self, config: Any) -> bool:
        """Return True if build_dataset would not use synthetic data now, which it did when there was no other.

        A start then renames the run that was trained on synthetic data, and begins anew under its name.
        """
        ...


def recipe_of(name: str) -> Recipe:
    """Return the recipe `name`. Raise ConfigError, one line, if it cannot be used."""
    return cast(Recipe, load_recipe(name))


def recipe_metrics(name: str) -> "tuple[Metrics, ...]":
    """Return the metrics of a recipe, which gives one, several or none."""
    metrics = getattr(load_recipe(name), "metrics", ())
    return tuple(metrics) if isinstance(metrics, tuple | list) else (metrics,)


_MODULES = {
    **dict.fromkeys(("Dataset", "DatasetInfo", "InMemoryDataset", "StreamedDataset"), "fnet_dist.data.datasets"),
    **dict.fromkeys(("ClassifierLoss", "Loss", "build_classifier_loss"), "fnet_dist.loss"),
    **dict.fromkeys(("Classification", "Language", "Metrics", "Regression"), "fnet_dist.metrics"),
    "sample_random": "fnet_dist.seeding",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: settings alone are read without torch, in 0.2 s not 3."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

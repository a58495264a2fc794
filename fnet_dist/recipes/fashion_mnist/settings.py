"""The settings of the Fashion-MNIST recipe. No torch here: commands that only read settings stay quick."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from fnet_dist import recipe
from fnet_dist.processes import absolute
from fnet_dist.recipe import ClassifierLossConfig, NonNegativeInt, PathText, Section, setting


class DataConfig(recipe.DataConfig):
    """The data: Fashion-MNIST or synthetic data."""

    dataset: Literal["fashion-mnist", "synthetic", "auto"] = setting(
        "the data; auto: fashion-mnist, or synthetic if it cannot be downloaded", "fashion-mnist"
    )
    root: PathText = setting(
        "directory of the data; the variable FNET_DATA overrides the job file",
        "~/.pytorch/F_MNIST_data",
        changes_result=False,
        validate_default=True,
    )
    augment: bool = setting("mirror and shift each training image at random, anew in each epoch", False)
    num_workers: NonNegativeInt = setting(
        "DataLoader workers per rank; 0 keeps all data on the device", 0, changes_result=False
    )

    def changes_result(self, field: str, config: Any) -> bool:
        """Do not count `auto`: config.json records the data that it chose."""
        return super().changes_result(field, config) and (field, self.dataset) != ("dataset", "auto")

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: str) -> str:
        try:
            return str(absolute(Path(root).expanduser()))
        except RuntimeError:
            raise ValueError("expected a path; no home directory is known for its '~'") from None


class ModelConfig(Section):
    """The network from 784 pixels to 10 classes."""

    form: Literal["modules", "sequential", "functional"] = setting("style of the model's code", "modules")
    activation: Literal["relu", "tanh"] = setting("activation after both hidden layers", "relu")
    dropout: float = setting("dropout probability of hidden units in training", 0.0, ge=0, lt=1)
    head: Literal["log_softmax", "logits", "softmax"] = setting("output of the network", "log_softmax")

    def conflict(self, config: Any) -> str | None:
        """Refuse a loss that does not fit the head, and class weights that do not fit the classes."""
        loss = config.loss
        if self.head == "softmax":
            expected = f"loss.name {loss.name}, which expects log-probabilities or logits, not probabilities"
            return f"model.head softmax does not train with {expected}; fix: --model.head log_softmax"
        if loss.name == "nll" and self.head != "log_softmax":
            fix = "--model.head log_softmax or --loss.name cross_entropy"
            return f"loss.name nll expects log-probabilities, which model.head {self.head} does not return; fix: {fix}"
        if loss.class_weights is not None and len(loss.class_weights) != 10:
            fix = "give one number per class, or --loss.class-weights none"
            return f"loss.class_weights has {len(loss.class_weights)} numbers for 10 classes; fix: {fix}"
        return None


class LossConfig(ClassifierLossConfig):
    """The loss of the book: the network returns log-probabilities."""

    name: Literal["nll", "cross_entropy"] = setting("nll on log-probabilities, cross_entropy on logits", "nll")

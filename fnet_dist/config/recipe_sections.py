"""The sections of settings that recipes build on: the data's, and the loss of a classifier."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fnet_dist.config.fields import PositiveInt, Section, setting


class DataConfig(Section):
    """The section `data` of every recipe, which adds its own settings: what the trainer itself reads of it."""

    global_batch_size: PositiveInt = setting("samples per optimizer step, over all ranks", 64)
    drop_last: bool = setting("leave out an epoch's last global batch if it is smaller than the others", False)


def _check_weights(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):  # the mean loss divides by their sum
        raise ValueError("expected one number >= 0 per class, at least one of them > 0")
    return weights


ClassWeights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], AfterValidator(_check_weights)]


class ClassifierLossConfig(Section):
    """The loss of a classifier; of a recipe without a loss of its own. See fnet_dist/loss.py."""

    name: Literal["nll", "cross_entropy"] = setting(
        "nll on log-probabilities, cross_entropy on logits", "cross_entropy"
    )
    class_weights: ClassWeights | None = setting("weight of each class in the mean loss", None)
    label_smoothing: float = setting("fraction of the target that is spread over all classes", 0.0, ge=0, lt=1)

    def conflict(self, config: Any) -> str | None:
        """Refuse label smoothing for a loss without it."""
        if self.label_smoothing > 0 and self.name != "cross_entropy":
            found = f"loss.label_smoothing {self.label_smoothing} needs loss.name cross_entropy, found {self.name}"
            return f"{found}; fix: --loss.name cross_entropy or --loss.label-smoothing 0"
        return None

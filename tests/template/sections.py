"""Settings of the coloured shapes: they replace the two classes of these names in fnet_dist/config/schema.py."""

from typing import Literal

from fnet_dist.config.schema import Config, NonNegativeInt, PositiveInt, Section, setting


class DataConfig(Section):
    """Coloured shapes, drawn when they are read."""

    train_count: PositiveInt = setting("images in an epoch", 1_003)
    test_count: PositiveInt = setting("images in the test set", 301)
    noise: float = setting("standard deviation of each pixel's noise", 0.3, ge=0)
    global_batch_size: PositiveInt = setting("images per optimizer step, over all ranks", 33)
    num_workers: NonNegativeInt = setting("DataLoader workers per rank", 2, changes_result=False)


class ModelConfig(Section):
    """The convolutional network."""

    channels: PositiveInt = setting("features after the first convolution", 16)
    norm: Literal["none", "batch"] = setting("normalization after each convolution", "none")

    def conflict(self, config: "Config") -> str | None:
        """Refuse a loss that expects log-probabilities: the network returns logits."""
        if config.loss.name != "cross_entropy":
            return (
                f"loss.name {config.loss.name} expects log-probabilities, but the network returns logits; "
                "fix: --loss.name cross_entropy"
            )
        return None

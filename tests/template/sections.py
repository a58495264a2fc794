"""For coloured shapes: the two classes that stand in fnet_dist/config/schema.py in place of those of the same names."""

from typing import Literal

from fnet_dist.config.schema import Config, Count, CountFromZero, Section, setting


class DataConfig(Section):
    """Coloured shapes, drawn when they are asked for."""

    train_count: Count = setting("images in an epoch", 1_003)
    test_count: Count = setting("images in the test set", 301)
    noise: float = setting("standard deviation of each pixel's noise", 0.3, ge=0)
    global_batch_size: Count = setting("images per optimizer step, over all ranks", 33)
    num_workers: CountFromZero = setting("DataLoader workers per rank", 2, changes_result=False)


class ModelConfig(Section):
    """The convolutional network."""

    channels: Count = setting("features after the first convolution", 16)
    norm: Literal["none", "batch"] = setting("normalization after each convolution", "none")

    def conflict(self, config: "Config") -> str | None:
        """The network puts out logits."""
        if config.loss.name != "cross_entropy":
            return (
                f"loss.name {config.loss.name} expects log-probabilities and the network puts out logits; "
                "fix: --loss.name cross_entropy"
            )
        return None

"""What takes a run out of the promise that its training is the same at any number of ranks: one loud line each."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fnet_dist.config.schema import Config


def reproducibility_warnings(model: nn.Module, config: Config) -> list[str]:
    """The lines for this model and these settings; none for an exact run."""
    modules, parallel = list(model.modules()), config.parallel
    if parallel.numerics == "invariant":
        return []
    # A functional model has no module for it: a setting of this name counts too.
    dropout = max([getattr(config.model, "dropout", 0.0), *(m.p for m in modules if isinstance(m, _DropoutNd))])
    reasons = {
        "BatchNorm takes its statistics from each rank's share alone": any(isinstance(m, _BatchNorm) for m in modules),
        "dropout draws differently for other shares": dropout > 0,
        "precision bf16 rounds each share's activations": parallel.precision == "bf16",
        "precision tf32 rounds each share's products": parallel.precision == "tf32",
        "numerics bf16_gradients rounds gradients before they meet": parallel.numerics == "bf16_gradients",
    }
    return [
        f"WARNING: another number of ranks will not give the same training: {reason}"
        for reason, holds in reasons.items()
        if holds
    ]

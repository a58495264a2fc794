"""The settings: what a person chose, as strict models, and which of them go together.

A job file is TOML with one table per section; settings.py merges it with the command line, settings_text.py tells what
is wrong. DataConfig and ModelConfig
belong to data.py and model.py: replace them with your own and keep `data.global_batch_size`, the one field of theirs
that the rest of the package reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fnet_dist.config.fields import (
    ClassWeights,
    Label,
    NonNegativeInt,
    PathText,
    PositiveInt,
    RunName,
    Section,
    setting,
)
from fnet_dist.config.slurm_resources import ResourcesConfig

# Learning rate and weight decay that each torch optimizer takes when told nothing.
TORCH_DEFAULTS: Mapping[str, tuple[float, float]] = {
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 1e-2),
    "sgd": (1e-3, 0.0),
    "adagrad": (1e-2, 0.0),
    "adadelta": (1.0, 0.0),
    "lbfgs": (1.0, 0.0),
}


class RunConfig(Section):
    """The run as a whole."""

    name: RunName = Field(
        default_factory=lambda: "unnamed",
        description="the run's directory, 1 to 64 of A-Za-z0-9._-; left out, the job file's name, plus a hash of the "
        "overrides if they change the result",
        json_schema_extra={"changes_result": False},
    )
    root: PathText = setting("directory that holds the runs", "runs", changes_result=False)
    seed: NonNegativeInt = setting("where all random numbers begin", 0)
    epochs: PositiveInt = setting("passes over the training data", 10)
    max_steps: PositiveInt | None = setting(
        "optimizer steps after which the run is finished", None, changes_result=False
    )

    def changes_result(self, field: str, config: "Config") -> bool:
        """As marked; epochs change what was trained before them only where a schedule is stretched over them."""
        if field == "epochs":
            return config.schedule.name != "constant"
        return super().changes_result(field, config)


class DataConfig(Section):
    """The data: Fashion-MNIST, or a stand-in of its shapes. Yours to replace."""

    dataset: Literal["fashion-mnist", "synthetic", "auto"] = setting(
        "the data; auto is the real set where it can be had, else the synthetic", "fashion-mnist"
    )
    root: PathText = setting(
        "directory of the data; FNET_DATA stands above the job file",
        "~/.pytorch/F_MNIST_data",
        changes_result=False,
        validate_default=True,
    )
    global_batch_size: PositiveInt = setting("images per optimizer step, over all ranks", 64)
    num_workers: NonNegativeInt = setting(
        "DataLoader workers per rank that stream the data; 0 keeps it on the device", 0, changes_result=False
    )

    def changes_result(self, field: str, config: "Config") -> bool:
        """As marked; `auto` is no choice yet, the run's config.json holds what it came to."""
        return super().changes_result(field, config) and (field, self.dataset) != ("dataset", "auto")

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: str) -> str:
        try:
            return str(Path(root).expanduser().absolute())
        except RuntimeError:
            raise ValueError("expected a path; no home directory is known for its '~'") from None


class ModelConfig(Section):
    """The network of 784 pixels and 10 classes. Yours to replace."""

    form: Literal["modules", "sequential", "functional"] = setting("how the network is written", "modules")
    activation: Literal["relu", "tanh"] = setting("after both hidden layers", "relu")
    dropout: float = setting("chance of a hidden unit being left out in training", 0.0, ge=0, lt=1)
    head: Literal["log_softmax", "logits", "softmax"] = setting("what the network puts out", "log_softmax")

    def conflict(self, config: "Config") -> str | None:
        """A loss must fit the head, and class weights the classes."""
        loss = config.loss
        if self.head == "softmax":
            return (
                f"model.head softmax does not train with loss.name {loss.name}, which expects logarithms and would "
                "minimise the wrong quantity on probabilities; fix: --model.head log_softmax"
            )
        if loss.name == "nll" and self.head != "log_softmax":
            return (
                f"loss.name nll expects log-probabilities, which model.head {self.head} does not give; "
                "fix: --model.head log_softmax or --loss.name cross_entropy"
            )
        if loss.class_weights is not None and len(loss.class_weights) != 10:
            return (
                f"loss.class_weights has {len(loss.class_weights)} numbers for 10 classes; "
                "fix: one for each, or --loss.class-weights none"
            )
        return None


class LossConfig(Section):
    """The loss; it serves any classifier."""

    name: Literal["nll", "cross_entropy"] = setting("nll on log-probabilities, cross_entropy on logits", "nll")
    class_weights: ClassWeights | None = setting("weight of each class in the mean", None)
    label_smoothing: float = setting("share of the target spread over all classes", 0.0, ge=0, lt=1)

    def conflict(self, config: "Config") -> str | None:
        """Only cross-entropy knows label smoothing."""
        if self.label_smoothing > 0 and self.name != "cross_entropy":
            return (
                f"loss.label_smoothing {self.label_smoothing} needs loss.name cross_entropy, found {self.name}; "
                "fix: --loss.name cross_entropy or --loss.label-smoothing 0"
            )
        return None


class OptimConfig(Section):
    """The optimizer. `lr` and `weight_decay` are numbers once loaded: torch's own where none was given."""

    name: Literal["adam", "adamw", "sgd", "adagrad", "adadelta", "lbfgs"] = setting("the optimizer", "adam")
    lr: float = Field(
        default_factory=lambda data: TORCH_DEFAULTS[data["name"]][0],
        gt=0,
        description="learning rate; left out or none, torch's default of the optimizer",
    )
    weight_decay: float = Field(
        default_factory=lambda data: TORCH_DEFAULTS[data["name"]][1],
        ge=0,
        description="weight decay; left out or none, torch's default of the optimizer",
    )
    momentum: float = setting("momentum of sgd", 0.0, ge=0, lt=1)
    max_grad_norm: float | None = setting("the gradient is clipped to this global norm", None, gt=0)

    def conflict(self, config: "Config") -> str | None:
        """LBFGS steps by a line of evaluations of one batch, which nothing may change in between."""
        if self.name == "lbfgs":
            found = {
                "optim.max_grad_norm": (self.max_grad_norm, None),
                "optim.weight_decay": (self.weight_decay, 0.0),
                "optim.momentum": (self.momentum, 0.0),
                "parallel.grad_accum_steps": (config.parallel.grad_accum_steps, 1),
                "schedule.name": (config.schedule.name, "constant"),
                "schedule.warmup_steps": (config.schedule.warmup_steps, 0),
            }
            for key, (value, needed) in found.items():
                if value != needed:
                    fix = f"--{key.replace('_', '-')} {'none' if needed is None else needed}"
                    return f"optim.name lbfgs does not go with {key} {value}; fix: {fix}, or another --optim.name"
        elif self.name != "sgd" and self.momentum > 0:
            return (
                f"optim.momentum {self.momentum} is for sgd only, found {self.name}; "
                "fix: --optim.name sgd or --optim.momentum 0"
            )
        return None


class ScheduleConfig(Section):
    """The learning rate over the run."""

    name: Literal["constant", "cosine", "onecycle"] = setting("the learning rate over all steps of the run", "constant")
    warmup_steps: NonNegativeInt = setting("steps over which the learning rate first rises linearly", 0)

    def conflict(self, config: "Config") -> str | None:
        """One cycle rises by itself."""
        if self.name == "onecycle" and self.warmup_steps > 0:
            return (
                f"schedule.warmup_steps {self.warmup_steps} does not go with schedule.name onecycle, which has its own "
                "warm-up; fix: --schedule.warmup-steps 0 or --schedule.name cosine"
            )
        return None


class ParallelConfig(Section):
    """The devices, their arithmetic and their patience."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto is cuda where there is one; nccl or gloo follows", "auto")
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "arithmetic of forward and backward; weights stay fp32", "fp32"
    )
    numerics: Literal["fast", "bf16_gradients", "invariant"] = setting(
        "how gradients are added up; invariant: with the same bits at any number of ranks", "fast"
    )
    logical_shards: PositiveInt = setting(
        "parts of a batch that are computed by themselves if invariant; ranks share them: a power of 2", 8
    )
    hash_every_steps: PositiveInt = setting(
        "steps between hashes of all weights, in the ledger and compared between ranks", 1000, changes_result=False
    )
    compile: bool = setting("torch.compile over forward, loss and backward; on cuda as CUDA graphs", False)
    grad_accum_steps: PositiveInt = setting("pieces that a rank's share of a batch is computed in", 1)
    timeout_s: float = setting(
        "seconds without progress after which an attempt fails", 120.0, changes_result=False, gt=0, le=604800
    )
    max_restarts: NonNegativeInt = setting(
        "attempts in a row without a new checkpoint after which `jobs run` gives up; 0: it restarts nothing",
        3,
        changes_result=False,
    )

    def conflict(self, config: "Config") -> str | None:
        """Every piece needs a sample; with the world size this is checked once that is known."""
        shards = self.logical_shards
        if self.numerics == "invariant" and shards & (shards - 1):
            return (
                f"parallel.logical_shards {shards} is not a power of 2: its halves could not be added in one order at "
                f"any number of ranks; fix: --parallel.logical-shards {1 << (shards.bit_length() - 1)}"
            )
        if config.data.global_batch_size < self.grad_accum_steps:
            return (
                f"parallel.grad_accum_steps {self.grad_accum_steps} is more than data.global_batch_size "
                f"{config.data.global_batch_size}; fix: --data.global-batch-size {self.grad_accum_steps} or more"
            )
        return None


class CheckpointConfig(Section):
    """When the state of training is saved, and where it begins."""

    every_seconds: float = setting("seconds between checkpoints", 300.0, changes_result=False, gt=0, le=604800)
    every_steps: PositiveInt | None = setting("steps between checkpoints, besides", None, changes_result=False)
    keep_last: int = setting("good checkpoints that are kept", 2, changes_result=False, ge=2, le=1000)
    resume: PathText = setting(
        "auto: resume if there is a checkpoint; required: or fail; new: start NAME-2; or the directory of a checkpoint "
        "from which a new run starts",
        "auto",
        changes_result=False,
    )


class TrackingConfig(Section):
    """What Weights & Biases shows of the run; it follows the ledger, which has every step."""

    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto: online if a key and a server are there, else offline; decided at the run's first start",
        "auto",
        changes_result=False,
    )
    project: Label = setting("W&B project", "fnet_dist", changes_result=False)
    entity: Label | None = setting("W&B user or team; none: the key's own", None, changes_result=False)
    name: Label | None = setting(
        "what W&B calls the run; left out, run.name and what the command line changed in the result",
        None,
        changes_result=False,
    )
    group: Label | None = setting("runs that W&B shows together, those of a sweep, say", None, changes_result=False)
    log_every_steps: PositiveInt = setting(
        "steps between rows in W&B (as at the run's first start), and between gradient norms", 50, changes_result=False
    )
    log_model: bool = setting("the final weights go to W&B as an artifact", False, changes_result=False)


class Config(BaseModel):
    """Every setting, resolved. Building it raises pydantic's ValidationError if something does not go together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        conflicts = [line for name in type(self).model_fields if (line := getattr(self, name).conflict(self))]
        if conflicts:
            raise ValueError(*conflicts)
        return self

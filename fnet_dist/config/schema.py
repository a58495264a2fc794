"""The settings as strict models, and the combinations that are refused.

A job file is TOML with one table per section: load.py reads and merges it, help.py explains settings and mistakes.
The sections data, model and loss belong to the recipe (fnet_dist/recipe.py): `config_class` adds them.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from fnet_dist.config.fields import (
    Label,
    MetricName,
    NonNegativeInt,
    OperationalSection,
    PathText,
    PositiveInt,
    RunName,
    Section,
    Title,
    format_value,
    setting,
)
from fnet_dist.config.load_recipe import DEFAULT_RECIPE, load_recipe
from fnet_dist.config.recipe_sections import ClassifierLossConfig, DataConfig
from fnet_dist.config.slurm_resources import ResourcesConfig

# Default learning rate and weight decay of each torch optimizer. A table, as importing torch takes seconds.
TORCH_DEFAULTS: Mapping[str, tuple[float, float]] = {
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 1e-2),
    "radam": (1e-3, 0.0),
    "nadam": (2e-3, 0.0),
    "sgd": (1e-3, 0.0),
    "adagrad": (1e-2, 0.0),
    "adadelta": (1.0, 0.0),
    "lbfgs": (1.0, 0.0),
}


# Options that not every optimizer has: which ones do, and how to leave the option out.
_ADAMS = ("adam", "adamw", "radam", "nadam")
OPTIMIZER_OPTIONS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "momentum": (("sgd",), "0"),
    "nesterov": (("sgd",), "false"),
    "betas": (_ADAMS, "none"),
    "eps": ((*_ADAMS, "adagrad", "adadelta"), "none"),
}
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=2, max_length=2)]


class RunConfig(Section):
    """The whole run."""

    name: RunName = Field(
        default_factory=lambda: "unnamed",
        description="name of the run's directory, 1 to 64 of A-Za-z0-9._-; by default the job file's name, plus a hash "
        "of the overrides that change the result",
        json_schema_extra={"changes_result": False},
    )
    root: PathText = setting("directory of all runs", "runs", changes_result=False)
    mode: Literal["private", "group"] = setting(
        "who may read and write a new run's directory: you, or its group too", "private", changes_result=False
    )
    seed: NonNegativeInt = setting("seed of all random streams", 0)
    epochs: PositiveInt = setting("passes over the training data", 10)
    max_steps: PositiveInt | None = setting("optimizer steps after which the run ends", None, changes_result=False)
    evaluate_every_steps: PositiveInt | None = setting(
        "steps between evaluations on the test data; none: one at the end of each epoch", None, changes_result=False
    )
    monitor: MetricName | None = setting(
        "loss or metric that tells which evaluation is the best; none: the recipe's first metric, else the loss", None
    )
    patience: PositiveInt | None = setting(
        "evaluations in a row without a better value after which the run ends; none: never", None, changes_result=False
    )

    def changes_result(self, field: str, config: "Config") -> bool:
        """Count `epochs` only under a schedule: without one, more epochs leave the earlier ones as they were."""
        return config.schedule.name != "constant" if field == "epochs" else super().changes_result(field, config)


class OptimConfig(Section):
    """The optimizer. `lr` and `weight_decay` that are not given become torch's defaults when loaded."""

    name: Literal["adam", "adamw", "radam", "nadam", "sgd", "adagrad", "adadelta", "lbfgs"] = setting(
        "the optimizer", "adam"
    )
    lr: float = Field(
        default_factory=lambda data: TORCH_DEFAULTS[data["name"]][0],
        gt=0,
        description="learning rate; left out or none: torch's default for the optimizer",
    )
    weight_decay: float = Field(
        default_factory=lambda data: TORCH_DEFAULTS[data["name"]][1],
        ge=0,
        description="weight decay; left out or none: torch's default for the optimizer",
    )
    momentum: float = setting("momentum, for sgd only", 0.0, ge=0, lt=1)
    nesterov: bool = setting("Nesterov's momentum, for sgd only", False)
    betas: Betas | None = setting("two decay rates of the Adams' running means; none: torch's default", None)
    eps: float | None = setting("added to a denominator for stability; none: torch's default", None, gt=0)
    decay_all: bool = setting("decay all weights; false: not biases and norms, parameters of one dimension", True)
    max_grad_norm: float | None = setting("global gradient norm above which gradients are clipped", None, gt=0)

    def conflict(self, config: "Config") -> str | None:
        """Refuse options of other optimizers, and what LBFGS, which evaluates one batch many times a step, lacks."""
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            wrong = f"needs optim.name sgd with optim.momentum above 0, found {self.name} with {self.momentum:g}"
            return f"optim.nesterov true {wrong}; fix: --optim.nesterov false"
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
        for option, (names, absent) in OPTIMIZER_OPTIONS.items():
            if (given := getattr(self, option)) and self.name not in names:
                wrong = f"optim.{option} {format_value(given)} is for {', '.join(names)} only, found {self.name}"
                return f"{wrong}; fix: --optim.name {names[0]} or --optim.{option} {absent}"
        return None


class ScheduleConfig(Section):
    """The learning rate schedule."""

    name: Literal["constant", "cosine", "onecycle"] = setting("learning rate schedule over the run", "constant")
    warmup_steps: NonNegativeInt = setting("steps of linear warm-up of the learning rate", 0)

    def conflict(self, config: "Config") -> str | None:
        """Refuse a warm-up for onecycle, which has its own."""
        if self.name == "onecycle" and self.warmup_steps > 0:
            found = f"schedule.warmup_steps {self.warmup_steps} does not go with schedule.name onecycle"
            fix = "--schedule.warmup-steps 0 or --schedule.name cosine"
            return f"{found}, which has its own warm-up; fix: {fix}"
        return None


class ParallelConfig(Section):
    """Devices, arithmetic and limits of distributed training."""

    device: Literal["auto", "cpu", "cuda"] = setting(
        "device of every rank; auto: cuda if there is one, and in a Slurm job that asks for GPUs", "auto"
    )
    precision: Literal["fp32", "tf32", "bf16"] = setting(
        "arithmetic of forward and backward; weights are always fp32", "fp32"
    )
    numerics: Literal["fast", "bf16_gradients", "invariant"] = setting(
        "how gradients are summed; invariant: bit-identical at any number of ranks", "fast"
    )
    logical_shards: PositiveInt = setting(
        "parts of a global batch that are summed in a fixed order if numerics is invariant; a power of 2", 8
    )
    hash_every_steps: PositiveInt = setting(
        "steps between hashes of all weights, compared between ranks and logged", 1000, changes_result=False
    )
    numa_binding: bool = setting(
        "bind each rank to the CPUs of its GPU's NUMA node, where there are several", True, changes_result=False
    )
    compile: bool = setting("torch.compile of forward, loss and backward; CUDA graphs on cuda", False)
    grad_accum_steps: PositiveInt = setting("microbatches per local batch", 1)
    unused_parameters: bool = setting("take zeros as the gradient of a parameter that the loss does not reach", False)
    sync_batchnorm: bool = setting("take BatchNorm's statistics over all ranks; on cuda only", False)
    timeout_s: float = setting(
        "seconds without progress after which an attempt fails", 120.0, changes_result=False, gt=0, le=604800
    )
    max_restarts: NonNegativeInt = setting(
        "failed attempts in a row without a new checkpoint before the launcher gives up; 0: never restart",
        3,
        changes_result=False,
    )
    replay_on_failure: bool = setting(
        "after a loss that is not finite, repeat the steps since the last checkpoint once, with `fnet run`: that tells "
        "a fault of the machine from one of the data or the settings; false: end at once",
        True,
        changes_result=False,
    )
    fork_ranks: bool = setting(
        "fork ranks from one process that has imported torch, with `fnet run`; false: start each by itself",
        True,
        changes_result=False,
    )

    def conflict(self, config: "Config") -> str | None:
        """Refuse a microbatch without a sample; check_batch_split checks it again with the world size."""
        shards = self.logical_shards
        if self.numerics == "invariant" and shards & (shards - 1):
            found = f"parallel.logical_shards {shards} is not a power of 2"
            fix = f"--parallel.logical-shards {1 << (shards.bit_length() - 1)}"
            return f"{found}, so shards cannot be summed in one order at any number of ranks; fix: {fix}"
        if config.data.global_batch_size < self.grad_accum_steps:
            found = f"is more than data.global_batch_size {config.data.global_batch_size}"
            fix = f"--data.global-batch-size {self.grad_accum_steps} or more"
            return f"parallel.grad_accum_steps {self.grad_accum_steps} {found}; fix: {fix}"
        return None


class CheckpointConfig(OperationalSection):
    """When checkpoints are written, and which one training starts from."""

    every_seconds: float = setting("seconds between checkpoints", 300.0, gt=0, le=604800)
    every_steps: PositiveInt | None = setting("steps between checkpoints, in addition", None)
    every_epochs: PositiveInt | None = setting(
        "epochs between checkpoints at an epoch's end, in addition, as long as they take under 1 % of the time", 1
    )
    keep_last: int = setting("number of valid checkpoints to keep", 2, ge=2, le=1000)
    keep_best: bool = setting("also keep the checkpoint of the best evaluation, by run.monitor", False)
    resume: PathText = setting(
        "auto: resume if there is a checkpoint; required: or fail; new: start NAME-2; or the directory of a checkpoint "
        "from which a new run starts",
        "auto",
        changes_result=False,
    )


class TrackingConfig(OperationalSection):
    """The run in Weights & Biases: a part of the metrics log, which has every step."""

    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "W&B mode; auto: online if a key and a server are there, else offline, fixed at the run's first start", "auto"
    )
    project: Label = setting("W&B project", "fnet_dist")
    entity: Label | None = setting("W&B user or team; none: the key's own", None)
    name: Title | None = setting(
        "run's name in W&B; by default run.name and the overrides that change the result", None
    )
    group: Title | None = setting("group of runs in W&B, such as those of a sweep", None)
    log_every_steps: PositiveInt = setting(
        "steps between rows in W&B and between gradient norms; for W&B fixed at the run's first start", 50
    )
    log_model: bool = setting("upload the final weights to W&B as an artifact", False)
    log_predictions: bool = setting("show the last and the best evaluation's predictions of a classifier in W&B", False)
    alerts: Literal["off", "on", "best"] = setting(
        "W&B alerts when the run ends or is in trouble; best: also at each evaluation better than all before", "off"
    )


class Config(BaseModel):
    """Every setting, with defaults filled in. Raises pydantic's ValidationError if some conflict.

    `config_class` returns the subclass for a recipe, whose sections data, model and loss are the recipe's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: str = DEFAULT_RECIPE
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig
    model: Section
    loss: Section
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        conflicts = [line for name in sections(type(self)) if (line := getattr(self, name).conflict(self))]
        if conflicts:
            raise ValueError(*conflicts)
        return self


def sections(config: type[Config]) -> dict[str, type[Section]]:
    """Return the class of each section of `config` by name."""
    fields = {name: field.annotation for name, field in config.model_fields.items()}
    return {name: kind for name, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)}


@cache
def config_class(recipe: str) -> type[Config]:
    """Return the class of all settings with this recipe. Raise ConfigError if the recipe cannot be used."""
    module = load_recipe(recipe)
    loss = getattr(module, "LossConfig", Section if hasattr(module, "build_loss") else ClassifierLossConfig)
    classes: dict[str, type[Section]] = {"data": module.DataConfig, "model": module.ModelConfig, "loss": loss}
    own: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in classes.items()}
    return create_model("Config", __base__=Config, recipe=(str, recipe), **own)

"""fnet evaluate [RUN]: loss and metrics of the run's weights on its test data, per class; --best (look 4)"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fnet_dist.checkpoint.storage import MODEL, best_step
from fnet_dist.config.environment import environment_settings
from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError, DataError
from fnet_dist.run.console import figure
from fnet_dist.run.run_dir import RunDir, read_manifest
from jobs.report.statistics import ClassFigures, confusion, per_class, percent
from jobs.runs import command_parser, find_run_or_job

if TYPE_CHECKING:
    from fnet_dist.training.evaluation import Evaluation


@dataclass(frozen=True)
class Result:
    """Figures over the whole test set; `data` is the data set's name, `classes` are empty without class names."""

    data: str
    evaluation: "Evaluation"
    classes: list[ClassFigures]


def main(argv: Sequence[str]) -> int:
    """Print the figures of the run that argv names; return 0."""
    parser = command_parser(__doc__)
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation (checkpoint.keep_best)")
    args = parser.parse_args(argv)
    run = find_run_or_job(args.run)
    result = evaluate_run(run, best=args.best)
    console = Console(highlight=False, soft_wrap=True)
    if result.classes:
        table = Table(box=None, pad_edge=False)
        for heading in ("class", "precision", "recall", "samples"):
            table.add_column(heading, justify="left" if heading == "class" else "right")
        for row in result.classes:
            table.add_row(row.name, percent(row.precision), percent(row.recall), f"{row.count:,}")
        console.print(table)
    found = result.evaluation
    figures = ", ".join(f"{name} {figure(value)}" for name, value in {**found.metrics, "loss": found.loss}.items())
    which = " (best)" if args.best else ""
    console.print(f"{run.name}{which}: {figures}, on {result.data}, {found.count:,} test samples", markup=False)
    return 0


def evaluate_run(run: RunDir, *, best: bool = False) -> Result:
    """Evaluate the final weights, or those of the best evaluation, on the test data, on the CPU.

    Raises ConfigError if the run has no such weights, DataError if the data is missing or not what the run was tested
    on.
    """
    path = _best_weights(run) if best else run.model
    if not path.is_file():
        raise ConfigError(f"{run.path} has no {path.name}: only a finished run has final weights")
    import torch
    from safetensors.torch import load_file

    from fnet_dist.config.load_recipe import load_recipe, recipe_errors
    from fnet_dist.distributed.process_group import Group
    from fnet_dist.recipe import recipe_metrics, recipe_of
    from fnet_dist.training.build import build_loss, evaluation_key
    from fnet_dist.training.evaluation import Evaluator, evaluate

    config = read_config(run.config)
    device = torch.device("cpu")  # every machine has one, and the test data is small
    here = environment_settings()  # FNET_DATA: the data may be elsewhere on this machine
    moved = {"root": here["data.root"]} if "data.root" in here and "root" in type(config.data).model_fields else {}
    data_config, recipe = config.data.model_copy(update=moved), recipe_of(config.recipe)
    with recipe_errors(load_recipe(config.recipe), "evaluate"):
        train, test = (recipe.build_dataset(data_config, split, device) for split in ("train", "test"))
        expected = read_manifest(run)["dataset"]["test_sha256"]
        if test.info.sha256 != expected:
            raise DataError(
                f"the test data's sha256 is {test.info.sha256[:12]}, the run's was {expected[:12]}; see FNET_DATA"
            )
        model = recipe.build_model(config.model, train)
        model.load_state_dict(load_file(path))
        loss = build_loss(config, train)
        metrics, key = recipe_metrics(config.recipe), evaluation_key(config)
        evaluator = Evaluator(model, loss, metrics, test, Group(0, 1, device), 1000, key)
        found = evaluate(evaluator)
    names, classes = test.info.class_names, list[ClassFigures]()
    if found.predicted is not None and found.true is not None:
        classes = per_class(confusion(found.true.numpy(), found.predicted.numpy(), len(names)), names)
    train.close()
    test.close()
    return Result(test.info.name, found, classes)


def _best_weights(run: RunDir) -> Path:
    """Return the weights of the best evaluation; of a run that has not finished, those in the checkpoint."""
    step = best_step(run)
    if step is None:
        raise ConfigError(f"{run.path} has no best checkpoint; --checkpoint.keep-best true keeps one")
    return run.best_model if run.best_model.is_file() else run.checkpoint(step) / MODEL

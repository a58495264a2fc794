"""fnet evaluate [RUN]: accuracy of the run's weights on its test data, per class (look 4)"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fnet_dist.config.environment import environment_settings
from fnet_dist.config.load import read_config
from fnet_dist.errors import ConfigError, DataError
from fnet_dist.run.run_dir import RunDir, read_json
from jobs.report.statistics import ClassFigures, confusion, per_class, percent
from jobs.runs import command_parser, find_run_or_job


@dataclass(frozen=True)
class Result:
    """Figures over the whole test set; `data` is the data set's name, `loss` the mean per sample."""

    data: str
    loss: float
    correct: int
    count: int
    classes: list[ClassFigures]


def main(argv: Sequence[str]) -> int:
    """Print the figures of the run that argv names; return 0."""
    run = find_run_or_job(command_parser(__doc__).parse_args(argv).run)
    result = evaluate_run(run)
    table = Table(box=None, pad_edge=False)
    for heading in ("class", "precision", "recall", "samples"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in result.classes:
        table.add_row(row.name, percent(row.precision), percent(row.recall), f"{row.count:,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{run.name}: {percent(result.correct / result.count)} of {result.count:,} right, loss {result.loss:.4f}, "
        f"on {result.data}",
        markup=False,
    )
    return 0


def evaluate_run(run: RunDir) -> Result:
    """Evaluate the final weights on the test data, on the CPU.

    Raises ConfigError if the run has no final weights, DataError if the data is missing or not what the run was tested
    on.
    """
    if not run.model.is_file():
        raise ConfigError(f"{run.path} has no {run.model.name}: only a finished run has final weights")
    import torch
    from safetensors.torch import load_file

    from fnet_dist.dataset import build_dataset
    from fnet_dist.distributed.process_group import Group
    from fnet_dist.loss import build_loss
    from fnet_dist.model import build_model
    from fnet_dist.training.evaluation import evaluate

    config = read_config(run.config)
    device = torch.device("cpu")  # every machine has one, and the test data is small
    here = environment_settings()  # FNET_DATA: the data may be elsewhere on this machine
    data_config = config.data.model_copy(update={"root": here["data.root"]} if "data.root" in here else {})
    data = build_dataset(data_config, "test", device)
    expected = read_json(run.manifest)["dataset"]["test_sha256"]
    if data.info.sha256 != expected:
        raise DataError(
            f"the test data's sha256 is {data.info.sha256[:12]}, the run's was {expected[:12]}; see FNET_DATA"
        )
    model = build_model(config.model)
    model.load_state_dict(load_file(run.model))
    result = evaluate(model, build_loss(config.loss), data, Group(0, 1, device), batch_size=1000)
    counts = confusion(result.true.numpy(), result.predicted.numpy(), len(data.info.class_names))
    return Result(data.info.name, result.loss, result.correct, result.count, per_class(counts, data.info.class_names))

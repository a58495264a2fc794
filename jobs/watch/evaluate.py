"""python -m jobs evaluate [RUN]: accuracy of a run's weights over its test data, per class."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fnet_dist.errors import ConfigError
from fnet_dist.run_dir import RunDir, find_run, read_json
from fnet_dist.settings import read_config


def main(argv: Sequence[str]) -> int:
    """Evaluate the run that argv names, print the figures, return 0."""
    parser = argparse.ArgumentParser(prog="python -m jobs evaluate", description=__doc__)
    parser.add_argument("run", nargs="?", help="name or directory of a run; the newest if left out")
    run = find_run(parser.parse_args(argv).run)
    if not run.model.is_file():
        raise ConfigError(f"{run.path} has no {run.model.name}: only a finished run has final weights")
    name, loss, correct, count, rows = evaluate_run(run)
    table = Table(box=None, pad_edge=False)
    for heading in ("class", "precision", "recall", "images"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{run.name}: accuracy {correct / count:.4f} ({correct:,} of {count:,}), loss {loss:.4f}, {name} data"
    )
    return 0


def evaluate_run(run: RunDir) -> tuple[str, float, int, int, list[tuple[str, str, str, str]]]:
    """Name of the data, loss, correct, count, and per class: name, precision, recall, number of samples.

    Raises DataError if the data cannot be had, or is not what the run was tested on.
    """
    import torch
    from safetensors.torch import load_file

    from fnet_dist.data import build_dataset
    from fnet_dist.errors import DataError
    from fnet_dist.group import Group
    from fnet_dist.loop import evaluate
    from fnet_dist.loss import build_loss
    from fnet_dist.model import build_model

    config = read_config(run.config)
    device = torch.device("cpu")
    data = build_dataset(config.data, "test", device)
    expected = read_json(run.manifest)["dataset"]["test_sha256"]
    if data.sha256 != expected:
        raise DataError(f"the test data's sha256 is {data.sha256[:12]}, the run's was {expected[:12]}; fix --data.root")
    model = build_model(config.model)
    model.load_state_dict(load_file(run.model))
    result = evaluate(model, build_loss(config.loss), data, Group(0, 1, device), batch_size=1000)
    rows = []
    for index, name in enumerate(data.class_names):
        hits = int(((result.true == index) & (result.predicted == index)).sum())
        actual, claimed = int((result.true == index).sum()), int((result.predicted == index).sum())
        rows.append((name, _share(hits, claimed), _share(hits, actual), f"{actual:,}"))
    return data.name, result.loss, result.correct, result.count, rows


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else "-"

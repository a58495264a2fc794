"""The names of a sweep's cells: the settings that differ."""

from jobs.cells import cell_labels


def test_cells_are_named_by_what_differs_and_by_sections_where_the_last_word_is_not_enough():
    tracking = {"group": "sweep"}
    cells = [
        {"run": {"name": str(number)}, "optim": {"name": name, "lr": 0.1 * number}, "loss": {"name": loss}}
        for number, (name, loss) in enumerate([("sgd", "nll"), ("adam", "mse")])
    ]
    named = ["optim.name sgd, lr 0.0, loss.name nll", "optim.name adam, lr 0.1, loss.name mse"]
    assert cell_labels([{**cell, "tracking": tracking} for cell in cells]) == named
    assert cell_labels(cells) is None, "runs that no sweep has made keep their names"

"""The panels of the view in W&B: each shows keys that rows.py builds, at any number of ranks."""

import re
from typing import Any

import pytest

from fnet_dist.errors import ConfigError
from fnet_dist.run.metrics_log import GPU_SPREADS, TIME_SPREADS
from fnet_dist.tracking.rows import RowBuilder

# The library declares validators as pydantic 1 did.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def keys_of(ranks: int) -> set[str]:
    """Return the keys of two rows, of two attempts, in which everything was measured."""
    by_rank = [1.0] * ranks if ranks <= 8 else None
    spread = {"min": 1.0, "median": 1.0, "max": 1.0, "max_rank": 0, "by_rank": by_rank}
    window = dict.fromkeys(("samples_per_second", "step_ms", "max_memory_gib", "max_over_median"), 1.0)
    window |= {"kind": "window", "first_step": 1, "last_step": 1, "attempt": 1, "slowest_rank": 0, "world_size": ranks}
    window |= dict.fromkeys((*TIME_SPREADS, *GPU_SPREADS), spread)
    train = dict.fromkeys(("epoch", "samples", "loss", "lr", "grad_norm", "time"), 1.0)
    train |= {"kind": "train", "loss_per_rank": [1.0] * ranks}
    evaluation = {"kind": "eval", "step": 2, "loss": 1.0, "metrics": {"accuracy": 1.0, "f1": 1.0}}
    steps = [train | {"step": number, "attempt": number} for number in (1, 2)]
    rows = RowBuilder(1, "accuracy", {"accuracy": "higher", "f1": "higher"})
    lines = [window, *steps, evaluation, {"kind": "epoch", "step": 2, "train_loss": 1.0}]
    return {key for line in lines for key in rows.add(line) or ()}


@pytest.mark.parametrize("ranks", [1, 2, 64, 100])
def test_every_panel_shows_keys_of_a_row_at_any_number_of_ranks(ranks: int) -> None:
    from fnet_dist.tracking.workspace import build_sections

    *sections, predictions = build_sections(["f1", "accuracy"], "accuracy")
    keys, shown = keys_of(ranks), set()
    for panel in [panel for section in sections for panel in section.panels]:
        found = {key for key in keys if panel.metric_regex and re.search(panel.metric_regex, key)} or {*panel.y}
        assert found, panel.title
        assert found <= keys, panel.title
        shown |= found
    assert predictions.name == "predictions"
    of_no_curve = {"_timestamp", "trainer/step", "trainer/epoch", "trainer/samples", "loss/worst_rank"}
    assert keys - shown == {key for key in keys if key.endswith("_max_rank")} | (of_no_curve & keys)


def test_all_ranks_are_in_one_panel_of_each_section_that_has_ranks() -> None:
    from fnet_dist.tracking.workspace import build_sections

    loss, _, ranks, *_ = build_sections(["accuracy"], "accuracy")
    overlaid: list[Any] = [panel.metric_regex for panel in (*loss.panels, *ranks.panels) if panel.metric_regex]
    assert all(re.search(regex, f"{regex[1:].partition('(')[0]}rank_1") for regex in overlaid)
    assert len(overlaid) == 1 + len(TIME_SPREADS) + len(GPU_SPREADS)


def test_a_title_has_no_symbols_and_the_name_differs_with_them() -> None:
    from fnet_dist.tracking.workspace import display_name, view_name

    assert display_name(None) == "fnet_dist"
    assert display_name("lr=0.1, 50 % 🙂") == "fnet_dist: lr_0.1, 50 % _"
    names = {view_name("e", "p", group) for group in (None, "lr=0.1", "lr_0.1")}
    assert len(names) == 3
    assert all(re.fullmatch("nw-[0-9a-f]{11}-v", name) for name in names)


def test_a_library_without_the_private_names_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces import _graphql

    from fnet_dist.tracking import workspace

    monkeypatch.delattr(_graphql, "execute_graphql")
    with pytest.raises(
        ConfigError, match=r"^wandb-workspaces [\d.]+ is another .*; expected wandb-workspaces>=\S+: pip"
    ):
        workspace._find_id(None, "e", "p", "nw-0-v")  # type: ignore[arg-type]

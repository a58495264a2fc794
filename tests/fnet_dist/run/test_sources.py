"""A start with edited code names the files that have changed since the last attempt."""

from importlib import invalidate_caches

from fnet_dist.run.sources import edited_sources, source_hashes

RECIPE = """
from fnet_dist.recipe import DataConfig, Section as ModelConfig
def build_dataset(config, split, device): ...
def build_model(config, train_data): ...
"""


def test_changed_new_and_removed_files_of_recipe_and_trainer_are_named(tmp_path, monkeypatch):
    lab = tmp_path / "edited_lab"
    lab.mkdir()
    (lab / "shapes.py").write_text(RECIPE)
    (lab / "old.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    import edited_lab.shapes  # noqa: F401  # as load_recipe has done by then

    before = source_hashes("edited_lab.shapes")
    manifest = {"sources": {"attempt": 3, "files": before}}
    assert {"edited_lab/shapes.py", "edited_lab/old.py", "fnet_dist/train.py"} <= before.keys()
    assert edited_sources(manifest, source_hashes("edited_lab.shapes")) is None
    (lab / "shapes.py").write_text(RECIPE + "# edited\n")
    (lab / "old.py").rename(lab / "new.py")
    line = edited_sources(manifest, source_hashes("edited_lab.shapes"))
    names = "edited_lab/new.py, edited_lab/old.py, edited_lab/shapes.py"
    assert line == f"the code has changed since attempt 3: {names}"
    assert edited_sources({}, before) is None, "a run of format 1 has no record of its code"

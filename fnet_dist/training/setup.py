"""Set up a run on all ranks together: load its data, claim the attempt, restore the checkpoint."""

from dataclasses import dataclass

from fnet_dist.checkpoint.resume import choose_run, rename_outdated, start_attempt
from fnet_dist.checkpoint.state import TrainState, restore_state
from fnet_dist.checkpoint.storage import CheckpointBytes, CorruptCheckpointError, newest_valid, read_checkpoint
from fnet_dist.config.batch_split import batches
from fnet_dist.config.load_recipe import load_recipe, recipe_errors
from fnet_dist.config.schema import Config
from fnet_dist.data.datasets import Dataset
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.distributed.process_group import Group, gather_json, raise_on_all_ranks, run_on_rank0
from fnet_dist.errors import ConfigError, DataError, StorageError
from fnet_dist.recipe import recipe_metrics, recipe_of
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.log import LOGGER, configure_logging
from fnet_dist.run.run_dir import RunDir, open_run, read_json, read_manifest, run_dir_of, write_manifest
from fnet_dist.run.sharing import share_files
from fnet_dist.run.sources import edited_sources, source_hashes
from fnet_dist.training.reproducibility import build_manifest


@dataclass(frozen=True)
class TrainTestData:
    """The training and the test data of a run."""

    train: Dataset
    test: Dataset

    def close(self) -> None:
        """End the processes that read samples."""
        self.train.close()
        self.test.close()


def build_data(config: Config, group: Group) -> TrainTestData:
    """Return training and test data. Raise DataError on all ranks if one has no valid data, or not rank 0's."""

    def build() -> tuple[Dataset, Dataset]:
        recipe = recipe_of(config.recipe)
        with recipe_errors(load_recipe(config.recipe), "build_dataset"):
            train_data = recipe.build_dataset(config.data, "train", group.device)
            test_data = recipe.build_dataset(train_data.info.config or config.data, "test", group.device)
        for name, data in (("training", train_data), ("test", test_data)):
            if len(data) == 0:
                raise DataError(f"{data.info.name}: no {name} samples")
        if batches(len(train_data), config.data.global_batch_size, config.data.drop_last) == 0:
            raise ConfigError(
                f"data.drop_last leaves no batch of {config.data.global_batch_size} in {len(train_data)} samples"
            )
        return train_data, test_data

    train_data, test_data = raise_on_all_ranks(group, build)
    by_rank = gather_json(group, [train_data.info.name, train_data.info.sha256, test_data.info.sha256])
    for rank, (name, sha256, test_sha256) in enumerate(by_rank):
        if [name, sha256, test_sha256] != by_rank[0]:
            raise DataError(
                f"rank {rank} has {name} data {sha256[:12]}, rank 0 has {by_rank[0][0]} data {by_rank[0][1][:12]}; "
                "give every node the same files: --data.root, or FNET_DATA"
            )
    return TrainTestData(train_data, test_data)


def claim_run(config: Config, group: Group, launch_env: LaunchEnv, data: TrainTestData) -> tuple[Config, Attempt]:
    """Return the config with the run's final name, and the attempt of this process group, on every rank.

    Rank 0 claims the attempt, unless its launcher has. Raise ConfigError if another process owns the run, or if it was
    trained on other data.
    """
    given, config = config.data, config.model_copy(update={"data": data.train.info.config or config.data})

    def claim() -> tuple[str, int]:
        claimed = config
        if launch_env.attempt is None:
            rename_outdated(config.model_copy(update={"data": given}))
        run = choose_run(config, launch_env)
        before, info = (read_json(run.manifest) or {}).get("dataset"), data.train.info
        if before is not None and before["sha256"] != info.sha256:
            raise ConfigError(
                f"{run.path} was trained on {before['name']} ({before['sha256'][:12]}), found {info.name} "
                f"({info.sha256[:12]}); give it the same data, or use another --run.name"
            )
        if launch_env.attempt is None:
            claimed, attempt = start_attempt(config, run, launch_id=launch_env.launch_id, world_size=group.world_size)
        else:
            attempt = Attempt(run, launch_env.attempt)
            attempt.check()
            if config.data != given:  # `auto` has become what was found; the launcher wrote all else
                open_run(config)
        last_manifest = read_json(attempt.run.manifest)
        sources = source_hashes(config.recipe)
        if edited := edited_sources(last_manifest, sources):
            LOGGER.warning(f"{edited}; results may differ from here on")
        metrics = recipe_metrics(config.recipe)
        manifest = build_manifest(config, group, data.train, data.test, metrics, sources, last_manifest)
        write_manifest(attempt.run, {**manifest, "sources": {"attempt": attempt.number, "files": sources}})
        return claimed.run.name, attempt.number

    name, number = run_on_rank0(group, claim)
    configure_logging(launch_env.process, number, reports=group.is_rank0)
    config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    attempt = Attempt(run_dir_of(config), number)
    share_files(attempt.run.path)
    return config, attempt


def restore_checkpoint(state: TrainState, run: RunDir, group: Group, steps_per_epoch: int) -> None:
    """Restore `state` from the newest valid checkpoint, on every rank, if there is one. Raise if all are corrupt."""

    def find() -> CheckpointBytes | None:
        return newest_valid(run, read_manifest(run)["id"]) if group.is_rank0 else None

    found = raise_on_all_ranks(group, find)  # on rank 0 only: the others read the file only if it is valid
    step = gather_json(group, None if found is None else found.values["step"])[0]
    if step is None:
        return

    def load() -> None:
        try:  # rank 0 has read the file already
            restore_state(state, found or read_checkpoint(run.checkpoint(step)), steps_per_epoch)
        except CorruptCheckpointError as error:
            raise StorageError(
                f"{error}, which rank 0 could read; is {run.path} on a file system that all nodes share?"
            ) from None

    raise_on_all_ranks(group, load)
    manifest = read_manifest(run)
    if changed := manifest.get("conditions_changed"):
        LOGGER.warning(f"results may differ in the last bits from here on: {', '.join(changed)}")
    source = manifest["resumed_from"]
    new = f"{run.name} is a new run, from {source['path']}: " if source and source["step"] == step else ""
    LOGGER.info(f"{new}going on from step {step:,} (epoch {state.epoch})")

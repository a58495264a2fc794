"""Rank 0's checkpoints: copied while training waits, then written beside it, one at a time."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fnet_dist.checkpoint.state import StateSnapshot, TrainState, encode, snapshot_state
from fnet_dist.checkpoint.storage import bytes_needed, prune, save_checkpoint
from fnet_dist.config.schema import CheckpointConfig
from fnet_dist.errors import LostOwnershipError, NonFiniteError, StorageError, describe
from fnet_dist.run import metrics_log
from fnet_dist.run.attempt import Attempt


class Saver:
    """Saves the state of one run; `say` prints a line. Close it."""

    def __init__(
        self,
        attempt: Attempt,
        config: CheckpointConfig,
        run_id: str,
        steps_per_epoch: int,
        committed_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._attempt = attempt
        self._config = config
        self._run_id = run_id
        self._steps_per_epoch = steps_per_epoch
        self._committed_step = committed_step
        self._say = say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._running: Future[bool] | None = None
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether `every_seconds` have passed since the last save began."""
        return time.monotonic() - self._last >= self._config.every_seconds

    def save(self, state: TrainState) -> None:
        """Begin to save `state`; one that falls due while another is being written is skipped, never queued."""
        if self._running is not None and not self._running.done():
            return
        self._join()
        self._last = time.monotonic()
        self._running = self._thread.submit(self._try_to_commit, self._copy(state))

    def save_now(self, state: TrainState) -> None:
        """Save `state` and wait for it, unless it is saved already.

        Raises StorageError if the disk does not take it, LostOwnershipError if the run is another's.
        """
        self._join()
        if self._committed_step != state.step and not self._commit(self._copy(state)):
            self._attempt.check()
            raise StorageError(
                f"step {state.step:,} could not be saved (above); the last good checkpoint is of step "
                f"{self._committed_step:,}: make room, and the same command goes on from there"
            )

    def close(self) -> None:
        """Wait for what is being written."""
        self._join()
        self._thread.shutdown()

    def _copy(self, state: TrainState) -> StateSnapshot:
        return snapshot_state(state, self._run_id, self._steps_per_epoch)

    def _join(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _try_to_commit(self, copy: StateSnapshot) -> bool:
        try:
            return self._commit(copy)
        except NonFiniteError as error:
            self._say(f"WARNING: checkpoint not saved: {error}")
            return False

    def _commit(self, copy: StateSnapshot) -> bool:
        """Write `copy`, then remove what is too old; False, and a loud line, if the disk will not take it."""
        content = encode(copy)
        run, step = self._attempt.run, int(copy.values["step"])
        try:
            metrics_log.sync(run.metrics_log)  # a checkpoint must not outlive the lines of its steps
            save_checkpoint(run, content, self._attempt.number, self._attempt.check)
            self._committed_step = step
            prune(run, self._run_id, self._config.keep_last, self._attempt.check)
        except LostOwnershipError:
            return False  # the next window says so and ends the attempt
        except OSError as error:
            if self._committed_step == step:
                self._say(f"WARNING: old checkpoints could not be removed: {describe(error)}")
            else:
                self._say(
                    f"WARNING: checkpoint not saved: {run.checkpoint(step)}: {error.strerror or error}; needs "
                    f"{bytes_needed(content):,} bytes, {_free(self._attempt):,} are free; the one of step "
                    f"{self._committed_step:,} stays, trying again at the next point"
                )
        return self._committed_step == step


def _free(attempt: Attempt) -> int:
    return shutil.disk_usage(attempt.run.path).free

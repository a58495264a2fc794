"""Save rank 0's checkpoints: copied while training waits, then written in a thread, one at a time."""

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from fnet_dist.checkpoint.state import StateSnapshot, TrainState, encode, snapshot_state
from fnet_dist.checkpoint.storage import bytes_needed, prune, save_checkpoint, write_best
from fnet_dist.config.schema import CheckpointConfig
from fnet_dist.errors import LostOwnershipError, NonFiniteError, StorageError, describe
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.log import LOGGER
from fnet_dist.run.notices import NoticeLog
from fnet_dist.run.run_dir import fsync

MAX_COST_OF_EPOCH_SAVES = 0.01  # share of training time that saves at the ends of epochs may cost


@dataclass
class Saver:
    """The saver of one run; `committed_step` is the newest checkpoint's, `monitor` is run.monitor's. Close it."""

    attempt: Attempt
    config: CheckpointConfig
    run_id: str
    steps_per_epoch: int
    committed_step: int
    monitor: str = "loss"
    notices: NoticeLog | None = None
    is_asked: bool = False  # by `fnet ask`: save at the end of the next window in which no save runs
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="saver"))
    _running: Future[bool] | None = None
    _last_save_began: float = field(default_factory=lambda: time.monotonic())
    _last_cost_s: float = 0.0  # of training: the copy that it waited for, and the thread's time on a core

    @property
    def is_running(self) -> bool:
        """True while the thread writes a checkpoint."""
        return self._running is not None and not self._running.done()

    def is_due(self, ended_epoch: int | None) -> bool:
        """Return True if one is asked for, `every_seconds` after the last save began, or for the end of `ended_epoch`.

        False while a save runs: `save` would do nothing, and ranks compare their weights before each one.
        """
        if self.is_running:
            return False
        passed_s, every_epochs = time.monotonic() - self._last_save_began, self.config.every_epochs
        if self.is_asked or passed_s >= self.config.every_seconds:
            return True
        is_end = ended_epoch is not None and every_epochs is not None and ended_epoch % every_epochs == 0
        return is_end and passed_s >= self._last_cost_s / MAX_COST_OF_EPOCH_SAVES  # epochs may take less than a second

    def save(self, state: TrainState) -> None:
        """Begin to save `state`, unless a save is still running: a queue of copies could fill the device's memory."""
        if self.is_running:
            return
        self._join()
        self.is_asked = False
        self._last_save_began = time.monotonic()
        snapshot = snapshot_state(state, self.run_id, self.steps_per_epoch)
        self._last_cost_s = time.monotonic() - self._last_save_began
        self._running = self._thread.submit(self._try_to_commit, snapshot)

    def save_best(self, state: TrainState) -> None:
        """Keep the checkpoint of this step, whose evaluation is the best: begin to save it, if it is not saved."""
        self._join()
        if self.committed_step == state.step:  # saved before its evaluation
            write_best(self.attempt.run, state.best_step, self.monitor, state.best_value)
        else:
            self.save(state)

    def save_now(self, state: TrainState) -> None:
        """Save `state` and wait for it, unless it is saved already. Raise StorageError if the disk fails."""
        self._join()
        if self.committed_step == state.step:
            return
        if not self._commit(snapshot_state(state, self.run_id, self.steps_per_epoch)):
            self.attempt.check()  # first: a lost run is not an error of the disk
            raise StorageError(
                f"step {state.step:,} could not be saved (above); the last valid checkpoint is of step "
                f"{self.committed_step:,}: make room, and the same command resumes from there"
            )

    def note_failure(self, step: int, what: str, error: OSError) -> None:
        """Add a notice that `what` could not be written; only the first failure after a good save adds one."""
        if self.notices is not None:
            last = self.committed_step
            text = f"cannot write {what} ({error.strerror or error}); its last checkpoint is of step {last:,}"
            self.notices.add("saves_failing", f"saves fail after step {last}", text, step)

    def close(self) -> None:
        """Wait for a running save."""
        self._join()
        self._thread.shutdown()

    def _join(self) -> None:
        running, self._running = self._running, None  # an exception of the thread is raised once
        if running is not None:
            running.result()

    def _try_to_commit(self, snapshot: StateSnapshot) -> bool:
        began = time.thread_time()
        try:
            return self._commit(snapshot)
        except NonFiniteError as error:  # the next loss is not finite either: the loop then names step and rank
            LOGGER.warning(f"checkpoint not saved: {error}")
            return False
        finally:
            self._last_cost_s += time.thread_time() - began

    def _commit(self, snapshot: StateSnapshot) -> bool:
        """Write `snapshot`, then remove old checkpoints; print a warning and return False if the disk fails."""
        began, content = time.monotonic(), encode(snapshot)
        run, step = self.attempt.run, int(snapshot.values["step"])
        try:
            fsync(run.metrics_log)  # first: a resume never writes again the lines of steps that a checkpoint contains
            save_checkpoint(run, content, self.attempt.number, self.attempt.check)
            self.committed_step = step
            if self.config.keep_best and snapshot.values["best_step"] == step:
                write_best(run, step, self.monitor, snapshot.values["best_value"])
            LOGGER.debug(f"saved {run.checkpoint(step)} in {time.monotonic() - began:.2f} s")
            prune(run, self.run_id, self.config.keep_last, self.attempt.check)
        except LostOwnershipError:
            return False  # the recorder reports it at the end of the window, and the attempt ends
        except OSError as error:
            if self.committed_step == step:
                LOGGER.warning(f"old checkpoints could not be removed: {describe(error)}")
            else:
                free = shutil.disk_usage(run.path).free
                LOGGER.warning(
                    f"checkpoint not saved: {run.checkpoint(step)}: {error.strerror or error}; needs "
                    f"{bytes_needed(content):,} bytes, {free:,} are free; the one of step {self.committed_step:,} "
                    "stays, and the next checkpoint that is due tries again"
                )
                self.note_failure(step, f"the checkpoint of step {step:,}", error)
        return self.committed_step == step

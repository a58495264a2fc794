"""Answer `fnet ask` while training goes on: agree on a request, let each rank do its part, tell when all are done.

Rank 0 looks for a request once a window. The header of the window's collective tells the other ranks that there is one,
and only then do they exchange it. From then on each rank says in the header whether it is busy with its part. A
checkpoint is rank 0's alone: all ranks learn from the header that one is due, as always.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fnet_dist.checkpoint.saver import Saver
from fnet_dist.data.sampler import StepBatch
from fnet_dist.distributed.process_group import Group, gather_json
from fnet_dist.distributed.watchdog import Watchdog
from fnet_dist.run.ask import Request, has_request, read_request, remove_request
from fnet_dist.run.attempt import Attempt
from fnet_dist.run.log import LOGGER
from fnet_dist.run.run_dir import write_json
from fnet_dist.training.answer_parts import StackDump, StepProfile, error_of
from fnet_dist.training.window import MAX_WINDOW_STEPS, Window, timing_stride

NOTHING, OFFERED, BUSY = range(3)  # what a rank says in the collective that closes a window; the highest counts


@dataclass
class Answers:
    """One rank's share in the answers, of one request at a time. Only rank 0, which has a saver, looks for them."""

    group: Group
    watchdog: Watchdog
    attempt: Attempt | None = None  # None: nobody can ask
    saver: Saver | None = None
    _request: Request | None = None  # the open one; on the other ranks None until they know of it
    _part: StackDump | StepProfile | None = None  # this rank's, from the agreement on
    _save_from: int | None = None  # the first step whose checkpoint is the one that was asked for

    def begin_window(self, step: int) -> int:
        """Begin what is to be done in the window after `step`; return the number of steps that it may have."""
        if self._part is None:
            return MAX_WINDOW_STEPS
        self._extend_timeout(step)
        return self._part.begin_window(step)

    def timing_stride(self, length: int) -> int:
        """Return n such that every n-th step of a window of `length` is timed."""
        # None of those in a profile: the profiler would make its ranks look slow.
        return length + 1 if isinstance(self._part, StepProfile) else timing_stride(length)

    def marked(self, batches: Sequence[StepBatch], step: int) -> Iterable[StepBatch]:
        """Return the batches of the steps after `step`, which leave their marks in a profile."""
        return self._part.marked(batches, step) if isinstance(self._part, StepProfile) else batches

    def look(self, step: int, room: int) -> int:
        """Return what the other ranks should know at the end of a window, after `step`.

        `room` is the number of steps until an evaluation or the end of the epoch, which no profile contains.
        """
        if self._part is not None:
            return BUSY if self._part.is_busy(room) else NOTHING
        if self._request is None and self.saver is not None:
            self._request = self._find_request(room)
        if self._request is None:
            return NOTHING
        if self._request.kind == "save":
            self._look_at_save(step)
            return NOTHING
        return OFFERED

    def exchange(self, window: Window) -> None:
        """Agree on a request, or end the answer that no rank is busy with any more. All ranks do the same."""
        if window.stop or window.failure is not None:
            return
        if window.ask == OFFERED:
            mine = None if self._request is None else self._request.model_dump_json()
            self._request = Request.model_validate_json(gather_json(self.group, mine)[0])
            self._part = self._part_of(self._request, window)
        elif window.ask == NOTHING:
            self._end_part(window.steps[-1].step)

    def finish(self, step: int) -> None:
        """Answer with what there is, on all ranks: training has ended at `step`, and its checkpoint is saved."""
        self._end_part(step)
        if self._save_from is not None:
            self._look_at_save(step)

    def _find_request(self, room: int) -> Request | None:
        """Return a request to this attempt, None without one. A profile waits until there is room for all its steps."""
        assert self.attempt is not None
        run = self.attempt.run
        if not has_request(run):
            return None
        request = read_request(run)
        if request is None or request.attempt < self.attempt.number:
            LOGGER.warning(f"{run.ask} is not a request to attempt {self.attempt.number}; removed")
            error_of(run.ask.unlink)
            return None
        is_later = request.attempt > self.attempt.number  # to the next owner: this one has been taken over
        return None if is_later or (request.kind == "profile" and 0 < room < request.steps) else request

    def _part_of(self, request: Request, window: Window) -> StackDump | StepProfile:
        assert self.attempt is not None
        folder, rank = request.folder(self.attempt.run), self.group.rank
        is_asked = request.ranks is None or rank in request.ranks
        if request.kind == "stacks":
            title = f"rank {rank}, attempt {request.attempt}, after step {window.steps[-1].step:,}"
            # Half a window later: now all ranks are here.
            return StackDump(folder / f"rank_{rank}.stacks.txt" if is_asked else None, title, window.seconds / 2)
        return StepProfile(folder / f"rank_{rank}" if is_asked else None, request.steps, self.group.device)

    def _end_part(self, step: int) -> None:
        part, self._part = self._part, None
        if part is None:
            return
        self._extend_timeout(step)
        errors = gather_json(self.group, part.end())  # all wait here for the slowest, so that no window seems slow
        if self.saver is None:
            self._request = None
        else:
            named = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
            self._reply({"steps": part.steps, "checkpoint": None, "errors": named})

    def _extend_timeout(self, step: int) -> None:
        """Give the profiler time to start or to write; at the end of the next window the usual timeout holds again."""
        self.watchdog.extend_timeout("answering `fnet ask` after step", step)

    def _look_at_save(self, step: int) -> None:
        """Ask the saver for a checkpoint, or answer once it is written: of this step or a later one."""
        assert self.saver is not None
        assert self.attempt is not None
        if self._save_from is None:
            self._save_from, self.saver.is_asked = step, True
            return
        checkpoint, errors, is_saving = None, list[str](), self.saver.is_asked or self.saver.is_running  # read first
        if self.saver.committed_step >= self._save_from:
            checkpoint = str(self.attempt.run.checkpoint(self.saver.committed_step).absolute())
        elif not is_saving:
            errors = ["not saved; a warning in the log of rank 0 says why"]
        else:
            return
        self._save_from = None
        self._reply({"steps": None, "checkpoint": checkpoint, "errors": errors})

    def _reply(self, answer: dict[str, Any]) -> None:
        """Write the answer, remove the request, and say so in the log."""
        assert self.attempt is not None
        assert self._request is not None
        request, run = self._request, self.attempt.run
        folder = request.folder(run)
        errors = [*answer["errors"]]
        if error := error_of(lambda: folder.mkdir(exist_ok=True)) or error_of(
            lambda: write_json(request.answer(run), answer)
        ):
            errors.append(error)
        if errors:
            LOGGER.warning(f"`fnet ask {request.kind}`: {'; '.join(errors)}; training goes on")
        else:
            LOGGER.info(f"`fnet ask {request.kind}` is answered: {answer['checkpoint'] or folder}")
        remove_request(run, request)
        self._request = None

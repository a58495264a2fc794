"""make soak, its part on a real Slurm: runs of several nodes, faults at random moments, signals, W&B's key and rows.

    python -m tests.soak.on_slurm [SEED [CONTAINER]]

CONTAINER is a command prefix, as in slurm/site.toml, through which all jobs run then. Two private clusters, one with
accounting, take the same faults side by side. Each case is a run of its own, compared to the bit with one that nobody
disturbed; no part runs longer than its count of cases times TIMEOUT_S.
"""

import json
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fnet_dist.run.run_dir import RunDir
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.supervised_run import SupervisedRunError, run_undisturbed
from jobs.verification.supervised_slurm_run import SupervisedSlurmRun
from slurm import client
from slurm.errors import SlurmError
from slurm.sandbox.cluster import local_cluster, missing_programs
from slurm.sandbox.conf_files import LocalCluster
from slurm.submit_env import changed
from tests.conftest import REPOSITORY
from tests.helpers.slurm_commands import ask, naming, title, wait_for
from tests.helpers.submitted_runs import JOB, place, submit
from tests.helpers.tracked_runs import EVERY, check_rows, in_wandb, read_back
from tests.helpers.wandb_http import API_KEY
from tests.helpers.wandb_server import WandbServer
from tests.soak.faults import FAULTS, LONG_JOB, apply_to
from tests.soak.repairs import heal
from tests.soak.table import Table

TABLE = Path(__file__).with_name("results_slurm.md")
CASES = 3  # of each fault on each cluster; with a grace time once
TRACKED = [*JOB[:-1], "offline", "--tracking.log-every-steps", str(EVERY)]
Wrong = list[str]


def main(seed: int, container: str = "") -> int:
    """Run this part alone, write its table; 0 if everything held."""
    command = f"python -m tests.soak.on_slurm {seed}{f' {shlex.quote(container)}' if container else ''}"
    print(f"seed {seed}; to repeat: {command}", flush=True)
    began, table = time.monotonic(), Table()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        site = Path(name, "site.toml")
        site.write_text(f"container = {json.dumps(container)}\n" if container else "")
        with changed({"FNET_SITE": str(site)}):
            on_slurm(random.Random(seed), Path(name), table)
    TABLE.write_text(table.markdown(command, seed, (time.monotonic() - began) / 60), encoding="utf-8")
    return 0 if table.all_held else 1


def on_slurm(rng: random.Random, folder: Path, table: Table) -> None:
    """All parts on Slurm, each with a seed of its own; none where Slurm's programs are missing."""
    if missing := missing_programs(accounting=True):
        table.add("on a real Slurm", 0, 0, f"skipped: {missing}")
        return
    for part in (sizes, faults, by_pgid, tracked):
        place = folder / part.__name__
        place.mkdir()
        part(random.Random(rng.randrange(2**32)), place, table)


def sizes(rng: random.Random, folder: Path, table: Table) -> None:
    """Several nodes with two ranks each, sent in both ways: one result.

    Those of one node are others in the last bits: its ranks add gradients in another order (README, what is promised).
    """
    with _asked(local_cluster(3)):
        for nodes in (2, 3):
            first: RunDir | None = None
            for name, send in (("submit", _by_submit), ("slurm/train.sbatch", _by_script)):
                began = time.monotonic()
                supervised = send(RunDir(folder / f"{name.rpartition('/')[2]}-{nodes}"), nodes)
                wrong = _wrong(_finished, supervised, first or supervised.run, 0)
                same = "" if first is None else ", the weights of the other way"
                first = supervised.run
                promise = f"{nodes} nodes x 2 ranks by {name}: finished{same}"
                table.add(promise, int(not wrong), 1, "; ".join(wrong) or f"{time.monotonic() - began:.0f} s")


def faults(rng: random.Random, folder: Path, table: Table) -> None:
    """Each fault at random moments, first second to last, with accounting and without."""
    usual = run_undisturbed(folder / "usual", [*JOB, "--nproc-per-node", "2"])
    longer = run_undisturbed(folder / "longer", [*LONG_JOB, "--nproc-per-node", "2"])
    with (
        local_cluster(3) as plain,
        local_cluster(3, accounting=True) as accounted,
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        for name, fault in FAULTS.items():
            seeds, said, late, wrong = list[int](), list[str](), 0, list[str]()
            for number in range(1 if name == "grace" else CASES):
                seeds.append(rng.randrange(2**32))
                undisturbed = longer if fault.job == LONG_JOB else usual
                running = []
                for cluster in (plain, accounted):
                    run = (
                        folder / f"{name.replace(' ', '-')}-{number}-{'accounting' if cluster.accounting else 'plain'}"
                    )
                    seed = seeds[-1] + cluster.accounting
                    running.append(pool.submit(apply_to, cluster, name, undisturbed, run, seed))
                for case in running:
                    seen = case.result()
                    print(
                        f"  {name}, seed {seeds[-1]}: {seen.story}{''.join(f'; WRONG: {w}' for w in seen.wrong)}",
                        flush=True,
                    )
                    said.append(seen.story)
                    late += seen.is_late
                    wrong += [f"{seen.story}: {'; '.join(seen.wrong)}"] if seen.wrong else []
            held = len(said) - len(wrong)
            words = [f"seeds {seeds}", *([f"{late} after the run's end"] if late else []), *wrong]
            table.add(fault.promise, held, len(said), "; ".join(words))


def by_pgid(rng: random.Random, folder: Path, table: Table) -> None:
    """Run where Slurm finds a job's processes by their process group, which ranks have left."""
    undisturbed = run_undisturbed(folder, [*JOB, "--nproc-per-node", "2"])
    with _asked(local_cluster(3, proctrack="pgid")) as cluster:
        for signal_name, restarts in (("USR2", 1), ("TERM", 0)):
            wrong, steps = list[str](), list[int]()
            for number in range(CASES):
                steps.append(rng.randrange(1, 440))
                run = RunDir(folder / f"{signal_name}-{number}")
                wrong += _wrong(_signalled, run, signal_name, steps[-1], restarts, undisturbed)
            promise = f"proctrack/pgid: {signal_name} reaches the ranks, which save and leave"
            table.add(promise, CASES - len(wrong), CASES, "; ".join([f"at steps {steps}", *wrong]))
        wrong = list[str]()
        for number in range(CASES):
            supervised = submit(RunDir(folder / f"cancelled-{number}"))
            wrong += _wrong(_cancelled, supervised, rng.randrange(1, 440))
            heal(cluster, supervised)
        table.add("proctrack/pgid: no orphan after scancel", CASES - len(wrong), CASES, "; ".join(wrong))


def tracked(rng: random.Random, folder: Path, table: Table) -> None:
    """W&B under Slurm's signals: each row once, and the key in no file and no command line."""
    with _asked(local_cluster(3)) as cluster, WandbServer() as server, changed(server.environment()):
        for mode in ("offline", "online"):
            shown, wrong, rows, steps = list[str](), list[str](), 0, list[int]()
            for number in range(CASES):
                run = RunDir(folder / f"{mode}-{number}")
                supervised = submit(run, job=[mode if word == "offline" else word for word in TRACKED])
                steps.append(rng.randrange(20, 200))
                found = _wrong(_disturbed, supervised, cluster, steps[-1], shown)
                if not found:
                    given = read_back(run) if mode == "offline" else in_wandb(run, server).history
                    rows += len(given)
                    found = _wrong(check_rows, given, run)
                wrong += found
                heal(cluster, supervised)
                shown += [str(path) for path in run.path.rglob("*") if path.is_file() and _holds(path, API_KEY)]
            promise = f"{mode} tracking, warned and requeued: W&B has each row once"
            seen = "; ".join([f"{rows:,} rows; warned at steps {steps}", *wrong])
            table.add(promise, CASES - len(wrong), CASES, seen)
            table.add("... and the key is in no file of the run, in no command line", int(not shown), 1, str(shown))


def _by_submit(run: RunDir, nodes: int) -> SupervisedSlurmRun:
    return submit(run, "-N", str(nodes), "--resources.nproc-per-node", "2")


def _by_script(run: RunDir, nodes: int) -> SupervisedSlurmRun:
    """As its first lines say; two pretended GPUs a node make two ranks of it, which train on the CPU."""
    sizes = [f"--nodes={nodes}", "--gpus-per-node=2", "--cpus-per-task=2", f"--output={run.path}.out"]
    words = ["sbatch", "--parsable", *sizes, "slurm/train.sbatch", *JOB, *place(run), "--parallel.device", "cpu"]
    environment = {**os.environ, "PYTHON": sys.executable}
    sent = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True, timeout=30
    )
    return SupervisedSlurmRun(run, sent.stdout.strip())


def _finished(supervised: SupervisedSlurmRun, undisturbed: RunDir, restarts: int) -> Wrong:
    ended = supervised.wait_for_end()
    wrong = [*run_differences(undisturbed, supervised.run), *gaps(supervised.run)]
    if (ended.state, ended.restarts) != ("COMPLETED", restarts):
        wrong.append(f"{ended.state} after {ended.restarts} requeues")
    wait_for(lambda: naming(str(supervised.run.path)) == [])
    return wrong


def _signalled(run: RunDir, name: str, step: int, restarts: int, undisturbed: RunDir) -> Wrong:
    supervised = submit(run)
    supervised.wait_for_step(step)
    client.signal_job(supervised.job_id, name)
    if restarts == 0:  # Slurm has not asked for it, and does not start the job again
        ended = supervised.wait_for_end()
        if ended.exit_code != 75:
            return [f"{ended.state}, exit code {ended.exit_code}"]
        supervised = submit(run)
    wrong = _finished(supervised, undisturbed, restarts)
    if supervised.ends() != [f"signal_{name.lower()}", "finished"]:
        wrong.append(f"attempts: {supervised.ends()}")
    return wrong


def _cancelled(supervised: SupervisedSlurmRun, step: int) -> Wrong:
    supervised.wait_for_step(step)
    client.cancel(supervised.job_id)
    ended = supervised.wait_for_end()
    wait_for(lambda: naming(str(supervised.run.path)) == [])
    return [] if ended.state == "CANCELLED" else [ended.state]


def _disturbed(supervised: SupervisedSlurmRun, cluster: LocalCluster, step: int, shown: list[str]) -> Wrong:
    """Warned at `step`, requeued by Slurm 100 steps later; what of the key any command line has shown is in `shown`."""
    supervised.wait_for_step(step)
    shown += _in_command_lines(API_KEY)
    client.signal_job(supervised.job_id, "USR2")
    supervised.wait_for_attempt(2)
    supervised.wait_for_step(supervised.step() + 100)
    shown += _in_command_lines(API_KEY)
    ask(cluster, "scontrol", "requeue", supervised.job_id)
    supervised.wait_for_attempt(3)
    shown += _in_command_lines(API_KEY)
    ended = supervised.wait_for_end()
    wait_for(lambda: naming(str(supervised.run.path)) == [])
    found = (ended.state, ended.restarts, supervised.ends())
    return [] if found == ("COMPLETED", 2, ["signal_usr2", "signal_term", "finished"]) else [str(found)]


def _in_command_lines(text: str) -> list[str]:
    lines = (" ".join(title(int(path.name))) for path in Path("/proc").glob("[0-9]*"))
    return [line for line in lines if text in line]


def _holds(path: Path, text: str) -> bool:
    return text.encode() in path.read_bytes()


def _wrong(case: Callable[..., Wrong | None], *arguments: Any) -> Wrong:
    """Return what a case found wrong, in one line; a case that could not go on counts as wrong."""
    try:
        found = case(*arguments)
    except (AssertionError, SlurmError, SupervisedRunError) as error:
        found = [f"{type(error).__name__}: {error}"]
    return ["; ".join(found)] if found else []


@contextmanager
def _asked(cluster: AbstractContextManager[LocalCluster]) -> Iterator[LocalCluster]:
    """`cluster` is the one that is asked."""
    with cluster as up, changed(up.environment):
        yield up


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(2**32), *sys.argv[2:3]))

"""make soak: the long matrices of faults, bounded, with their seeds; the table goes to tests/soak/results.md.

    python -m tests.soak [SEED]

Every part runs real `jobs run` processes on two ranks, or the real save protocol in forked processes, and counts how
often what is promised held. Real data where FNET_DATA names it. The part on a real Slurm is tests/soak/on_slurm.py.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fnet_dist.checkpoint.storage import find_corruption
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir
from jobs.commands.drill import drill
from jobs.verification.compare_runs import gaps, run_differences
from jobs.verification.faults import FAULTS as DRILLS
from jobs.verification.supervised_run import (
    SupervisedRun,
    SupervisedRunError,
    ranks_of,
    run_undisturbed,
    supervised,
    wait_until,
)
from tests.helpers.checkpoint_corruption import corruptions
from tests.helpers.checkpoint_faults import full_disks, save_kills
from tests.helpers.processes import REPOSITORY
from tests.helpers.tracked_runs import check_rows, in_wandb, kill_and_resume, read_back, sync
from tests.helpers.wandb_server import WandbServer
from tests.soak.on_slurm import on_slurm
from tests.soak.table import Table

TABLE = Path(__file__).with_name("results.md")
UNTRACKED = ["--tracking.wandb", "disabled"]
# Epochs of 0.3 s with an evaluation after each, a checkpoint every 20 steps: every moment is one that matters.
EDGES = ["--data.global-batch-size", "1000", "--checkpoint.every-steps", "20", "--run.epochs", "1000"]
JOB = ["jobs/quickstart.toml", "--nproc-per-node", "2", "--parallel.timeout-s", "60", *EDGES, *UNTRACKED]
LONG_STEPS = ["jobs/lbfgs.toml", "--nproc-per-node", "2", "--data.global-batch-size", "2000", "--run.epochs", "20"]
LONG_STEPS += UNTRACKED
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
NAMES = {signal.SIGTERM: "signal_term", signal.SIGINT: "signal_int"} | {
    signal.SIGUSR1: "signal_usr1", signal.SIGUSR2: "signal_usr2",
}  # fmt: skip
RUN_STEPS, FAULTS_A_RUN = 1200, 10
LOWEST = {
    "the quick tests": ["-m", "not processes and not soak"],
    "training, resume, W&B, submission": [
        *("-m", "processes and not soak", "tests/fnet_dist/test_train.py", "tests/fnet_dist/tracking/test_worker.py"),
        *("tests/promises/test_stopping_costs_nothing.py", "tests/jobs/commands/test_sync.py"),
        "tests/jobs/commands/test_rehearse.py",
    ],
}
KILLS, FAULTS, SHORT_STOPS, EARLY_STOPS, LONG_STOPS, OWNERS, TRACKED = 50, 160, 20, 10, 5, 3, 4


def main(seed: int) -> int:
    """Run all parts, write the table; 0 if everything held."""
    print(f"seed {seed}; to repeat: python -m tests.soak {seed}", flush=True)
    began, table = time.monotonic(), Table()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        parts = (
            *(save_protocol, kills_of_a_rank, random_faults, stops, owners, tracking, drills),
            *(long_tests, on_slurm, lowest_versions),
        )
        for number, part in enumerate(parts):
            part(random.Random(f"{seed}/{number}"), folder, table)
    TABLE.write_text(table.markdown("make soak", seed, (time.monotonic() - began) / 60), encoding="utf-8")
    return 0 if table.all_held else 1


def save_protocol(rng: random.Random, folder: Path, table: Table) -> None:
    """The save protocol killed at every call, on full disks, and its files corrupted."""
    for promise, fault, count in (
        ("killed at each call of the save protocol, a good checkpoint is left", save_kills, 200),
        ("disk full at an offset, the last checkpoint stands and no temporary file is left", full_disks, 200),
        ("corrupted, a checkpoint is never loaded silently", corruptions, 10_000),
    ):
        place = folder / fault.__name__
        place.mkdir()
        seed, started = rng.randrange(2**32), time.monotonic()
        held, of = fault(place, seed, count)
        table.add(promise, held, of, f"seed {seed}, {time.monotonic() - started:.0f} s")


def kills_of_a_rank(rng: random.Random, folder: Path, table: Table) -> None:
    """One run, 50 kill -9 of a random rank: each is restarted, and soon."""
    kills, steps = KILLS, 120 * KILLS
    undisturbed = run_undisturbed(folder / "kills", [*JOB, "--run.max-steps", str(steps)])
    took, start_s, in_time = list[float](), list[float](), 0
    with supervised(
        SupervisedRun(RunDir(folder / "kills" / "killed"), [*JOB, "--run.max-steps", str(steps)])
    ) as supervised_run:
        began = time.monotonic()
        launcher = supervised_run.start()
        wait_until(lambda: supervised_run.step() > 0, "the first step", launcher)
        start_s.append(time.monotonic() - began)
        for kill in range(kills):
            supervised_run.wait_for_step(supervised_run.step() + rng.randrange(1, 80))
            ranks = ranks_of(launcher.pid)
            killed, before = time.monotonic(), supervised_run.attempt().number
            os.kill(ranks[rng.randrange(2)], signal.SIGKILL)
            wait_until(lambda before=before: supervised_run.attempt().number > before, f"restart {kill + 1}", launcher)
            step = supervised_run.step()
            wait_until(lambda step=step: supervised_run.step() > step, f"a step after restart {kill + 1}", launcher)
            took.append(time.monotonic() - killed)
            in_time += took[-1] <= 1.5 * start_s[0] + 3
        supervised_run.end(launcher, 0)
    same = not run_differences(undisturbed, supervised_run.run) and not gaps(supervised_run.run)
    seen = (
        f"kill to first new step: median {statistics.median(took):.1f} s, most {max(took):.1f} s; start-up "
        f"{start_s[0]:.1f} s; allowed {1.5 * start_s[0] + 3:.1f} s"
    )
    table.add("kill -9 of a rank, restarted", len(took), kills, seen)
    table.add("... within 1.5 x start-up + 3 s", in_time, kills, "")
    table.add(f"... the run that was killed {KILLS} times is bit-identical", int(same), 1, f"{steps:,} steps")


def random_faults(rng: random.Random, folder: Path, table: Table) -> None:
    """Faults at random moments, start-up and end included, until there were FAULTS; every run ends bit-identical."""
    job = [*JOB, "--run.max-steps", str(RUN_STEPS)]
    undisturbed = run_undisturbed(folder / "random", job)
    done, same, runs = Counter[str](), 0, 0
    while done.total() < FAULTS:
        runs += 1
        with supervised(SupervisedRun(RunDir(folder / "random" / f"run{runs}"), job)) as supervised_run:
            faults = 0
            while True:
                launcher = supervised_run.start()
                while faults < FAULTS_A_RUN and _ran_for(launcher, rng.uniform(0, 6)):
                    kind = _inject_fault(rng, supervised_run, launcher)
                    faults += 1
                    done[kind] += 1
                    if kind != "kill -9 of a rank":
                        break
                if launcher.wait(180) == 0:
                    break
            same += not run_differences(undisturbed, supervised_run.run) and not gaps(supervised_run.run)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    table.add(f"{done.total()} faults at random moments in {runs} runs, each bit-identical", same, runs, kinds)


def _ran_for(launcher: subprocess.Popen[bytes], seconds: float) -> bool:
    """Let the run go on for `seconds`; whether it still runs."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and launcher.poll() is None:
        time.sleep(0.01)
    return launcher.poll() is None


def _inject_fault(rng: random.Random, supervised_run: SupervisedRun, launcher: subprocess.Popen[bytes]) -> str:
    """One fault, whatever the run is doing just now."""
    pid = launcher.pid
    kind = rng.choice(["rank", "rank", "launcher", "signal", "file"])
    ranks = [*ranks_of(pid).values()]
    if kind == "rank" and ranks:
        os.kill(rng.choice(ranks), signal.SIGKILL)
        return "kill -9 of a rank"
    if kind == "file" and supervised_run.run.path.is_dir():
        supervised_run.run.stop.touch()
        return "STOP file"
    number = signal.SIGKILL if kind == "launcher" else rng.choice(STOPS)
    os.kill(pid, number)
    return "kill -9 of the launcher" if number == signal.SIGKILL else number.name


def stops(rng: random.Random, folder: Path, table: Table) -> None:
    """Signals at random moments, one after the other in one run; how long until the checkpoint is committed."""
    took, held = list[float](), 0
    with supervised(
        SupervisedRun(RunDir(folder / "stops" / "short"), [*JOB, "--run.max-steps", "100000"])
    ) as supervised_run:
        supervised_run.run.path.parent.mkdir()
        for _ in range(SHORT_STOPS):
            launcher = supervised_run.start()
            before = supervised_run.step()
            wait_until(lambda before=before: supervised_run.step() > before, "the first step", launcher)
            _ran_for(launcher, rng.uniform(0, 1.5))
            took.append(_stop(rng.choice(STOPS), supervised_run, launcher))
            held += took[-1] <= 2
    table.add(
        "signal to committed checkpoint within 2 s, steps of 10 ms, in training, saves, evaluations and epoch edges",
        held, SHORT_STOPS, f"median {statistics.median(took):.2f} s, most {max(took):.2f} s",
    )  # fmt: skip
    early, took = 0, []
    with supervised(
        SupervisedRun(RunDir(folder / "stops" / "early"), [*JOB, "--run.max-steps", "100000"])
    ) as supervised_run:
        for _ in range(EARLY_STOPS):
            launcher = supervised_run.start()
            wait_until(lambda launcher=launcher: len(ranks_of(launcher.pid)) == 2, "the ranks", launcher)
            _ran_for(launcher, rng.uniform(0, 2))
            began, number = time.monotonic(), rng.choice(STOPS)
            os.kill(launcher.pid, number)
            supervised_run.end(launcher, 75, 130)
            took.append(time.monotonic() - began)
            outcome = read_outcome(supervised_run.run)
            early += outcome is not None and outcome["reason"] == NAMES[number]
    table.add(
        "signal during start-up: agreed before or soon after the first step",
        early,
        EARLY_STOPS,
        f"most {max(took):.1f} s",
    )
    steps, held = list[int](), 0
    with supervised(SupervisedRun(RunDir(folder / "stops" / "long"), LONG_STEPS)) as supervised_run:
        for _ in range(LONG_STOPS):
            launcher = supervised_run.start()
            before = supervised_run.step()
            wait_until(lambda before=before: supervised_run.step() > before + 1, "two steps", launcher)
            _ran_for(launcher, rng.uniform(0, 1.5))
            at = supervised_run.step()
            _stop(signal.SIGTERM, supervised_run, launcher)
            steps.append(supervised_run.step() - at)
            held += steps[-1] <= 2
    table.add(
        "steps of about 1 s: stopped within two steps of the signal", held, LONG_STOPS, f"steps after it: {steps}"
    )


def _stop(number: signal.Signals, supervised_run: SupervisedRun, launcher: subprocess.Popen[bytes]) -> float:
    """Stop; return the seconds until a valid checkpoint of its step exists. Raise SupervisedRunError if none."""
    newest, began = supervised_run.committed_step(), time.time()
    os.kill(launcher.pid, number)
    supervised_run.end(launcher, 75, 130)
    outcome = read_outcome(supervised_run.run)
    if outcome is None or outcome["reason"] != NAMES[number] or supervised_run.committed_step() != outcome["step"]:
        raise SupervisedRunError(
            f"{number.name}: outcome {outcome}, newest checkpoint {supervised_run.committed_step()}"
        )
    path = supervised_run.run.checkpoint(outcome["step"])
    if wrong := find_corruption(path):
        raise SupervisedRunError(wrong)
    return 0.0 if outcome["step"] == newest else max(0.0, path.stat().st_ctime - began)


def owners(rng: random.Random, folder: Path, table: Table) -> None:
    """All of a run stopped at a random step, taken over, woken up."""
    job = [*JOB, "--run.max-steps", "600"]
    undisturbed = run_undisturbed(folder / "owners", job)
    held, seen, count = 0, "", OWNERS
    for number in range(count):
        try:
            drill("two-owners", folder / "owners" / str(number), job, undisturbed, rng.randrange(20, 400))
            held += 1
        except SupervisedRunError as error:
            seen = str(error)
    table.add(
        "a stopped owner wakes up after a takeover: it writes nothing, the run is bit-identical", held, count, seen
    )


def tracking(rng: random.Random, folder: Path, table: Table) -> None:
    """Everything of a tracked run killed at five random steps: W&B has each row of the metrics log once."""
    for mode in ("online", "offline"):
        held, rows, seeds = 0, 0, [rng.randrange(2**32) for _ in range(TRACKED)]
        for seed in seeds:
            run = RunDir(folder / "tracking" / f"{mode}-{seed}")
            with WandbServer() as server:
                kill_and_resume(run, mode, seed, server, synced=mode == "offline")
                sync(run, server)
                for given in [read_back(run)] * (mode == "offline") + [in_wandb(run, server).history]:
                    check_rows(given, run)
                    rows += len(given)
            held += 1
        where = "" if mode == "online" else ", in its files, and on the server where `jobs sync` sent them"
        promise = f"{mode}, killed at five random steps, W&B has each row once{where}"
        table.add(promise, held, TRACKED, f"{rows:,} rows; seeds {seeds}")


def drills(rng: random.Random, folder: Path, table: Table) -> None:
    """Each fault of `jobs drill all` once, at a random step."""
    job = [*JOB, "--run.max-steps", "600"]
    undisturbed = run_undisturbed(folder / "drills", job)
    failed = list[str]()
    for fault in DRILLS:
        try:
            drill(fault, folder / "drills", job, undisturbed, rng.randrange(60, 300))
        except SupervisedRunError as error:
            failed.append(f"{fault}: {error}")
    held, seen = len(DRILLS) - len(failed), "; ".join(failed) or ", ".join(DRILLS)
    table.add("a fault of `jobs drill all`, the run ends bit-identical", held, len(DRILLS), seen)


def long_tests(rng: random.Random, folder: Path, table: Table) -> None:
    """The tests that `make test` leaves to this."""
    held, of, seen = _run_tests(sys.executable, folder / "long_tests.xml", ["-m", "soak"])
    table.add("tests marked soak (python -m pytest -m soak)", held, of, seen)


def lowest_versions(rng: random.Random, folder: Path, table: Table) -> None:
    """All lower bounds of pyproject.toml, installed together in an environment of their own."""
    uv, environment = Path(sys.executable).with_name("uv"), REPOSITORY / ".venv" / "lowest"
    python = environment / "bin" / "python"
    install = ["--resolution", "lowest-direct", "--compile-bytecode", "--editable", f"{REPOSITORY}[dev]"]
    subprocess.run([uv, "venv", "--clear", "--python", sys.executable, environment], check=True, timeout=60)
    subprocess.run([uv, "pip", "install", "--python", python, *install], check=True, timeout=1800)
    for what, words in LOWEST.items():
        # An old matplotlib calls what a new pyparsing deprecates.
        held, of, seen = _run_tests(python, folder / "lowest.xml", ["-W", "ignore::DeprecationWarning", *words])
        table.add(f"the lower bounds of pyproject.toml, installed together: {what}", held, of, seen)


def _run_tests(python: Path | str, report: Path, words: Sequence[str]) -> tuple[int, int, str]:
    """Run pytest; return how many tests held, of how many, and how many were skipped, in words."""
    command = [python, "-m", "pytest", "-q", "--no-header", "--junitxml", report, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, ended.stdout
    of, failed = int(suite.attrib["tests"]), int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    print(ended.stdout if failed else "", flush=True)
    return of - failed - skipped, of, f"{skipped} skipped" if skipped else ""


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(2**32)))

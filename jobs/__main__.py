"""python -m jobs VERB: finds the verb's module, and imports no package of others before it is known."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  # an older one runs this line, and could not import what follows
    sys.exit(
        "error: Python {}.{}.{} at {}, expected 3.11 or later; python3.11 -m venv .venv, or `make run`".format(
            *sys.version_info[:3], sys.executable
        )
    )

from jobs.errors import print_error, run_command

USAGE = """usage: python -m jobs VERB [JOBFILE | RUN] [options] [--section.key VALUE ...]

JOBFILE is a .toml file. RUN is a run's name, its directory or a Slurm job id; to look, the newest if left out.

start and end
  run JOBFILE        on this machine (or, under srun, this node's part); restarts after crashes
  submit JOBFILE     to Slurm: -N nodes, --gpus-per-node, -t time, -p partition; --dry-run shows the script
  sweep JOBFILE K=V,V ...   one Slurm array, one run for each combination
  stop RUN           checkpoint, then end
  cancel RUN         end its Slurm job now
  data fetch|verify  download or check the data set, on a machine with internet
look
  status [RUN]       state, step, loss, accuracy, speed, job; --watch, --json
  logs [RUN]         -f to follow, --rank 0,3, --node all, --attempt N, --grep TEXT
  report RUN ...     pictures and one HTML page; several runs are compared
  evaluate RUN       accuracy of the run's weights, per class
  sync RUN           W&B from the ledger, safe to repeat; --follow while it trains
trust
  doctor             is this machine (--cluster: are these nodes) ready? OK, WARN or MISS, with the fix
  verify RUN         hashes of every checkpoint
  drill FAULT|all    break a short run on purpose; passes only if the result is identical
  rehearse JOBFILE   the same script on a private Slurm, preempted and timed out; then compared
  cluster up|status|down   a private Slurm on this machine, to try things on

settings             --optim.lr 0.001; `python -m jobs run --help` lists all, with units and defaults
exit codes           0 finished  1 failed  2 usage  65 bad data or checkpoint  74 I/O  75 goes on later  130 Ctrl-C
example              python -m jobs run jobs/quickstart.toml --nproc-per-node 2
"""
VERBS = {
    "run": "jobs.commands.run",
    "submit": "jobs.commands.submit",
    "sweep": "jobs.commands.sweep",
    "stop": "jobs.commands.stop",
    "cancel": "jobs.commands.cancel",
    "data": "jobs.commands.data",
    "status": "jobs.commands.status",
    "logs": "jobs.commands.logs",
    "report": "jobs.commands.report",
    "evaluate": "jobs.commands.evaluate",
    "sync": "jobs.commands.sync",
    "doctor": "jobs.commands.doctor",
    "verify": "jobs.commands.verify",
    "drill": "jobs.commands.drill",
    "rehearse": "jobs.commands.rehearse",
    "cluster": "jobs.commands.cluster",
}


def main(argv: Sequence[str]) -> int:
    """Run the verb in argv[0] with the rest, and return its exit code."""
    root = Path(__file__).parents[1]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if Path.cwd() != root:
        return print_error(f"run this from the repository's root: cd {root}", 2)
    verb, *rest = argv
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0)[0]
        return print_error(f"unknown verb {verb!r}; nearest: {nearest}; all: {', '.join(VERBS)}", 2)
    try:
        return run_command(import_module(VERBS[verb]).main, rest)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

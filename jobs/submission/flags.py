"""The command-line flags of submit, sweep, rehearse and doctor that have the names of sbatch's own."""

import argparse
import re

from fnet_dist.errors import ConfigError
from fnet_dist.run.outcome import read_outcome
from jobs.runs import JOB_ID, find_run_or_job
from jobs.submission.preflight import jobs_that_train
from slurm.sbatch_options import GPU_TYPE, PATTERNS, Options, from_environment, resolve
from slurm.site_config import Site
from slurm.submit_env import variables

SIZES = ("nodes", "gpus_per_node", "nproc_per_node", "time")  # settings of the section resources
SHORT = {"nodes": "-N", "time": "-t", "partition": "-p", "account": "-A", "qos": "-q", "constraint": "-C"}
HELP = {
    "nodes": "nodes, with one task each (resources.nodes)",
    "gpus_per_node": "GPUs on each node, 4 or a100:4 (resources.gpus_per_node)",
    "nproc_per_node": "ranks on each node; left out, one for each GPU, or one (resources.nproc_per_node)",
    "time": "time limit of one allocation: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S (resources.time)",
    "partition": "partition; left out, slurm/site.toml's or the cluster's",
    "account": "account; left out, slurm/site.toml's or the cluster's",
    "qos": "quality of service; left out, slurm/site.toml's or the cluster's",
    "constraint": "features that nodes must have; left out, slurm/site.toml's",
    "wckey": "workload characterisation key, where the site books by it; left out, slurm/site.toml's",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for sizes and options of a job."""
    for name in (*SIZES, *PATTERNS):
        flags = [f"--{name.replace('_', '-')}", *([SHORT[name]] if name in SHORT else [])]
        metavar = name.rpartition("_")[2].upper() if name in PATTERNS else "N"
        parser.add_argument(*flags, metavar=metavar, help=HELP[name])
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; repeatable"
    )


def add_submission_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of a submission."""
    add_flags(parser)
    for name in ("after", "after-any"):
        ends = "finished" if name == "after" else "ended, however"
        text = f"start only once this job, or the newest one of this run, has {ends}; repeatable"
        parser.add_argument(f"--{name}", action="append", default=[], metavar="JOBID|RUN", help=text)
    parser.add_argument("--no-snapshot", action="store_true", help="run the code where it lies, not a copy of it")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and write nothing")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the flags that are settings as --section.key VALUE."""
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if "gpus_per_node" in given:
        given["gpus_per_node"] = given["gpus_per_node"].rpartition(":")[2]
    return [word for name, text in given.items() for word in (f"--resources.{name.replace('_', '-')}", text)]


def options_of(args: argparse.Namespace, site: Site) -> Options:
    """Return sbatch's options: flags over sbatch's variables over the site. Raises OptionError for a malformed one."""
    given = {name: getattr(args, name) for name in PATTERNS}
    given[GPU_TYPE] = (args.gpus_per_node or "").rpartition(":")[0] or None
    words = [*args.sbatch, *([f"dependency={text}"] if (text := _dependency(args)) else [])]
    return resolve(given, words, from_environment(variables()), site.options)


def _dependency(args: argparse.Namespace) -> str:
    """Return sbatch's --dependency of the flags --after and --after-any; "" without them.

    A run's job is COMPLETED only once the run is finished, over all its requeues. Raises ConfigError for a run that no
    job can wait for.
    """
    given = {"afterok": getattr(args, "after", []), "afterany": getattr(args, "after_any", [])}
    if any(given.values()) and any(word.startswith("dependency=") for word in args.sbatch):
        raise ConfigError("--after and --sbatch dependency= are the same option of sbatch; use one of them")
    jobs = {kind: [_awaited_job(text, kind) for text in texts] for kind, texts in given.items()}
    return ",".join(":".join([kind, *ids]) for kind, found in jobs.items() if (ids := [each for each in found if each]))


def _awaited_job(text: str, kind: str) -> str | None:
    """Return the id of the job to wait for; None if it need not wait. Slurm soon forgets a job that has ended."""
    if re.fullmatch(JOB_ID, text):
        return text
    run = find_run_or_job(text)
    outcome = read_outcome(run)
    for job in jobs_that_train(run):
        return job.job_id
    if kind == "afterok" and (outcome is None or outcome["status"] != "finished"):
        raise ConfigError(f"{run.path} is neither finished nor in a Slurm job that is to finish it; submit it first")
    return None

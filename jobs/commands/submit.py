"""fnet submit JOBFILE: send a run to Slurm; -N nodes, --gpus-per-node, -t time, --dry-run (start and end 2)

On a warning before the time limit the run saves, and goes on in another allocation.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import submitit

from fnet_dist.checkpoint.resume import check_run, choose_run, finished_note
from fnet_dist.config.batch_split import check_batch_split
from fnet_dist.distributed.launch_env import LaunchEnv
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute, quoted
from fnet_dist.run.console import final_table, fnet_command, short_path
from fnet_dist.run.outcome import read_outcome
from fnet_dist.run.run_dir import RunDir, mtime, read_json, run_dir_of
from jobs.runs import check_control, command_parser, display_name, load_job
from jobs.submission.flags import add_submission_flags, options_of, overrides_of
from jobs.submission.preflight import check_job, print_expected_start
from jobs.submission.sbatch import build_executor, cost_ceiling, script
from jobs.submission.submit import SentJob, plan_job, submit_runs
from slurm import client
from slurm.errors import NoAnswerError
from slurm.site_config import read_site

LOOK_EVERY_S = 2.0  # slurmctld serves all users


def main(argv: Sequence[str]) -> int:
    """Submit the run and print how to watch it. Raises ConfigError or SlurmError before anything is written."""
    parser = command_parser(__doc__)
    add_submission_flags(parser)
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm", help="local: here, without Slurm")
    parser.add_argument("--wait", action="store_true", help="until the job has ended, with the run's exit code")
    parser.add_argument("--json", action="store_true", help="print the job as JSON")
    args, overrides = parser.parse_known_args(argv)
    on_slurm, site = args.cluster == "slurm", read_site()
    if not on_slurm and (args.after or args.after_any):
        raise ConfigError("--after and --after-any are Slurm's: leave them out, or --cluster local")
    config, options = load_job(args.jobfile, [*overrides, *overrides_of(args)], site), options_of(args, site)
    if check_run(config) is not None:
        print(f"{finished_note(config)}\n{final_table(run_dir_of(config))}")
        return 0
    run = RunDir(absolute(choose_run(config, LaunchEnv()).path))  # the job has another current directory
    check_control(run, site)
    job = plan_job(config, options, site, run, copied=not args.no_snapshot)
    executor = build_executor(job, args.cluster)
    text = script(executor) if on_slurm else ""
    check_batch_split(config, config.resources.nodes * config.resources.ranks_per_node)
    check_job(config, [run], options, site.run_root, text, on_slurm=on_slurm, dry_run=args.dry_run)
    if args.dry_run:
        print(text or "# submitit starts it on this machine, without a script")
        print(f"# on each node: fnet run {quoted(run.config)} --nproc-per-node {config.resources.ranks_per_node}")
        if on_slurm:
            print_expected_start(text, options)
        return 0
    [sent] = submit_runs(executor, job, [config], [run], run)
    at_most = cost_ceiling(config.resources) if on_slurm else "a process on this machine"
    if args.json:
        print(json.dumps({"run": str(run.path), "job_id": sent.job_id, "at_most": at_most}))
    else:
        print(f"submitted: job {sent.job_id} in {short_path(run.path)}, {at_most}")
        if on_slurm and config.resources.note is not None:
            print(config.resources.note)
        print(f"next: {fnet_command()} logs -f {display_name(run)}")
    return _wait(run, sent) if args.wait else 0


def _wait(run: RunDir, sent: SentJob) -> int:
    """Wait until the job has left the queue; return the run's exit code, or 1 if the job ended without one."""
    submitted_at = read_json(run.job)["time"]
    if isinstance(sent, submitit.SlurmJob):
        while True:
            with suppress(NoAnswerError):  # slurmctld is away for a while: it ends no job meanwhile
                if not client.queue([sent.job_id]):
                    break
            time.sleep(LOOK_EVERY_S)
    else:
        sent.wait()
    outcome = read_outcome(run)
    if outcome is None or mtime(run.outcome) < submitted_at:
        print(f"error: job {sent.job_id} ended before the run began; see {run.submitit}", file=sys.stderr)
        return 1
    return outcome["exit_code"]

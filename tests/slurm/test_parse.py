"""Texts that Slurm 22.05.8 printed become typed values."""

import pytest

from slurm.errors import SlurmError
from slurm.parse import parse_history, parse_partitions, parse_queue, parse_shown_job
from slurm.types import Node, Partition, PastJob, QueuedJob
from slurm.values import duration_s

QUEUE = """\
119|119|PENDING|BeginTime|main||1795526427|1795530027|1795531227|0|wrap$
120_1|121|PENDING|JobArrayTaskLimit|main||1795526430|1795526436|NONE|1|wrap$
118|118|RUNNING|None|main|node[0-1]|1795526427|1795526427|1795620027|0|evil
name|of 9!x$
""".replace("|", "\x1f").replace("$", "\x1e")

RUNNING = """\
JobId=116 JobName=low JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901746 Nice=0 Account=root QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:08 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=1795526387 EligibleTime=1795526387
   AccrueTime=1795526387
   StartTime=1795526387 EndTime=1795526409 Deadline=N/A
   PreemptEligibleTime=1795526387 PreemptTime=1795526389
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795526387 Scheduler=Backfill
   Partition=low AllocNode:Sid=localhost:25557
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[0-2]
   BatchHost=node0
   NumNodes=3 NumCPUs=12 NumTasks=3 CPUs/Task=4 ReqB:S:C:T=0:0:*:*
   TRES=cpu=12,node=3,billing=12
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   MinCPUsNode=4 MinMemoryNode=0 MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=(null)
   WorkDir=/home/a b
   Comment=a b Restarts=9 
   StdErr=/home/slurm-116.out
   StdIn=/dev/null
   StdOut=/home/slurm-116.out
   Power=
   

"""  # noqa: W291, W293

TASKS = "\n".join(
    RUNNING.replace("JobId=116 ", f"JobId={raw} ArrayJobId=120 ArrayTaskId={task} ArrayTaskThrottle=1 ")
    for raw, task in ((120, 2), (121, 1))
)

HISTORY = """\
100|100|REQUEUED|1795525929|1795525930|1795525944|node0|None
100|100|CANCELLED by 0|1795525961|1795525967|1795525974|node0|BeginTime
100|100|NODE_FAIL|1795525953|1795525959|1795525961|node0|BeginTime
101|101|PENDING|1795525999|Unknown|Unknown|None assigned|None
""".replace("|", "\x1f")

PARTITIONS = """\
main|main*|up|3|1-infinite|infinite|4|8000|gpu:2
main|main*|up|2|1-infinite|infinite|64|4000|gpu:a100:4(S:0-1),gpu:v100:1,tmp:9
short|short|up|2|1|1-00:30:00|4|8000|(null)
urgent|urgent|down|3|1-2|infinite|4|8000|gpu:2
""".replace("|", "\x1f")


def test_a_waiting_job_has_an_expected_start_and_a_running_one_a_start():
    waiting, task, running = parse_queue(QUEUE)
    assert running == QueuedJob(
        job_id="118",
        raw_job_id="118",
        name="evil\nname\x1fof 9!x",
        state="RUNNING",
        reason=None,
        partition="main",
        node_list="node[0-1]",
        submitted=1795526427,
        started=1795526427,
        expected_start=None,
        ends=1795620027,
        restarts=0,
    )
    assert (waiting.started, waiting.expected_start, waiting.reason) == (None, 1795530027, "BeginTime")
    assert (task.job_id, task.raw_job_id, task.ends, task.restarts) == ("120_1", "121", None, 1)


def test_text_of_the_user_is_not_read_as_a_field():
    job = parse_shown_job(RUNNING, "116")
    assert job is not None
    assert (job.name, job.state, job.restarts) == ("low JobState=FAILED", "RUNNING", 2)
    assert (job.started, job.ends, job.preempted) == (1795526387, 1795526409, 1795526389)
    assert job.node_list == "node[0-2]"


def test_a_job_name_of_several_lines_is_parsed():
    job = parse_shown_job(RUNNING.replace("JobName=low ", "JobName=low\nJobId 5 UserId=a(0)\n "), "116")
    assert job is not None
    assert (job.name, job.state) == ("low\nJobId 5 UserId=a(0)\n JobState=FAILED", "RUNNING")


@pytest.mark.parametrize(
    ("job_id", "expected"), [("120", ("120_2", "120")), ("121", ("120_1", "121")), ("122", None)], ids=str
)
def test_a_number_selects_the_task_with_this_raw_id(job_id, expected):
    job = parse_shown_job(TASKS, job_id)
    assert (job and (job.job_id, job.raw_job_id)) == expected


def test_records_of_a_requeued_job_are_in_the_order_of_its_starts():
    first, second, third, waiting = parse_history(HISTORY)
    assert [first.state, second.state, third.state] == ["REQUEUED", "NODE_FAIL", "CANCELLED"]
    assert third == PastJob("100", "100", "CANCELLED", 1795525961, 1795525967, 1795525974, "node0", "BeginTime")
    assert (waiting.started, waiting.ended, waiting.node_list) == (None, None, "")


def test_a_partition_with_two_kinds_of_nodes_has_the_sizes_of_the_largest():
    main, short, urgent = parse_partitions(PARTITIONS)
    assert main == Partition("main", True, "up", 5, None, None, 64, 8000, 5)
    assert short == Partition("short", False, "up", 2, 1, 88_200, 4, 8000, 0)
    assert (urgent.state, urgent.max_nodes_per_job) == ("down", 2)


def test_a_node_is_usable_if_it_takes_jobs_or_can_be_powered_up():
    states = ("idle", "mixed", "allocated", "completing", "idle~", "mixed-", "idle*", "down", "drained", "draining@")
    assert [Node("n1", state, "", "", 4, 8000).is_usable for state in states] == [True] * 6 + [False] * 4


def test_a_node_replaces_another_if_it_has_all_that_a_job_may_ask_for():
    one = Node("n1", "down", "a100", "gpu:4", 64, 8000)
    others = [("a100", "gpu:4", 64, 8000), ("a100", "gpu:4", 32, 8000), ("a100", "gpu:4", 64, 4000)]
    others += [("h100", "gpu:4", 64, 8000), ("a100", "gpu:8", 64, 8000)]
    assert [Node("n2", "idle", *each).can_replace(one) for each in others] == [True, False, False, False, False]


def test_times_are_seconds():
    texts = ("0:01", "10:00", "1:00:00", "2-03:04:05", "UNLIMITED", "infinite", "n/a", "NOT_SET")
    assert [duration_s(text) for text in texts] == [1, 600, 3600, 183_845, None, None, None, None]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_queue, QUEUE.replace("1795530027", "2026-11-24T13:06:52")),
        (parse_queue, "119\x1fPENDING\x1e\n"),
        (parse_history, "100\x1f100\n"),
        (parse_history, HISTORY.replace("1795525930", "now")),
        (parse_partitions, "main\n"),
        (parse_partitions, PARTITIONS.replace("8000", "8000+")),
        (duration_s, "tomorrow"),
        (duration_s, "1:2:3:4"),
        (lambda text: parse_shown_job(text, "116"), "No jobs in the system\n"),
        (lambda text: parse_shown_job(text, "116"), RUNNING.replace("Restarts", "Starts")),
        (lambda text: parse_shown_job(text, "116"), RUNNING.replace("=1795526389", "=١")),
    ],
)
def test_any_other_text_raises_an_error_of_one_line(parse, text):
    with pytest.raises(SlurmError) as error:
        parse(text)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)

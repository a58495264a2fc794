"""Of several ranks that hang, the one that the others wait for is named."""

import pytest

from fnet_dist.run.failure import RankFailure, cause_of_hang


def hangs(rank, begun=57, where="training, step 57", waits_for=None):
    waits = {"begun": begun, "last": "gloo:all_reduce", "waits_for": waits_for}
    return RankFailure(rank, "hang", 1, f"rank {rank} on node0 made no progress for 5 s: {where}", waits=waits)


LOST = RankFailure(1, "crash", 1, "rank 1 lost the connection to another rank, which ended first", aftermath=True)
BUG = RankFailure(2, "crash", 1, "ValueError: bug")
SILENT = "rank 2 shows no life: suspended, or stuck in a call that locks Python; "
NO_PROGRESS = "made no progress for 5 s: "
CASES = {
    "suspended": ([hangs(1), hangs(0)], 2, f"{SILENT}ranks 0, 1 wait for it (rank 0 on node0 {NO_PROGRESS}"),
    "suspended, one lost it": ([hangs(0), LOST], 2, f"{SILENT}rank 0 waits for it"),
    "in its data": (
        [hangs(0), hangs(1, 56, "reading data for step 57"), hangs(2)],
        1,
        f"rank 1 on node0 {NO_PROGRESS}reading data for step 57; ranks 0, 2 wait for it",
    ),
    "in its step": (
        [hangs(0, 56), hangs(1), hangs(2)],
        0,
        f"rank 0 on node0 {NO_PROGRESS}training, step 57; ranks 1, 2 wait for it",
    ),
    "all of them": (
        [hangs(0), hangs(1), hangs(2)],
        0,
        f"rank 0 on node0 {NO_PROGRESS}training, step 57; all ranks wait in the same exchange (gloo:all_reduce): look",
    ),
    "found by the launcher": ([hangs(0), hangs(1), RankFailure(2, "hang", 1, SILENT)], 2, SILENT),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rank_that_the_others_wait_for_is_named(case):
    failures, rank, message = CASES[case]
    cause = cause_of_hang(failures, 3)
    assert (cause.rank, cause.reason) == (rank, "hang")
    assert cause.message.startswith(message)
    assert "\n" not in cause.message


@pytest.mark.parametrize("failures", [[], [BUG], [hangs(0), LOST, BUG]])
def test_an_error_that_explains_itself_is_no_hang(failures):
    assert cause_of_hang(failures, 3) is None

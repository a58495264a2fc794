"""When windows end."""

from fnet_dist.training.loop import StepSchedule
from fnet_dist.training.window import MAX_WINDOW_STEPS


def test_a_window_ends_where_something_is_due():
    schedule = StepSchedule(save_every_steps=700, hash_every_steps=1000, evaluate_every_steps=300)
    assert [schedule.steps_from(step, 500) for step in (0, 300, 650, 699, 900)] == [300, 300, 50, 1, 100]
    assert StepSchedule().steps_from(7, 500) == MAX_WINDOW_STEPS


def test_hashes_cut_no_window_short_where_thousands_of_steps_take_half_a_second():
    schedule = StepSchedule(hash_every_steps=1000)
    assert (schedule.steps_from(900, MAX_WINDOW_STEPS - 1), schedule.hash_interval(MAX_WINDOW_STEPS - 1)) == (100, 1000)
    assert (schedule.steps_from(900, MAX_WINDOW_STEPS), schedule.hash_interval(MAX_WINDOW_STEPS)) == (15_100, 16_000)
    assert StepSchedule().hash_interval(MAX_WINDOW_STEPS) is None

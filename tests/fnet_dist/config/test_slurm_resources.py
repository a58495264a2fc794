"""The settings on a Slurm job's size and limits."""

import pytest

from fnet_dist.config.slurm_resources import limit_s
from fnet_dist.errors import ConfigError
from tests.helpers.config import FashionConfig
from tests.helpers.job_files import error, load, write


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("30:15", 1815), ("1:00:00", 3600), ("2-3", 183600), ("2-3:4", 183840), ("2-3:4:5", 183845)],
)
def test_a_time_limit_has_the_forms_of_sbatch(text, seconds):
    assert limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "1:2:3:4", "1-", "-1:00", "5 ", "٣", "UNLIMITED", "1e3", "99999999"])
def test_an_invalid_time_limit_is_refused(text):
    with pytest.raises(ValueError, match="expected a time limit"):
        limit_s(text)


def test_a_bare_number_in_a_job_file_is_minutes(tmp_path):
    config = load(write(tmp_path / "j.toml", "[resources]\ntime = 30\n"))
    assert config.resources.time == "30"


def test_ranks_per_node_is_by_default_the_number_of_gpus():
    sizes = [{}, {"gpus_per_node": 8}, {"gpus_per_node": 8, "nproc_per_node": 2}]
    assert [FashionConfig.model_validate({"resources": each}).resources.ranks_per_node for each in sizes] == [1, 8, 2]


def test_a_warning_comes_a_quarter_of_a_short_limit_before_it_and_a_note_says_so():
    for time, warning_s, is_noted in (("60", 120, False), ("8", 120, False), ("5", 75, True), ("0:03", 1, True)):
        resources = FashionConfig.model_validate({"resources": {"time": time}}).resources
        assert (resources.warning_s, resources.note is not None) == (warning_s, is_noted)
    chosen = FashionConfig.model_validate({"resources": {"time": "8", "signal_s": 30}}).resources
    assert (chosen.warning_s, chosen.note) == (30, None)


def test_a_time_limit_must_be_at_least_four_times_a_signal_s_that_was_chosen(tmp_path):
    message = error(write(tmp_path / "j.toml", ""), "--resources.time", "7", "--resources.signal-s", "120")
    assert message == (
        "resources.time (-t) 7 is 420 s, less than 4 x resources.signal_s (120 s); fix: -t 8, or a smaller "
        "--resources.signal-s in which one step and one checkpoint still fit; none takes a quarter of the limit"
    )
    load(write(tmp_path / "j.toml", ""), "--resources.time", "8", "--resources.signal-s", "120")
    with pytest.raises(ConfigError, match="got 'soon', expected a time limit: minutes, M:S"):
        load(write(tmp_path / "j.toml", ""), "--resources.time", "soon")

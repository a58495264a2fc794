"""A user's own settings: DataConfig and ModelConfig replaced by other classes."""

from pydantic import Field

from fnet_dist.config import environment
from fnet_dist.config import help as settings_help
from fnet_dist.config import load as settings
from fnet_dist.config.fields import Section
from fnet_dist.config.schema import Config
from tests.helpers.job_files import error, load, write


class OtherData(Section):
    files: str
    global_batch_size: int = 8
    shuffle: bool = True


class OtherModel(Section):
    channels: tuple[int, ...] = Field(default=(8, 16))
    blocks: int = Field(default=2, ge=1, description="residual blocks")


class OtherConfig(Config):
    data: OtherData
    model: OtherModel


def test_data_and_model_may_have_other_settings(job, monkeypatch):
    monkeypatch.setattr(environment, "DataConfig", OtherData)
    monkeypatch.setattr(settings, "Config", OtherConfig)
    monkeypatch.setattr(settings_help, "Config", OtherConfig)
    write(job, "model.channels = [4, 4]")
    other = load(job, "--data.files", "f", "--data.shuffle", "false", env={"FNET_DATA": "/unused"})
    assert (other.data.files, other.data.shuffle, other.model.channels) == ("f", False, (4, 4))
    assert load(job, "--data.files=f", "--model.channels", "1,2").model.channels == (1, 2)
    assert (
        error(job) == "data.files: not given, and it has no default; fix: --data.files VALUE or a line in the job file"
    )
    assert error(job, "--data.files=f", "--data.shuffle=no") == "data.shuffle: got 'no', expected true or false"
    assert error(job, "--data.files=f", "--model.head=x").startswith("model.head: unknown setting; model has channels,")
    assert "--data.files                 files (text; required)" in settings_help.settings_help()

"""The text that is sent to sbatch: exactly as committed, and never with a command that nobody meant."""

import functools
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from submitit import SlurmExecutor

from fnet_dist.errors import ConfigError
from jobs.launcher.workers import chosen_notify
from jobs.submission.sbatch import START, Job, build_executor, cost_ceiling, script
from slurm.errors import OptionError
from slurm.sbatch_options import Options, resolve
from slurm.site_config import Site, read_site
from tests.helpers.job_files import load, write

GOLDEN = Path(__file__).parents[2] / "golden" / "submit"
SEED = random.SystemRandom().randrange(2**32)
# Texts that a shell, sbatch or submitit could take for syntax, and harmless ones.
PIECES = [
    *"\n\r\0\t ;|&<>(){}[]$`\"'\\#!*?~%=,.:@/+-_^",
    "$(touch x)",
    "`x`",
    "; x #",
    "\nx\n",
    "EOF",
    "#SBATCH --x",
    "é",
]
PIECES += [*"abcXYZ019"] * 3


@pytest.fixture(autouse=True)
def srun(tmp_path, monkeypatch):
    """submitit looks for this program before it writes a text; nothing here calls it."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


NO_SITE = Site()
node_job = functools.cache(lambda *words: load(Path("jobs/node.toml"), *words))


def text_of(
    *words: str,
    site: Site = NO_SITE,
    root: str = "/shared/runs",
    tasks: int = 1,
    parallel: int | None = 4,
    **given: str,
) -> str:
    """The script for the settings `words`, the options `given`, and a site."""
    extra = [value for key, value in given.items() if key == "sbatch"]
    options = resolve({key: value for key, value in given.items() if key != "sbatch"}, extra, site.options)
    config = node_job("--run.root", root, *words)
    run = Path(config.run.root) / config.run.name
    code, folder = run / "code/3fa2", run / "submitit"
    places = (site.interface, code, folder, parallel, site.python, site.container, site.srun_args)
    job = Job(config.run.name, config.resources, options, site.setup, *places, site.notify)
    return script(build_executor(job), tasks)


def test_the_script_is_the_committed_one():
    setup = ("module load cuda/12.8", "ulimit -n 65536")
    site = Site(account="physics", constraint="nvlink", gpu_type="a100", setup=setup, interface="ib0")
    words = ["--resources.nodes", "2", "--resources.gpus-per-node", "4", "--resources.cpus-per-rank", "3"]
    words += ["--resources.mem-gb", "64", "--resources.time", "1-0"]
    texts = {
        "small.sbatch": text_of(),
        "site.sbatch": text_of(*words, site=site, partition="gpu", sbatch="mail-user=me@example.org"),
        "array.sbatch": text_of(tasks=12),
    }
    for name, text in texts.items():
        assert text.replace(shlex.quote(sys.executable), "PYTHON") == (GOLDEN / name).read_text(encoding="utf-8"), name
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("name", ["_make_submission_file_text", "_submitit_command_str"])
def test_a_submitit_that_has_renamed_what_is_private_is_one_line(name, monkeypatch):
    for each in SlurmExecutor.__mro__:
        if name in vars(each):
            monkeypatch.delattr(each, name)
    with pytest.raises(ConfigError, match=r"^submitit [\d.]+ is another .*; expected submitit\S+: pip install '\S+'$"):
        text_of()


def test_a_key_of_wckeys_is_sent_only_if_one_is_named():
    """submitit's own, "submitit", is refused where keys are enforced."""
    assert "wckey" not in text_of()
    assert "#SBATCH --wckey=physics\n" in text_of(site=Site(wckey="physics"))
    assert "#SBATCH --wckey=mine\n" in text_of(site=Site(wckey="physics"), wckey="mine")


def test_the_sites_python_may_be_a_name_that_a_setup_line_puts_on_the_path():
    text = text_of(site=Site(setup=("module load python",), python="python"))
    assert f"{START} /shared/runs/node/code/3fa2 python -u -m submitit.core._submit" in text
    assert sys.executable not in text


def test_a_python_below_a_tilde_is_refused_as_no_shell_reads_it(tmp_path):
    (tmp_path / "site.toml").write_text('python = "~/env/bin/python"\n')
    with pytest.raises(OptionError, match="python"):
        read_site(tmp_path / "site.toml")


def test_the_sites_container_is_put_before_python_and_its_arguments_to_srun():
    site = Site(
        container=("apptainer", "exec", "--nv", "/my images/torch.sif"), srun_args=("--mpi=none", "--comment=a b")
    )
    text = text_of(site=site)
    prefix = "/shared/runs/node/code/3fa2 apptainer exec --nv '/my images/torch.sif'"
    assert f"{START} {prefix} {shlex.quote(sys.executable)} -u" in text
    assert re.search(r"^srun .* --mpi=none '--comment=a b' ", text, re.M)


def test_a_link_to_the_home_on_this_machine_alone_is_named_as_the_shell_names_it(tmp_path, monkeypatch):
    """bcbio-nextgen issue 278: nodes have /home/me, and not what it is a link to here."""
    (tmp_path / "export/me/runs").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "export")
    root = str(tmp_path / "export/me/runs")
    node_job("--run.root", root)  # read in the checkout, and kept
    monkeypatch.chdir(tmp_path / "export/me")
    monkeypatch.setenv("PWD", str(tmp_path / "home/me"))
    python = tmp_path / "export/me/python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    text = text_of(root=root)
    assert f"#SBATCH --chdir={tmp_path}/home/me/runs/" in text
    assert re.search(rf"{re.escape(START)} {tmp_path}/home/me/runs/\S+ {tmp_path}/home/me/python -u", text)


def test_all_runs_of_a_sweep_are_at_once_unless_a_number_is_given():
    assert "#SBATCH --array=0-299%4\n" in text_of(tasks=300)
    assert "#SBATCH --array=0-299%300\n" in text_of(tasks=300, parallel=None)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_signal_that_comes_while_python_starts_does_not_kill_it(tmp_path, is_old):
    """It waits for the handlers; where env(1) is older than coreutils 8.31, or another one, it is lost."""
    old = tmp_path / "env"
    old.write_text('#!/bin/sh\ncase "$1" in --block*) exit 125 ;; esac\nexec /usr/bin/env "$@"\n')
    old.chmod(0o755)
    told = "import signal as s; print(s.getsignal(s.SIGUSR2) == s.SIG_IGN, s.SIGUSR2 in s.pthread_sigmask(0, []))"
    path = f"{tmp_path}:/usr/bin:/bin" if is_old else "/usr/bin:/bin"
    words = [*shlex.split(START), "/", sys.executable, "-c", told]
    ended = subprocess.run(words, env={"PATH": path}, capture_output=True, text=True, check=True)
    assert ended.stdout == ("True False\n" if is_old else "False True\n")


def test_train_sbatch_starts_python_in_the_same_way(repository):
    assert START in (repository / "slurm/train.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        'srun_args = ["--a=b c", "--d" , "--e=]x",]  # not "this"',
        "srun_args = []",
        'container = "apptainer exec --nv /x.sif" # not "this"',
        '# container = "x"',
        "srun_args = ['--a']",
        'srun_args = [\n"--a"]',
        "container = \"a --bind '/b c' d\"",
        'container = "a \\"b c\\" d"',
        "container = 'a'",
        "  container = 'a'",
        "\"container\"\t= 'a'",
    ],
)
def test_train_sbatch_reads_a_site_file_as_submit_does_or_refuses_it(repository, tmp_path, line):
    """It has no Python to read it with."""
    site, text = tmp_path / "site.toml", (repository / "slurm/train.sbatch").read_text(encoding="utf-8")
    site.write_text(line)
    reads = text[text.index("site=") : text.index("ranks=")]
    words = ["bash", "-euc", f'{reads}printf "%s\\0" "${{container[@]}}" : "${{srun_args[@]}}"']
    ended = subprocess.run(words, env={"FNET_SITE": str(site), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    found = read_site(site)
    if "'" in line or "\\" in line or "\n" in line:
        assert (ended.returncode, ended.stdout) == (2, "")
        assert re.match(rf"{site}: train\.sbatch expects (container|srun_args) on one line", ended.stderr)
    else:
        assert ended.stdout.split("\0")[:-1] == [*found.container, ":", *found.srun_args]
    site.unlink()
    assert subprocess.run(words, env={"FNET_SITE": str(site)}, capture_output=True).returncode == 2


def commands(text: str) -> list[list[str]]:
    """The words of every command in a script; comments are none."""
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


GPUS = ("--resources.gpus-per-node", "2", "--resources.nproc-per-node", "1")


def test_no_string_in_any_field_becomes_a_command(tmp_path):
    """10,000 random strings: each is refused before a script is made, or stands where it was meant to."""
    rng = random.Random(SEED)
    plain = commands(text_of(site=Site(interface="ib0")))
    fields = ["partition", "account", "qos", "constraint", "gpu_type", "sbatch", "interface", "root", "--run.name"]
    fields += ["--resources.nodes", "--resources.gpus-per-node", "--resources.mem-gb", "--resources.time"]
    accepted = 0
    for _ in range(10_000):
        field, string = rng.choice(fields), "".join(rng.choices(PIECES, k=rng.randrange(1, 12)))
        if field == "sbatch" and rng.random() < 0.5:
            string = f"comment={string}"
        try:
            if field.startswith("--"):
                text = text_of(f"{field}={string}", site=Site(interface="ib0"))
            elif field == "root":
                text = text_of(root=f"/{string}", site=Site(interface="ib0"))
            elif field == "interface":
                text = text_of(site=read_site(write(tmp_path / "site.toml", f"interface = {json.dumps(string)}")))
            else:
                text = text_of(*(GPUS if field == "gpu_type" else ()), site=Site(interface="ib0"), **{field: string})
        except (ConfigError, OptionError):
            continue
        accepted += 1
        said = f"seed {SEED}: {field} {string!r}\n{text}"
        found = commands(text)
        assert [line[:1] for line in found] == [line[:1] for line in plain], said
        assert [len(line) for line in found] == [len(line) for line in plain], said
        if not field.startswith("--resources") and field not in ("root", "--run.name", "interface"):
            assert found == plain, said
    assert accepted > 500, f"seed {SEED}"


def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path):
    text = text_of(site=Site(setup=("cd /  # a comment", "test -d /nowhere/at/all")))
    script = re.sub(r"^srun .*$", "echo the job runs", text, flags=re.MULTILINE)
    ended = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: entry 2 of `setup` in site.toml failed\n"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("time=3", "--sbatch 'time=3': cannot be set this way; use -t"),
        (
            "clusters=other",
            "--sbatch 'clusters=other': cannot be set this way; fnet's job script does not work with it",
        ),
        ("quiet", "--sbatch 'quiet': cannot be set this way; use --json"),
        ("partition=x", "--sbatch 'partition=x': has a flag of its own; use --partition 'x'"),
        ("N=3", "--sbatch 'N=3': expected KEY=VALUE with the long name of an option of sbatch"),
        (
            "comment=a\nb",
            "--sbatch 'comment=a\\nb': expected letters, digits and _ . , @ + = : * & | ! ( ) [ ] { } / # ~",
        ),
    ],
)
def test_an_option_that_the_script_cannot_have_is_refused_with_what_to_use(extra, said):
    with pytest.raises(OptionError) as caught:
        resolve({}, [extra])
    assert str(caught.value).startswith(said)


def test_flags_override_the_environment_and_that_overrides_site_toml():
    layers = (
        {"partition": "flag"},
        {"partition": "env", "qos": "env"},
        {"partition": "site", "qos": "site", "account": "a"},
    )
    assert resolve(layers[0], ["exclusive"], *layers[1:]) == Options("flag", "a", "env", extra={"exclusive": True})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitions = 'x'", "unknown key 'partitions'; nearest: partition; all: partition, account"),
        ("partition = 3", "partition is 3, expected one line of text"),
        ("setup = 'module load x'", "setup is 'module load x', expected a list of shell lines"),
        ('container = "apptainer exec \'"', 'container is "apptainer exec \'": No closing quotation'),
        ('container = "apptainer exec \'a"', 'container is "apptainer exec \'a": No closing quotation'),
        ('setup = ["a\\nb"]', "setup is ['a\\nb'], expected a list of shell lines"),
        ("account = 'a b'", "account 'a b': expected letters"),
        ("partition", "Expected '=' after a key"),
        ("run_root = '$NO_SUCH/runs'", "run_root: the variable NO_SUCH is not set"),
        ("notify = 'tell $NO_SUCH'", "notify: the variable NO_SUCH is not set"),
        ('notify = "tell \'me"', 'notify is "tell \'me": No closing quotation'),
        ("notify = '~nobody-here/tell'", "notify is '~nobody-here/tell': "),
        ("notify = ['tell']", "notify is ['tell'], expected one line of text"),
        ("data_root = 'a/$ b'", "data_root: a $ begins no variable's name; write it as $$"),
    ],
)
def test_an_error_in_site_toml_is_one_line(tmp_path, text, said):
    with pytest.raises(OptionError) as caught:
        read_site(write(tmp_path / "site.toml", text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_of_site_toml_is_valid_without_its_comment_marks(repository, tmp_path):
    example = (repository / "slurm" / "site.example.toml").read_text(encoding="utf-8")
    lines = re.findall(r"^# (\w+ = .*)$", example, flags=re.MULTILINE)
    site = read_site(write(tmp_path / "site.toml", "\n".join(lines)))
    assert [name for name, value in vars(site).items() if not value] == []
    assert read_site(tmp_path / "none.toml") == Site()


def test_fnet_site_names_the_sites_file_and_a_missing_one_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "site.toml", "account = 'physics'\nrun_root = '${SCRATCH}/$$runs'")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "site.toml"))
    monkeypatch.chdir(tmp_path)
    assert read_site() == Site(account="physics", run_root="/scratch/me/$runs")
    monkeypatch.setenv("FNET_SITE", str(tmp_path / "none.toml"))
    with pytest.raises(OptionError, match=r"FNET_SITE: no file .*none\.toml; create it, or unset the variable"):
        read_site()


def test_notify_is_words_of_which_each_variable_is_a_part(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLS", "/opt/a b; touch x")
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path / "site.toml", """notify = "$TOOLS/tell --to 'all of us' ~/list $$5 a~b" """)
    words = ("/opt/a b; touch x/tell", "--to", "all of us", "/home/me/list", "$5", "a~b")
    assert read_site(path).notify == words
    [line] = [line for line in text_of(site=read_site(path)).splitlines() if line.startswith("export FNET_NOTIFY=")]
    shown = subprocess.run(["bash", "-c", f"{line}; printenv FNET_NOTIFY"], capture_output=True, text=True, check=True)
    monkeypatch.setenv("FNET_NOTIFY", shown.stdout.rstrip("\n"))
    assert chosen_notify() == words
    monkeypatch.setenv("FNET_NOTIFY", "")
    assert chosen_notify() == ()
    monkeypatch.setenv("FNET_NOTIFY", "'x")
    with pytest.raises(ConfigError, match=r"FNET_NOTIFY=.*No closing quotation"):
        chosen_notify()


def test_the_cost_ceiling_counts_every_requeue():
    words = ["--resources.nodes", "4", "--resources.gpus-per-node", "8", "--resources.time", "30"]
    often = "if it is requeued that often"
    gpus, cpus = load(Path("jobs/node.toml"), *words).resources, load(Path("jobs/baseline.toml")).resources
    assert cost_ceiling(gpus) == f"up to 176 GPU-hours: 11 allocations of 30 min, {often}"
    assert cost_ceiling(cpus, 4) == f"up to 44 CPU-hours: 44 allocations of 60 min, {often}"

"""Check the sbatch options of a user and of a site, beside the job's sizes, before anything is written.

Values end up in a shell script, where a line break would begin a command. So each option has a pattern of the values
that it may have, and any other value is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slurm.errors import OptionError

# sbatch(1): names and lists of names; for --constraint also "&", "|", counts and brackets.
_NAME = r"[A-Za-z0-9_.@+][A-Za-z0-9_.,@+=:-]{0,255}"
PATTERNS: Mapping[str, str] = {
    "partition": _NAME,
    "account": _NAME,
    "qos": _NAME,
    "constraint": r"[A-Za-z0-9_.\[(][A-Za-z0-9_.,@+=:*&|!()\[\]-]{0,255}",
    "wckey": _NAME,
}
GPU_TYPE = "gpu_type"  # "a100" of "a100:4"
_PYTHON = r"[A-Za-z0-9_./+@-]{1,255}"  # no ~: no shell reads it
_INTERFACE = r"[A-Za-z0-9_.:@-]{1,15}"  # IFNAMSIZ - 1
NAMES = (*PATTERNS, GPU_TYPE)
# sbatch(1), INPUT ENVIRONMENT VARIABLES: they override the script's lines.
VARIABLES: Mapping[str, str] = {name: f"SBATCH_{name.upper()}" for name in PATTERNS}
_TYPE = r"[A-Za-z0-9_.-]{1,64}"
_KEY = r"[a-z][a-z0-9-]{1,63}"
_VALUE = r"[A-Za-z0-9_.,@+=:*&|!()\[\]{}/#~^<>;? -]{1,512}"
# Options that our script sets, and those that would change how sbatch reads or runs it: what to use instead.
_RUN_LOGS = "the logs are in the run's directory, see `fnet logs`"
_NOT_OURS = "fnet's job script does not work with it"
_ONE_TASK = "each node has one task, its ranks are --nproc-per-node"
_INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("error", "open-mode", "output"), _RUN_LOGS),
    **dict.fromkeys(("ntasks", "ntasks-per-node"), _ONE_TASK),
    **dict.fromkeys(("no-requeue", "requeue"), "use --resources.max-requeues, 0 for none"),
    **dict.fromkeys(("parsable", "quiet"), "use --json"),
    **dict.fromkeys(("export", "export-file"), "use `setup` in slurm/site.toml"),
    **dict.fromkeys(("chdir", "clusters", "help", "input", "usage", "version", "wrap"), _NOT_OURS),
    "array": "use `fnet sweep`",
    "cpus-per-task": "use --resources.cpus-per-rank",
    "gpus-per-node": "use --gpus-per-node",
    "job-name": "use --run.name",
    "mem": "use --resources.mem-gb",
    "nodes": "use -N",
    "signal": "use --resources.signal-s",
    "test-only": "use --dry-run",
    "time": "use -t",
    "wait": "use --wait",
}


@dataclass(frozen=True)
class Options:
    """sbatch's options beside the job's sizes. None: the cluster's default. `extra` holds any other option, with True
    for one without a value."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    wckey: str | None = None
    gpu_type: str | None = None
    extra: Mapping[str, str | bool] = field(default_factory=dict)


def checked(name: str, text: str) -> str:
    """Return `text` if it can be the value of `name`, an option, "interface" or "python". Raises OptionError if not."""
    pattern = {**PATTERNS, "interface": _INTERFACE, "python": _PYTHON, GPU_TYPE: _TYPE}[name]
    if not re.fullmatch(pattern, text, re.ASCII):
        raise OptionError(f"{name} {_shown(text)}: expected letters, digits and {_signs(pattern)}")
    return text


def resolve(given: Mapping[str, str | None], extra: Sequence[str], *below: Mapping[str, str | None]) -> Options:
    """Return the options: each from `given`, else from the first of `below` that has it. `extra`: KEY=VALUE or KEY.

    Raises OptionError, one line, for a value that may not be written into a script.
    """
    layers = (given, *below)
    chosen = {name: next((layer[name] for layer in layers if layer.get(name)), None) for name in NAMES}
    return Options(
        **{name: None if text is None else checked(name, text) for name, text in chosen.items()},
        extra=dict(map(_extra, extra)),  # the last of two with one key counts, as in sbatch
    )


def from_environment(env: Mapping[str, str]) -> dict[str, str | None]:
    """Return the options in SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_CONSTRAINT and SBATCH_WCKEY."""
    return {name: env.get(variable) for name, variable in VARIABLES.items()}


def _extra(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.partition("=")
    key = key.removeprefix("--")
    if not re.fullmatch(_KEY, key, re.ASCII):
        raise OptionError(f"--sbatch {_shown(text)}: expected KEY=VALUE with the long name of an option of sbatch")
    if key in PATTERNS:  # checked more strictly there
        raise OptionError(f"--sbatch {_shown(text)}: has a flag of its own; use --{key} {_shown(value)}")
    if key in _INSTEAD:
        raise OptionError(f"--sbatch {_shown(text)}: cannot be set this way; {_INSTEAD[key]}")
    if equals and not re.fullmatch(_VALUE, value, re.ASCII):
        raise OptionError(f"--sbatch {_shown(text)}: expected letters, digits and {_signs(_VALUE)}")
    return key, value if equals else True


def _signs(pattern: str) -> str:
    """Return the characters that a pattern's last class allows beside letters and digits, for messages."""
    inner = pattern.rpartition("[A-Za-z0-9")[2].rpartition("]")[0].replace("\\", "")
    return " ".join(dict.fromkeys(inner.replace(" ", "")))


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."  # errors stay on one line

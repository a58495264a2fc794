"""Load settings from a job file, the environment and the command line; report every mistake in one line.

The command line overrides the environment (environment.py), which overrides the job file, then a site's defaults
(slurm/site.toml), then the defaults in schema.py.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fnet_dist.config import help as texts
from fnet_dist.config.environment import ENVIRONMENT, environment_settings, expand_variables
from fnet_dist.config.fields import IS_PATH, check_path, check_run_name, format_value
from fnet_dist.config.load_recipe import DEFAULT_RECIPE
from fnet_dist.config.schema import Config, config_class, sections
from fnet_dist.errors import ConfigError
from fnet_dist.processes import absolute

LARGEST_FILE = 1_000_000  # bytes; a path to data or a log by mistake is refused before it is read


def load_config(
    argv: Sequence[str], env: Mapping[str, str] | None = None, below: Mapping[str, str] | None = None
) -> Config:
    """Return the settings of `--config JOBFILE [--section.key VALUE ...]`, with defaults filled in.

    `env` is by default os.environ. `below` has values {"section.key": text} that the job file overrides; of both,
    settings that the recipe does not have are left out. Raises ConfigError, one line, for every mistake.
    """
    job, overrides = _read_command_line(argv)
    raw = _where_it_is(job, _read_job_file(job), is_named="run.name" in overrides)
    recipe = overrides.pop("recipe", None)
    kind = _class_for({"recipe": recipe} if recipe is not None else raw)
    if job.suffix == ".toml":  # a run's config.json has paths as they are; on a command line the shell expands them
        raw = _expand_paths(raw, kind)
    known = {*texts.setting_names(kind)}
    given = {name: text for name, text in environment_settings(env).items() if name in known}
    from_file = _merge(raw, given, kind)
    lacking = {name: text for name, text in (below or {}).items() if name in known and _get(from_file, name) is None}
    from_file = _merge(from_file, lacking, kind)
    try:
        merged = _merge(from_file, overrides, kind)
        config = _validate(merged if recipe is None else {**merged, "recipe": recipe})
    except ConfigError as error:
        wrong = str(error).partition(":")[0]
        if wrong in overrides or wrong not in given:
            raise
        variable = next(name for name, setting in ENVIRONMENT.items() if setting == wrong)
        raise ConfigError(f"{error}; fix: the variable {variable}, which sets it") from None
    changed = _changed(from_file, overrides, config)
    run, tracking = config.run, config.tracking
    _check_root(run.root)
    if "name" not in run.model_fields_set:
        run = run.model_copy(update={"name": _name_of(job, changed)})
    if tracking.name is None:
        words = [run.name, *(f"{name}={format_value(value)}" for name, value in changed.items())]
        shown = "".join(char if char.isprintable() else "_" for char in " ".join(words))
        tracking = tracking.model_copy(update={"name": shown[:128]})
    return config.model_copy(update={"run": run, "tracking": tracking})


def read_config(path: Path) -> Config:
    """Return the settings in a run's config.json. Raise ConfigError, one line, if it is missing or damaged."""
    return _validate(_read_json_settings(path), path)


def _read_json_settings(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError, ConfigError) as error:
        raise ConfigError(texts.one_line(f"{texts.path_text(path)} cannot be used: {error}")) from None


def dump_config(config: Config) -> dict[str, Any]:
    """Return {section: {key: value}} of every setting, as JSON types."""
    return config.model_dump(mode="json")


def result_settings(config: Config) -> dict[str, Any]:
    """Return {"section.key": value} of the settings that change the result."""
    dumped = dump_config(config)  # as JSON types: the names and hashes of existing runs are made of them
    return {"recipe": config.recipe} | {
        f"{section}.{key}": value
        for section in sections(type(config))
        for key, value in dumped[section].items()
        if getattr(config, section).changes_result(key, config)
    }


def changed_settings(old: Config | Mapping[str, Any], new: Config) -> list[str]:
    """Return a line such as "optim.lr: 0.003 -> 0.001" for each difference that changes the result.

    A mapping has the form of `dump_config`.
    """
    before = dump_config(old if isinstance(old, Config) else _validate(old))
    if before["recipe"] != new.recipe:
        return [f"recipe: {before['recipe']} -> {new.recipe}"]
    return [
        f"{name}: {format_value(_get(before, name))} -> {format_value(value)}"
        for name, value in result_settings(new).items()
        if _get(before, name) != value
    ]


def settings_class(words: Sequence[str]) -> type[Config]:
    """Return the class of all settings for the recipe of a command line; the default recipe's if it names none."""
    words = [*words]
    flags = [word.partition("=")[2] or following for word, following in zip(words, [*words[1:], ""], strict=True)
             if word == "--recipe" or word.startswith("--recipe=")]  # fmt: skip
    files = [Path(word.removeprefix("--config=")) for word in words if word.endswith((".toml", ".json"))]
    raw = _read_job_file(files[0]) if files else {}
    return _class_for({"recipe": flags[0]} if flags else raw)


def read_section(path: Path, name: str) -> Any:
    """Return one section of a run's config.json, which is not the recipe's, without importing the recipe."""
    settings = _read_json_settings(path)
    section = settings.get(name, {}) if isinstance(settings, dict) else settings
    try:
        return sections(Config)[name].model_validate(section)
    except ValidationError as error:
        raise ConfigError(
            f"{texts.path_text(path)}: section {name} cannot be used: {error.errors()[0]['msg']}"
        ) from None


def _get(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value of "section.key", None if there is none, or the section itself if it is no table."""
    section, _, key = name.partition(".")
    values = settings.get(section, {}) if key else settings.get(section)
    return values.get(key) if isinstance(values, dict) else values


def _read_command_line(argv: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Return the job file and the overrides {"section.key": text}."""
    given: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("--"):
            raise ConfigError(f"{texts.quote(token)}: unexpected; expected --section.key VALUE")
        flag, equals, value = token[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in ("config", "recipe") and not ("." in name and name.isprintable()):
            raise ConfigError(texts.one_line(texts.unknown_setting(name, config_class(DEFAULT_RECIPE))))
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ConfigError(f"{texts.label(name)}: no value given; expected --{texts.label(flag)} VALUE")
        if name in given:
            both = f"{texts.quote(given[name])} and {texts.quote(value)}"
            raise ConfigError(f"{texts.label(name)}: given twice, {both}; keep one")
        given[name] = value
    if not given.get("config"):
        raise ConfigError("--config: not given; expected a job file, like --config jobs/quickstart.toml")
    return Path(given.pop("config")), given


def _read_job_file(path: Path) -> dict[str, Any]:
    """Read a job file, or a run's config.json, which sets everything, the run's name included."""
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        read: dict[str, Any] = parse(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(texts.one_line(f"{texts.path_text(path)}: not valid {kind}: {error}")) from None
    if not isinstance(read, dict):
        raise ConfigError(f"{texts.path_text(path)}: expected sections: {', '.join(sections(Config))}")
    return read


def _where_it_is(path: Path, settings: dict[str, Any], *, is_named: bool) -> dict[str, Any]:
    """Return the settings in a run's config.json with the run's name and root as they are now: it may have been moved.

    Raise ConfigError for a copy, unless the command line names the run: two would send their rows to one W&B run.
    """
    here, run = absolute(path).parent, settings.get("run")
    manifest = here / "manifest.json"
    if path.suffix != ".json" or not isinstance(run, dict) or not manifest.exists():
        return settings
    before = Path(str(run.get("root")), str(run.get("name")))
    if before.exists() and before.samefile(here):
        return settings
    ids = [_run_id(folder / manifest.name) for folder in (before, here)]
    if not is_named and ids[0] is not None and ids[0] == ids[1]:
        raise ConfigError(
            f"{texts.path_text(here)} is a copy of {texts.path_text(before)}; to go on from it as a run of its own, "
            "give --run.name NAME and --checkpoint.resume with one of its checkpoints' directories"
        )
    return {**settings, "run": {**run, "name": here.name, "root": str(here.parent)}}


def _run_id(manifest: Path) -> Any:
    with suppress(OSError, ValueError):
        found = json.loads(manifest.read_text(encoding="utf-8"))
        return found.get("id") if isinstance(found, dict) else None
    return None


def _read_text(path: Path) -> str:
    name = texts.path_text(path)
    try:
        if not path.exists():
            here = "" if path.is_absolute() else f" in {texts.path_text(Path.cwd())}"
            near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
            nearest = f"; nearest: {texts.path_text(path.with_name(near[0]))}" if near else ""
            raise ConfigError(f"{name}: no such file{here}{nearest}")
        if not path.is_file():
            raise ConfigError(f"{name}: expected a file, found a directory or device")
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{name}: has {path.stat().st_size} bytes, expected at most {LARGEST_FILE}")
        return path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a BOM
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text, found byte {error.object[error.start]:#x}") from None
    except OSError as error:
        raise ConfigError(texts.one_line(f"{name}: cannot be read: {error.strerror}")) from None


def _expand_paths(raw: Mapping[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return `raw` with the variables in paths expanded."""
    expanded = dict(raw)
    for section, model in sections(kind).items():
        paths = [name for name, field in model.model_fields.items() if IS_PATH in field.metadata]
        for name in paths:
            if isinstance(value := _get(raw, f"{section}.{name}"), str):
                try:
                    expanded[section] = {**expanded[section], name: expand_variables(value)}
                except ValueError as error:
                    raise ConfigError(f"{section}.{name}: {texts.quote(value)}: {error}") from None
    return expanded


def _check_root(root: str) -> None:
    """Raise ConfigError if the directory of runs, which may be relative to the current one, cannot be in a text."""
    path = absolute(Path(root).expanduser())
    try:
        check_path(str(path))
    except ValueError as error:
        raise ConfigError(f"run.root: {texts.quote(str(path))}: {error}") from None


def _merge(raw: Mapping[str, Any], overrides: Mapping[str, str], kind: type[Config]) -> dict[str, Any]:
    """Return `raw` with `overrides` converted to the types of their settings and put over it."""
    merged = {section: dict(values) if isinstance(values, dict) else values for section, values in raw.items()}
    for name, text in overrides.items():
        section, _, key = name.partition(".")
        values = merged.setdefault(section, {})
        if not isinstance(values, dict):
            continue  # validation reports that it is no section
        # "none" for a setting with a computed default, such as optim.lr, means that default.
        if (
            text == "none"
            and name in texts.setting_names(kind)
            and sections(kind)[section].model_fields[key].default_factory
        ):
            values.pop(key, None)
        else:
            values[key] = _convert(text, texts.schema_of(kind, name))
    return merged


def _convert(text: str, schema: Mapping[str, Any]) -> Any:
    """Return `text` as the schema's type, or unchanged if it has none: validation then reports the expected type."""
    kinds = {kind.get("type"): kind for kind in schema.get("anyOf", [schema])}
    if text == "none" and "null" in kinds:
        return None
    if text in ("true", "false") and "boolean" in kinds:
        return text == "true"
    if "array" in kinds:
        return [_convert(item, kinds["array"].get("items", {})) for item in text.split(",")]
    for kind, convert in (("integer", int), ("number", float)):
        if kind in kinds:
            try:
                return convert(text)
            except ValueError:
                continue
    return text


def _class_for(raw: Mapping[str, Any]) -> type[Config]:
    recipe = raw.get("recipe", DEFAULT_RECIPE)
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe: got {texts.quote(recipe)}, expected the name of a Python module, as text")
    return config_class(recipe)


def _validate(raw: object, path: Path | None = None) -> Config:
    """Return the settings `raw`. Raise ConfigError, with the file `path` in front if one is given."""
    place = "" if path is None else f"{texts.path_text(path)}: "
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{place}got {texts.quote(raw)}, expected sections: {', '.join(sections(Config))}")
    kind = _class_for(raw)
    try:
        # Empty sections for missing ones: then a missing required setting is reported with its section.
        return kind.model_validate({**{section: {} for section in sections(kind)}, **raw})
    except ValidationError as error:
        raise ConfigError(texts.one_line(f"{place}{texts.explain_validation_error(error, kind)}")) from None


def _changed(from_file: Mapping[str, Any], overrides: Mapping[str, str], config: Config) -> dict[str, Any]:
    """Return {"section.key": value} of the settings that the command line changed and that change the result."""
    results = result_settings(config).items()
    try:
        before = dump_config(_validate(from_file))
    except ConfigError:  # the job file is valid only together with the overrides
        return {name: value for name, value in results if name in overrides}
    return {name: value for name, value in results if _get(before, name) != value}


def _name_of(job: Path, changed: Mapping[str, Any]) -> str:
    """Return the job file's stem, plus a hash of the overrides that change the result."""
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{job.stem}-{digest}" if changed else job.stem
    try:
        return check_run_name(name)
    except ValueError as error:
        found = f"the job file's name gives {texts.quote(name)}, {error}"
        raise ConfigError(f"run.name: {found}; fix: --run.name NAME") from None

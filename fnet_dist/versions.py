"""The libraries that are needed: their versions, and names in them that they call private."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from pathlib import Path

from fnet_dist.errors import ConfigError
from fnet_dist.processes import CODE_ROOT


def requirements(project: Path = CODE_ROOT / "pyproject.toml", extra: str = "") -> list[str]:
    """Return what the checkout's pyproject.toml asks for, or else the installed package; [] if neither is there.

    With `extra`, return what that extra adds.
    """
    with suppress(FileNotFoundError):
        table = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if table.get("name") == "fnet-dist":  # else our rooms were copied into another project
            return list(table["optional-dependencies"][extra] if extra else table["dependencies"])
    with suppress(metadata.PackageNotFoundError):
        asked = [text.partition(";") for text in metadata.requires("fnet-dist") or ()]
        return [text.strip() for text, _, marker in asked if marker.strip() == (f"extra == '{extra}'" if extra else "")]
    return []


def library_version(name: str) -> str:
    """Return the version of a library that can be imported; "unknown" if it does not say."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return str(getattr(import_module(name), "__version__", "unknown"))  # vendored, without a dist-info


@contextmanager
def private_names(library: str, extra: str = "") -> Iterator[None]:
    """Use names that `library` calls private; raise ConfigError, one line, if its version has others by now.

    `extra` is that of pyproject.toml which asks for it.
    """
    try:
        yield
    except (ImportError, AttributeError, NotImplementedError, TypeError) as error:
        needed = next((text for text in requirements(extra=extra) if text.startswith(library)), library)
        gone = f"{library} {library_version(library)} is another than this code knows ({type(error).__name__}: {error})"
        raise ConfigError(f"{gone}; expected {needed}: pip install '{needed}'") from error

"""The runs of a new sweep: every combination of the given values, or a number of them drawn from ranges and lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from fnet_dist.config.help import schema_of, setting_names, unknown_setting
from fnet_dist.config.schema import Config
from fnet_dist.errors import ConfigError

DIGITS = 4  # of a number drawn from a range: names and legends stay short, and the run gets exactly this text
DRAWS = 100  # for each run: of few combinations, many are drawn again and again


@dataclass(frozen=True)
class Values:
    """The values that a key is given, KEY=V,V; one of them is drawn."""

    texts: tuple[str, ...]

    def draw(self, random: Random) -> str:
        """Return one of the values."""
        return self.texts[int(random.random() * len(self.texts))]


@dataclass(frozen=True)
class Range:
    """The range of a key, KEY=A:B or KEY=log:A:B; whole numbers where the setting is one, both ends included."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, random: Random) -> str:
        """Return a number of the range, uniform or, with `is_log`, uniform in its logarithm."""
        edge = 0.5 if self.is_whole else 0.0  # so that both ends are drawn as often as the others
        low, high = self.low - edge, self.high + edge
        fraction = random.random()  # the one method whose numbers no version of Python may change
        value = low * math.exp(fraction * math.log(high / low)) if self.is_log else low + fraction * (high - low)
        if self.is_whole:
            return str(min(max(round(value), int(self.low)), int(self.high)))
        text = f"{value:.{DIGITS}g}"
        return text if low <= float(text) <= high else repr(value)  # rounded out of a narrow range


def combinations(words: Sequence[str], kind: type[Config]) -> list[list[str]]:
    """Return every combination of the values in `words`, KEY=V,V, as --section.key VALUE. Raise ConfigError for ranges
    and if there is no key, or one twice; `kind` says which settings are numbers."""
    keys = _read_keys(words, kind)
    for word, (name, values) in zip(words, keys.items(), strict=True):
        if isinstance(values, Range):
            fix = f"give --sample N, how many runs to draw from it, or values, as in {name}=V,V"
            raise ConfigError(f"{word} is a range; {fix}")
    choices = (values.texts for values in keys.values() if isinstance(values, Values))
    return [_options(keys, texts) for texts in product(*choices)]


def sample(words: Sequence[str], kind: type[Config], number: int, seed: int) -> list[list[str]]:
    """Return `number` different combinations drawn from the ranges and values in `words`, as --section.key VALUE.

    They depend on `words` and `seed` alone, and a larger number adds to them. Raise ConfigError if there are too few,
    and as `combinations` does for keys.
    """
    keys, random = _read_keys(words, kind), Random(f"{seed} {' '.join(words)}")
    drawn = dict[tuple[str, ...], None]()
    for _ in range(DRAWS * number):
        drawn[tuple(values.draw(random) for values in keys.values())] = None
        if len(drawn) == number:
            return [_options(keys, texts) for texts in drawn]
    raise ConfigError(f"--sample {number}: only {len(drawn)} different runs are in {' '.join(words)}; draw fewer")


def _options(keys: dict[str, Values | Range], texts: Sequence[str]) -> list[str]:
    return [word for name, text in zip(keys, texts, strict=True) for word in (f"--{name}", text)]


def _read_keys(words: Sequence[str], kind: type[Config]) -> dict[str, Values | Range]:
    if not words:
        raise ConfigError(
            "nothing to sweep over: expected KEY=VALUE,VALUE, like optim.lr=0.001,0.003, or with --sample a range, "
            "like optim.lr=log:1e-4:1e-1"
        )
    pairs = [word.split("=", 1) for word in words]
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        raise ConfigError(f"a key is swept over twice: {', '.join(names)}; give all its values at once")
    for name in names:
        if name.replace("-", "_") not in setting_names(kind):
            raise ConfigError(unknown_setting(name.replace("-", "_"), kind))
    return {name: _read_values(name, text, kind) for name, text in pairs}


def _read_values(name: str, text: str, kind: type[Config]) -> Values | Range:
    schema = schema_of(kind, name.replace("-", "_"))
    types = {each.get("type") for each in schema.get("anyOf", [schema])}
    if ":" not in text or not types & {"integer", "number"}:  # in other settings a colon is part of a value
        return Values(tuple(text.split(",")))
    is_log, is_whole = text.startswith("log:"), "number" not in types
    try:
        low, high = map(float, text.removeprefix("log:").split(":"))
    except ValueError:
        low = high = math.nan
    is_range = low < high and math.isfinite(high - low) and (low > 0 or not is_log)
    if not is_range or (is_whole and not (low.is_integer() and high.is_integer())):
        numbers = "whole numbers" if is_whole else "numbers"
        raise ConfigError(f"{name}={text}: expected {numbers} A:B with A below B, or log:A:B with A above 0")
    return Range(low, high, is_log, is_whole)

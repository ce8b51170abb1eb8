"""The search space of a command line: the words of Hydra's Optuna sweeper as Optuna's distributions, and back.

optimizer.lr=tag(log, interval(1e-5, 1e-2))    a float, uniform in its logarithm
model.dropout=interval(0, 0.3)                 a float
model.n_layer=int(interval(1, 4))              an integer, 4 included
model.n_layer=range(1, 5)                      an integer, 5 excluded, as everywhere in Hydra
data.batch_size=2,4,8 or choice(2,4,8)         one of these, without an order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from llm_lightning.experiments.settings.checks import values_of
from llm_lightning.experiments.settings.compose import ConfigDirs
from llm_lightning.experiments.settings.overrides import key_of, parsed


@dataclass(frozen=True)
class Dimension:
    """A key that is searched."""

    key: str
    distribution: BaseDistribution
    write: Callable[[Any], str]
    """A value of the distribution -> the override of a job."""
    typed: str

    def ends(self) -> list[str]:
        """Overrides with the values between which all others are."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [self.write(choice) for choice in self.distribution.choices]
        assert isinstance(self.distribution, (IntDistribution, FloatDistribution))
        return [self.write(self.distribution.low), self.write(self.distribution.high)]

    def values(self) -> list[Any]:
        """All values, if they are listed.

        Raises:
            ValueError: if it is an interval.
        """
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, (IntDistribution, FloatDistribution))
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        if step is None:
            raise ValueError(f"'{self.typed}' lists no values for hydra.sweeper.sampler=grid: write them out")
        return [low + index * step for index in range(round((high - low) / step) + 1)]


@dataclass(frozen=True)
class Space:
    """What every trial has in common, and what varies."""

    fixed: Sequence[str]
    """Overrides."""
    dimensions: Mapping[str, Dimension]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: one.distribution for key, one in self.dimensions.items()}

    def typed(self) -> list[str]:
        """The words that make up the space."""
        return [*self.fixed, *(one.typed for one in self.dimensions.values())]

    def words(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial with these parameters."""
        return [*self.fixed, *(one.write(params[key]) for key, one in self.dimensions.items())]

    def facts(self) -> dict[str, str]:
        """Key -> its distribution as JSON, to compare spaces."""
        return {key: distribution_to_json(one.distribution) for key, one in self.dimensions.items()}


def space_of(words: Sequence[str], dirs: ConfigDirs) -> Space:
    """The space that overrides describe.

    Raises:
        ValueError: naming the word, if none varies, or one describes no distribution.
    """
    swept = [word for word in words if parsed(word).is_sweep_override()]
    if not swept:
        raise ValueError(
            "nothing to search: give a key several values, as 'optimizer.lr=tag(log, interval(1e-5, 1e-2))'"
        )
    fixed = [word for word in words if word not in swept]
    return Space(fixed, {key_of(word): _dimension(word, dirs) for word in swept})


def _dimension(word: str, dirs: ConfigDirs) -> Dimension:
    override = parsed(word)
    value, key, element = override.value(), override.key_or_group, override.get_key_element()
    is_log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            assert low is not None
            assert high is not None
            if isinstance(low, int) and isinstance(high, int):
                return Dimension(key, IntDistribution(low, high, log=is_log), _written(element, int), word)
            return Dimension(key, FloatDistribution(low, high, log=is_log), _written(element, float), word)
        if is_log:
            raise ValueError("log applies to an interval: tag(log, interval(A, B))")
        if isinstance(value, RangeSweep) and not value.shuffle:
            return _listed(word, element, key, value)
        return _choices(word, key, dirs)
    except ValueError as error:
        raise ValueError(f"'{word}' cannot be searched: {error}") from None


def _listed(word: str, element: str, key: str, value: RangeSweep) -> Dimension:
    """A range; its end is excluded, as in a sweep without a search."""
    numbers = list(value.range())
    if not numbers:
        raise ValueError("the range is empty")
    low, high, step = min(numbers), max(numbers), abs(value.step)
    if all(isinstance(number, int) for number in numbers):
        return Dimension(key, IntDistribution(int(low), int(high), step=int(step)), _written(element, int), word)

    def rounded(number: Any) -> float:  # 0.1 + 2 * 0.1 is not the 0.3 that was meant
        return float(f"{number:.12g}")

    distribution = FloatDistribution(rounded(low), rounded(high), step=step)
    return Dimension(key, distribution, _written(element, rounded), word)


def _written(element: str, kind: Callable[[Any], Any]) -> Callable[[Any], str]:
    return lambda value: f"{element}={kind(value)!r}"


def _choices(word: str, key: str, dirs: ConfigDirs) -> Dimension:
    """One of the listed values; lists and groups of settings are known to Optuna by their text."""
    words = {str(one.input_line): one.value() for one in values_of(parsed(word), dirs)}
    names = [value if isinstance(value, (str, int, float, type(None))) else str(value) for value in words.values()]
    distribution = CategoricalDistribution(names)

    def write(value: Any) -> str:
        return list(words)[int(distribution.to_internal_repr(value))]

    return Dimension(key, distribution, write, word)

"""How adapters are trained and judged: what the configuration says, and what a job changes of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from memcube.config import Config
from memcube.errors import BadRequest
from memcube.parametric.dataset import DataSettings
from memcube.parametric.judgement import Thresholds
from memcube.parametric.recipe import Recipe

T = TypeVar("T", DataSettings, Thresholds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """What is changed of the recipe for so many facts, how much of each sort of example there is, and
    what the gate asks for.

    Raises BadRequest for a name or value that can't be in a recipe.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    limits: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        self.recipe_for(1)

    @classmethod
    def of(cls, config: Config) -> "TrainingSettings":
        """Those of a configuration.

        Raises:
            BadRequest: a name or value that can't be.
        """
        given = config.training
        limits = Thresholds(adapter_bytes=config.adapters.max_mb << 20)
        return cls(
            recipe=given.recipe,
            data=_changed(DataSettings(), given.data, "training.data"),
            limits=_changed(limits, given.gate, "training.gate"),
        )

    def with_recipe(self, changes: Mapping[str, Any]) -> "TrainingSettings":
        """These with more of the recipe changed."""
        return replace(self, recipe={**self.recipe, **changes})

    def recipe_for(self, num_facts: int) -> Recipe:
        """The recipe for so many facts."""
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.recipe.items()
        }
        try:
            return Recipe.for_facts(num_facts, **given)
        except TypeError as wrong:
            raise BadRequest(
                f"{wrong}; there are {', '.join(asdict(Recipe()))}", "recipe"
            ) from None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": dict(self.recipe)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrainingSettings":
        """
        Raises:
            BadRequest: a name or value that can't be, as of another release.
        """
        return cls(
            recipe=data["recipe"],
            data=_changed(DataSettings(), data["data"], "settings.data"),
            limits=_changed(Thresholds(), data["limits"], "settings.limits"),
        )


def _changed(settings: T, changes: Mapping[str, Any], field: str) -> T:
    try:
        return replace(settings, **changes)
    except TypeError as wrong:
        raise BadRequest(f"{wrong}; there are {', '.join(asdict(settings))}", field) from None

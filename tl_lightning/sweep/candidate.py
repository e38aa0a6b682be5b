"""One of the heads that are compared."""

import inspect
from typing import NamedTuple

from tl_lightning.freezing import HEAD, MAP
from tl_lightning.heads import HeadCallable, MapHead
from tl_lightning.makeup import as_factory
from tl_lightning.sweep.training import Rates

Source = tuple[str, str]
"""The stage before which a network ends, ``head`` for its end; and ``head`` for its pooled features, ``map`` for its map."""

WHOLE: Source = (HEAD, HEAD)
"""The pooled features of a whole network."""


class Candidate(NamedTuple):
    """What is tried."""

    head: HeadCallable
    rates: Rates
    before: str = HEAD
    """The stage before which the network ends; ``head`` for all of it."""
    network_size: int = 0
    """Number of the network's parameters up to there."""

    @property
    def takes(self) -> Source:
        """What the head takes."""
        factory = as_factory(self.head)
        on_map = factory is not None and issubclass(factory.func, MapHead)  # type: ignore[arg-type]  # a class
        return self.before, MAP if on_map else HEAD

    @property
    def name(self) -> str:
        """The head's class, and the arguments that are not its defaults."""
        factory = as_factory(self.head)
        if factory is None:
            return getattr(self.head, "__name__", type(self.head).__name__)
        defaults = inspect.signature(factory.func).parameters
        own = [
            f"{key}={value}"
            for key, value in factory.keywords.items()
            if key not in defaults or value != defaults[key].default
        ]
        return f"{factory.func.__name__}({', '.join(own)})"

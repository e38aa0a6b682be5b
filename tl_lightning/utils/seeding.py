"""Where chance comes from: every draw is a pure function of the seed and of what the draw is for.

Lightning restores neither random state nor the place in the data, so nothing may depend on what was drawn before. A
run that is interrupted and resumed then draws what the uninterrupted run would have drawn.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

DEFAULT_SEED = 42


def run_seed() -> int:
    """Return the seed given to Lightning's ``seed_everything``, else 42."""
    return int(os.environ.get("PL_GLOBAL_SEED", DEFAULT_SEED))


def derive_seed(*parts: int | str) -> int:
    """Mix numbers and names into a seed of 63 bits; other parts give an unrelated seed.

    Example:
        >>> derive_seed(42, "order", 0) != derive_seed(42, "order", 1)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_torch(*parts: int | str) -> None:
    """Seed torch's global generators, of every device, from ``parts``."""
    seed = derive_seed(*parts)
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would queue a seed for each device that might come to be, with a stack trace, for ever
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()  # without a GPU, it looks for the driver's library each time, for 40 us


@contextmanager
def from_rng_state(state: torch.Tensor) -> Iterator[None]:
    """Draw by torch on the CPU from a state that its generator once had; leave no trace outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(state)
        yield


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw from ``parts`` alone inside the block, by torch on the CPU, numpy and random; leave no trace outside."""
    seed = derive_seed(*parts)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

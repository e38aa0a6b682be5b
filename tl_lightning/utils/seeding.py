"""Derive every random number from the seed of the run and from its use: no draw depends on earlier draws.

Lightning restores neither RNG states nor the place in the data. By this rule, a resumed run draws the same numbers as
an uninterrupted one.
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
    """Return the seed that Lightning's ``seed_everything`` was given, or 42."""
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
    """Seed torch's global generators, of all devices, from ``parts``."""
    seed = derive_seed(*parts)
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # torch.manual_seed would queue a seed, with a stack trace, for devices that never come: a memory leak
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()  # without a GPU, each call searches for the driver's library, for 40 us


@contextmanager
def use_rng_state(state: torch.Tensor) -> Iterator[None]:
    """Use an RNG state for torch's draws on the CPU inside the block, and restore the state of before at its end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(state)
        yield


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch on the CPU, numpy and random from ``parts`` inside the block, and restore their states at its end."""
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

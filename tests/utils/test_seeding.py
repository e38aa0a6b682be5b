import random

import numpy as np
import pytest
import torch

from tl_lightning.utils.seeding import derive_seed, run_seed, seeded


def test_seed_of_the_run_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_seed() == 42
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert run_seed() == 7


def test_seeds_differ_by_every_part_and_never_change_between_releases() -> None:
    assert len({derive_seed(a, name, b) for a in range(10) for name in ("x", "y") for b in range(10)}) == 200
    assert derive_seed(12, 3) != derive_seed(1, 23)
    assert derive_seed(42, "order", 0) == 993273450358985366


def draw() -> tuple[list[float], list[float], float]:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: S311 - not for secrets


def test_seeded_block_repeats_its_draws_and_leaves_the_rng_states_as_they_were() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with seeded("block"):
        inside = draw()
    assert draw() == expected
    with seeded("block"):
        assert draw() == inside

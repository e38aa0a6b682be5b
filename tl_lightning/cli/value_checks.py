"""Check values of options that Lightning accepts and then fails on, before anything is built."""

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

_HIGHEST_SEED = 2**32 - 1  # of numpy

_LOWEST: dict[str, tuple[int, str]] = {
    "seed_everything": (0, f"an integer from 0 to {_HIGHEST_SEED}"),
    "trainer.max_epochs": (-1, "0 or more, or -1 for no limit"),
    "trainer.max_steps": (-1, "0 or more, or -1 for no limit"),
    "trainer.check_val_every_n_epoch": (1, "1 or more"),
    "trainer.accumulate_grad_batches": (1, "1 or more"),
    "trainer.log_every_n_steps": (0, "1 or more, or 0 to log nothing within an epoch"),
    "trainer.num_sanity_val_steps": (-1, "0 or more, or -1 for all batches"),
    "trainer.gradient_clip_val": (0, "0 or more"),
    "trainer.num_nodes": (1, "1 or more"),
}
"""The lowest value of each option, and the allowed values in words."""

_DEVICES = r"auto|-1|[1-9]\d*|\d+(\s*,\s*\d+)*\s*,?\s*"


def check_values(config: Namespace) -> None:
    """Check that the values of options can work.

    Args:
        config: The configuration of a subcommand.

    Raises:
        ValueError: A value cannot work; the message says which ones can.
    """
    for option, (lowest, allowed) in _LOWEST.items():
        value = config.get(option)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not value >= lowest or (option == "seed_everything" and value > _HIGHEST_SEED):
            raise ValueError(f"--{option} is {value}; it must be {allowed}")
    devices: Any = config.get("trainer.devices")
    if devices is not None and not _can_be_devices(devices):
        raise ValueError(
            f"--trainer.devices is {devices}; it takes auto, a number of 1 or more, -1 for all GPUs, or a list of the "
            "numbers of GPUs, as '[0, 2]'"
        )
    if config.get("trainer.barebones"):
        raise ValueError(
            "--trainer.barebones is true, but such a trainer writes no checkpoint, no metrics and no results; leave it "
            "out, or use --trainer.fast_dev_run to try a configuration"
        )


def check_num_classes(given: int | None, found: int, names: Sequence[str] | None) -> None:
    """Check that a number of classes on the command line is that of the data, which the model has taken.

    Args:
        given: The number on the command line; None if there is none.
        found: The number of classes of the data.
        names: The names of these classes.

    Raises:
        ValueError: The numbers differ.
    """
    if given not in (None, found):
        raise ValueError(
            f"model.num_classes is {given}, but the data have {found} classes ({', '.join(names or ())}); leave it "
            "out, since it comes from the data"
        )


def _can_be_devices(given: int | str | list[int]) -> bool:
    if isinstance(given, list):
        return bool(given) and min(given) >= 0
    single_zero = str(given).strip() == "0"
    return not single_zero and re.fullmatch(_DEVICES, str(given).strip()) is not None

"""Find the configurations that are shipped with the package by their bare names."""

import re
from pathlib import Path

from tl_lightning.utils.messages import unknown

_PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configuration files by their bare names.

    An installed wheel has them inside the package (``force-include`` in pyproject.toml), a checkout beside it.
    """
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve_config(given: str) -> str:
    """Replace the bare name of a shipped configuration by its path.

    A file of that name in the current folder comes first.

    Args:
        given: The value of ``--config``: a path, or a name without folder and ending.

    Raises:
        ValueError: There is neither a file nor a shipped configuration of this name.
    """
    if Path(given).is_file():
        return given
    configs = shipped_configs()
    if re.fullmatch(r"[\w-]+", given) is None:
        name = Path(given).stem
        if name in configs and Path(given).suffix in (".yaml", ".yml"):
            raise ValueError(
                f"the configuration file {given!r} does not exist; tl-lightning ships a configuration of that name: "
                f"--config {name}"
            )
        return given  # the parser reports a file that does not exist
    if given not in configs:
        known = unknown("configuration", given, configs, of="tl-lightning")
        raise ValueError(f"{known}. To use a file of your own, give its path with its ending, as --config my.yaml")
    return str(configs[given])

"""Read configurations in YAML and UTF-8, with bounds on their size and on what their aliases expand to."""

import stat
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import get_loader, set_loader

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 100
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_parse = get_loader("yaml")
_read_text = jsonargparse.Path.read_text  # type: ignore[attr-defined]


def set_up_parser() -> None:
    """Let the parser read all YAML through :func:`load_yaml`, and all files as UTF-8.

    jsonargparse 4.53 reads files in the encoding of the locale
    (https://github.com/omni-us/jsonargparse/blob/main/jsonargparse/_paths.py, ``Path.read_text``). This replacement can
    be deleted when it reads UTF-8.
    """
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    jsonargparse.Path.read_text = _read_utf8  # type: ignore[method-assign, assignment, attr-defined]


def _read_utf8(path: Any) -> str:
    if path.is_url or path.is_fsspec or path.relative == "-":
        return str(_read_text(path))
    return Path(path.absolute).read_text(encoding="utf-8")


def load_yaml(text: str) -> Any:
    """Parse YAML as the command line does, unless it is too large, too deep, or expands without end.

    Raises:
        yaml.YAMLError: The text is no YAML, or exceeds a bound.
    """
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters; a configuration has at most {_MAX_BYTES:,}")
    try:
        nodes = _count_nodes(yaml.compose(text, Loader=_Loader), {}, 0) if "*" in text else 0
        if nodes is not None and nodes <= _MAX_NODES:
            return _parse(text)
    except UnicodeEncodeError:  # a value of the command line that the locale cannot decode
        return text
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    raise yaml.YAMLError(f"its aliases (*) expand to over {_MAX_NODES:,} values, or to more than {_MAX_DEPTH} levels")


def _count_nodes(node: yaml.Node | None, counted: dict[int, int | None], depth: int) -> int | None:
    """Count the values that a document expands to, without expanding it.

    Args:
        node: A node of the graph of the document, in which an alias is an edge to a node that exists.
        counted: Counts of the nodes visited so far; None for one that is being visited.
        depth: Number of nodes above this one.

    Returns:
        The number of values; None if the document is too deep, or contains itself.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in counted:
        return counted[id(node)]
    if depth > _MAX_DEPTH:
        return None
    counted[id(node)] = None
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1
    for child in children:
        count = _count_nodes(child, counted, depth + 1)
        if count is None:
            return None
        total += count
    counted[id(node)] = total
    return total


def read_config(file: Path, groups: tuple[str, ...]) -> dict[str, Any]:
    """Read the top level of a configuration file; of a file that the parser refuses with a reason, nothing.

    Args:
        file: The file.
        groups: Options that contain options.

    Raises:
        ValueError: The file is no regular file, is too large, is not UTF-8, expands without end, or sets a group to a
            single value.
    """
    about = f"the configuration file {str(file)!r}"
    try:
        status = file.stat()
    except OSError:
        return {}
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{about} is no regular file: save the configuration in one")
    if status.st_size > _MAX_BYTES:
        raise ValueError(f"{about} has {status.st_size:,} bytes; a configuration has at most {_MAX_BYTES:,}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{about} is not text in UTF-8 ({error}): save it in that encoding") from error
    except OSError:
        return {}
    try:
        config = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{about} cannot be read: {' '.join(str(error).split())}") from error
    if config is None:  # the file is empty
        return {}
    if not isinstance(config, dict):
        kind = "a list" if isinstance(config, list) else "a single value"
        raise ValueError(  # noqa: TRY004 - the user's file is wrong, not a type
            f"{about} holds {kind}; it takes options, as trainer: {{max_epochs: 10}}"
        )
    for group in groups:
        if group in config and not isinstance(config[group], (dict, str)) and config[group] is not None:
            raise ValueError(
                f"{group} is {config[group]} in {str(file)!r}; it takes options, as {group}: {{NAME: VALUE}}"
            )
    return config

"""Wording that error messages share."""

import difflib
import dis
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_LISTED = 40
_NAMED = 10


def unknown(kind: str, given: object, allowed: Iterable[object], *, of: str = "") -> str:
    """Say that a name is unknown, suggest similar names, and list the known ones.

    Args:
        kind: The kind of thing that the name stands for, as ``"stage"``.
        given: The unknown name.
        allowed: The known names.
        of: The thing that has the known names, as ``"resnet18"``.

    Example:
        >>> unknown("stage", "layer5", ["stem", "layer1"], of="resnet18")
        "unknown stage 'layer5'; did you mean 'layer1'? resnet18 has stem, layer1"
    """
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    return f"unknown {kind} {given!r}; {hint}{of + ' has' if of else 'there are'} {listed(names, _LISTED)}"


def listed(names: Sequence[str], limit: int = _NAMED) -> str:
    """List the first names, and count the others.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes; jsonargparse wraps the exceptions of the classes that it builds."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def is_raised_in(error: BaseException, folder: Path) -> bool:
    """Return whether a ``raise`` statement in a folder raised an exception, and no operation or failed assertion."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, AssertionError):
        return False
    code = trace.tb_frame.f_code
    is_statement = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return is_statement and Path(code.co_filename).is_relative_to(folder)

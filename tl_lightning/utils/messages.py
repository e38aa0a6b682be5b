"""Wording that errors share."""

import difflib
from collections.abc import Iterable
from pathlib import Path

_LISTED = 40


def unknown(kind: str, given: object, allowed: Iterable[object], *, of: str = "") -> str:
    """Say that a name is unknown, which one was probably meant, and which there are.

    Args:
        kind: What the name names, as ``"stage"``.
        given: The unknown name.
        allowed: The known names.
        of: What the known names belong to.

    Example:
        >>> unknown("stage", "layer5", ["stem", "layer1"], of="resnet18")
        "unknown stage 'layer5'; did you mean 'layer1'? resnet18 has stem, layer1"
    """
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in close)}? " if close else ""
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"unknown {kind} {given!r}; {hint}{of + ' has' if of else 'there are'} {listed}"


def own_message(error: BaseException) -> str | None:
    """Return the message of the exception that this package raised to tell the user something, if one did."""
    found: BaseException | None = error
    while found is not None:
        trace = found.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1]):
            return str(found)
        found = found.__cause__ or found.__context__
    return None

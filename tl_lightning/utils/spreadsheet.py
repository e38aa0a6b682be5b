"""Cells of tables that no spreadsheet program takes for formulas."""

import re

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def quote_formula(text: str) -> str:
    """Put an apostrophe before a cell that a spreadsheet program would run as a formula.

    Such a cell begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break; see
    https://owasp.org/www-community/attacks/CSV_Injection. Apostrophes before such a sign get one more, so that
    :func:`unquote_formula` returns any text exactly.

    Example:
        >>> quote_formula("=1+1")
        "'=1+1"
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unquote_formula(cell: str) -> str:
    """Return the text of a cell that :func:`quote_formula` has made.

    Example:
        >>> unquote_formula("'=1+1")
        '=1+1'
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell

import pytest

from tl_lightning.utils.spreadsheet import quote_formula, unquote_formula


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\nx", "'=1", "''=1", "'", "''", "", "a=b", "'a"]
)
def test_quoting_of_formulas_is_undone_exactly(text: str) -> None:
    quoted = quote_formula(text)
    assert not quoted.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert unquote_formula(quoted) == text


def test_harmless_text_is_left_as_it_is() -> None:
    for text in ("cat", "0.25", "1e-05", "'a", "a, b", "caf\u00e9"):
        assert quote_formula(text) == text

import pytest

from tl_lightning.utils.console import print_table


def test_long_rows_are_wrapped_and_markup_is_printed_to_the_letter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table("title", {"a": "word " * 12, "name": "[red]"})
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "  a     word word word word word word",
        "        word word word word word word",
        "  name  [red]",
    ]


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, rank in (("RANK", "1"), ("SLURM_PROCID", "3"), ("LOCAL_RANK", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, rank)
            print_table("title", {"a": "b"})
    assert capsys.readouterr().out == ""

import pytest

from tl_lightning.cli.defaults import default_precision


def test_precision_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, native, expected in (
        (False, False, "32-true"),
        (True, False, "16-mixed"),
        (True, True, "bf16-mixed"),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=available: found)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, found=native: found)
        assert default_precision("auto") == expected
        assert default_precision("cpu") == "32-true"

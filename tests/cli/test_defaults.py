from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from tests.lightning_fixes.full_disk import limited_file_size
from tests.staged import classifier, trainer
from tl_lightning.cli.defaults import SaveConfig, default_precision


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


def test_configuration_from_before_survives_a_full_disk(tmp_path: Path) -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--ckpt_path")
    parser.add_argument("--name", default="first")
    run, module = trainer(tmp_path), classifier()
    SaveConfig(parser, parser.parse_args(["--ckpt_path=last.ckpt"])).setup(run, module, "test")
    assert (tmp_path / "config.yaml").read_text() == "ckpt_path: null\nname: first\n"
    again = SaveConfig(parser, parser.parse_args(["--name", "n" * 100]))
    with limited_file_size(50), pytest.raises(OSError, match=r"config\.yaml' cannot be written \(File too large\)"):
        again.setup(run, module, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "ckpt_path: null\nname: first\n"

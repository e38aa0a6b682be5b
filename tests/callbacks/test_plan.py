"""The plan says how much of the backbone the last k stages are."""

import warnings
from pathlib import Path

import pytest

from tests.doubles import TinyBackbone
from tests.staged import classifier, images, trainer
from tl_lightning.callbacks import Plan, StagedUnfreezing


@pytest.fixture
def _few_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the four stages of the double count as few."""
    monkeypatch.setattr("tl_lightning.callbacks.plan._FEW_STAGES", 5)


def printed_plan(folder: Path, photos: Path, unfreeze_from: str | int, *callbacks: StagedUnfreezing) -> None:
    model = classifier(TinyBackbone(), unfreeze_from=unfreeze_from)
    trainer(folder, Plan(), *callbacks, max_epochs=1).fit(model, datamodule=images(photos))


@pytest.mark.usefixtures("_few_stages")
@pytest.mark.parametrize("number", [1, "1"])
def test_last_stages_above_half_of_the_backbone_are_warned_of(
    number: str | int, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(
        UserWarning, match=r"the last stage \(layer3\) of tiny holds 55% of its parameters.*inside a stage"
    ):
        printed_plan(tmp_path, photos, number)
    assert "layer3: 3,528, 55% of the backbone" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("_few_stages")
def test_schedule_of_numbers_shows_the_share_of_each_stage(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"the last 2 stages \(layer2 to layer3\) of tiny hold 82% of its parameters"):
        printed_plan(tmp_path, photos, "layer2", StagedUnfreezing({0: 2}))
    assert "layer2 to layer3: 5,304, 82% of the backbone" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("given", "shown"), [("layer3", False), (1, True)])
def test_network_that_is_cut_between_its_blocks_gives_no_warning(
    given: str | int, shown: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Found .* module.s. in eval mode|.*LeafSpec")
        printed_plan(tmp_path, photos, given)
    assert ("55% of the backbone" in " ".join(capsys.readouterr().out.split())) == shown

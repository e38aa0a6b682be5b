from pathlib import Path
from typing import Any

import pytest
import torch

from tests.staged import classifier, images, trainer
from tl_lightning.callbacks import ProbeFallback, StagedUnfreezing
from tl_lightning.modules import PartialFineTuning

# A resumed run writes into the folder of the first.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def run(
    photos: Path, tmp_path: Path, resume: Path | None = None, **options: Any
) -> tuple[PartialFineTuning, ProbeFallback, float]:
    fallback = ProbeFallback(options.pop("monitor", "val_accuracy"))
    staged = StagedUnfreezing({6: "layer1"}, warmup_epochs=0)
    epochs = options.pop("max_epochs", 10)
    model = classifier(lr=0.05, **options)
    each = trainer(tmp_path, staged, fallback, max_epochs=epochs, enable_checkpointing=True)
    each.fit(model, images(photos), ckpt_path=resume, weights_only=True)
    each.save_checkpoint(tmp_path / "end.ckpt")
    score = trainer(tmp_path).validate(model, images(photos), verbose=False)[0]["val_accuracy"]
    return model, fallback, score


def test_probe_is_handed_back_where_fine_tuning_ends_below_it(photos: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"fine-tuning ended with val_accuracy .*the probe's weights are handed back"):
        model, fallback, score = run(photos, tmp_path, backbone_lr=50.0)
    assert fallback.handed_back
    assert fallback.probe is not None
    assert score == pytest.approx(fallback.probe_score)
    probe = PartialFineTuning.load_from_checkpoint(fallback.probe)
    for name, tensor in probe.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_fine_tuned_weights_stay_where_they_are_as_good(photos: Path, tmp_path: Path) -> None:
    model, fallback, score = run(photos, tmp_path, backbone_lr=1e-6)
    assert not fallback.handed_back
    assert fallback.probe_score is not None
    assert score >= fallback.probe_score
    assert fallback.probe is not None
    probe = PartialFineTuning.load_from_checkpoint(fallback.probe)
    assert not torch.equal(
        probe.backbone.state_dict()["model.layer3.conv.weight"], model.backbone.state_dict()["model.layer3.conv.weight"]
    )


def test_probe_is_known_after_a_resume(photos: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="handed back"):
        _, first, _ = run(photos, tmp_path, backbone_lr=50.0, max_epochs=8)
    with pytest.warns(UserWarning, match="handed back"):
        _, again, _ = run(photos, tmp_path, backbone_lr=50.0, resume=tmp_path / "end.ckpt", max_epochs=10)
    assert (again.probe, again.probe_score) == (first.probe, first.probe_score)


def test_wrong_use(photos: Path, tmp_path: Path) -> None:
    for callbacks in ([ProbeFallback()], [StagedUnfreezing({0: "layer3"}), ProbeFallback()]):
        with pytest.raises(ValueError, match="ProbeFallback needs epochs in which the head trains alone"):
            trainer(tmp_path, *callbacks).fit(classifier(), images(photos))
    with pytest.raises(ValueError, match=r"compares 'val_glory', which was not logged.*val_accuracy"):
        run(photos, tmp_path, monitor="val_glory")

"""A prediction has probabilities or raises."""

from pathlib import Path

import pytest
import torch

from tests.staged import classifier, images, trainer


def test_prediction_without_probabilities_names_the_images_and_the_checkpoint(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    model, data = classifier(), images(photos)
    run.fit(model, data)
    with torch.no_grad():
        model.get_parameter("head.linear.weight").fill_(3e38)  # finite, but its products are not
    with pytest.raises(ValueError, match=r"^the model gives logits that are not finite for the image .*ant.000\.png.*"):
        trainer(tmp_path).predict(model, datamodule=data)
    run.save_checkpoint(tmp_path / "large.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"^the checkpoint '.*large\.ckpt' gives logits that are not finite for the"):
        trainer(tmp_path).predict(classifier(), datamodule=data, ckpt_path=tmp_path / "large.ckpt")

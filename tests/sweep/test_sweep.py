"""Compare heads on the command line: the winner is saved, tested once, and a fit trains it again."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.data.test_precompute import cached, said
from tests.doubles import TinyBackbone, image_folder
from tests.ranks import run_on_ranks
from tl_lightning.backbones import TruncatedBackbone
from tl_lightning.batch import Batch
from tl_lightning.cli import TransferCLI, main
from tl_lightning.cli.trainer import TransferTrainer
from tl_lightning.heads import LinearHead
from tl_lightning.modules import CustomHeadClassifier, LinearProbe, TransferClassifier
from tl_lightning.sweep.candidates import build_candidates

RATES = ["--lr=[1e-3, 1e-2, 1e-1]", "--weight_decay=[0.0, 1.0]", "--trainer.max_epochs=4"]
HEADS = """[
  {class_path: LinearHead, init_args: {standardize: true}},
  {class_path: MLPHead, init_args: {hidden: [8], dropout: 0.1}},
  {class_path: ConvHead, init_args: {channels: 4}}]"""
VAL = "--data.images.val_fraction=0.3"


class StepProbe(LinearProbe):
    """Overrides the training step."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 2


class BranchingProbe(LinearProbe):
    """Has a loss that branches on its value."""

    def compute_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = super().compute_loss(logits, target)
        return loss * 2 if loss.item() > 1 else loss


def read_table(folder: Path) -> list[dict[str, str]]:
    with folder.joinpath("sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_head(first: TransferClassifier, second: TransferClassifier) -> None:
    """A fit and a sweep start from the same weights, and use the same batches and the same dropout."""
    one, other = first.head.state_dict(), second.head.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_winner_is_saved_tested_once_and_trained_again_by_a_fit(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sweep", *cached(photos, tmp_path, *RATES, VAL)])
    text = said(capsys)
    run = tmp_path / "runs" / "version_0"
    rows = read_table(run)
    assert len(rows) == 6
    (chosen,) = [row for row in rows if row["chosen"]]
    assert float(chosen["accuracy"]) > 0.5
    assert "corrected for choosing the best of many" in text
    assert text.count("test accuracy") >= 1

    best = run / "checkpoints" / "best.ckpt"
    winner = TransferClassifier.load_from_checkpoint(best)
    assert type(winner) is LinearProbe
    assert winner.lr == float(chosen["lr"])
    images = f"--data.root={photos}"
    scored = [f"--ckpt_path={best}", images, "--data.val_fraction=0.3", "--data.num_workers=0"]
    main(["validate", *scored, "--trainer.accelerator=cpu"])
    assert f"validation accuracy {float(chosen['accuracy']):.4f}" in said(
        capsys
    )  # the same on images as on cached features
    main(["predict", f"--ckpt_path={best}", images, "--data.num_workers=0", f"--trainer.default_root_dir={tmp_path}"])

    config = yaml.safe_load((run / "winner.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == winner.lr
    main(["fit", f"--config={run / 'winner.yaml'}"])
    again = LinearProbe.load_from_checkpoint(tmp_path / "runs" / "version_1" / "checkpoints" / "last.ckpt")
    assert_same_head(again, winner)

    before = best.read_bytes()
    with pytest.raises(ValueError, match="the state of its training"):
        main(["fit", f"--config={run / 'winner.yaml'}", f"--ckpt_path={best}"])
    assert best.read_bytes() == before


def test_equal_sweeps_give_equal_bits(photos: Path, tmp_path: Path) -> None:
    for _ in range(2):
        main(["sweep", *cached(photos, tmp_path, *RATES, f"--heads={HEADS}", VAL)])
    first, second = (tmp_path / "runs" / f"version_{number}" for number in range(2))
    assert (first / "sweep.csv").read_bytes() == (second / "sweep.csv").read_bytes()
    one, other = (
        TransferClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt").state_dict()
        for run in (first, second)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_heads_of_all_kinds_are_compared_by_cross_validation(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sweep", *cached(photos, tmp_path, *RATES, f"--heads={HEADS}", "--folds=3")])
    run = tmp_path / "runs" / "version_0"
    rows = read_table(run)
    assert {row["head"] for row in rows} == {
        "LinearHead(standardize=True)",
        "MLPHead(hidden=[8], dropout=0.1)",
        "ConvHead(channels=4)",
    }
    assert len(rows) == 18
    (chosen,) = [row for row in rows if row["chosen"]]
    winner = TransferClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert type(winner) is CustomHeadClassifier
    assert type(winner.head).__name__ == chosen["head"].partition("(")[0]
    assert "3-fold" in said(capsys)


def test_truncated_networks_are_compared(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep", *cached(photos, tmp_path, *RATES, VAL, "--boundaries=[layer1, layer3, head]")])
    run = tmp_path / "runs" / "version_0"
    rows = read_table(run)
    assert Counter(row["boundary"] for row in rows) == {"layer1": 6, "layer3": 6, "head": 6}
    (chosen,) = [row for row in rows if row["chosen"]]
    assert "boundary" in said(capsys)
    winner = TransferClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert chosen["boundary"] != "head"  # the first stages tell colours apart, and a smaller network is simpler
    assert isinstance(winner.backbone, TruncatedBackbone)
    assert winner.backbone.before == chosen["boundary"]
    scored = [f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}", f"--data.root={photos}", "--data.val_fraction=0.3"]
    main(["validate", *scored, "--data.num_workers=0", "--trainer.accelerator=cpu"])
    assert f"validation accuracy {float(chosen['accuracy']):.4f}" in said(capsys)

    main(["fit", f"--config={run / 'winner.yaml'}"])
    again = LinearProbe.load_from_checkpoint(tmp_path / "runs" / "version_1" / "checkpoints" / "last.ckpt")
    assert_same_head(again, winner)
    for name, weight in winner.backbone.state_dict().items():
        assert torch.equal(again.backbone.state_dict()[name], weight)


def test_head_on_the_map_of_a_truncated_network_is_the_winner(photos: Path, tmp_path: Path) -> None:
    head = "--heads=[{class_path: ConvHead, init_args: {channels: 4}}]"
    rates = ["--lr=[1e-2]", "--weight_decay=[0.0]", "--trainer.max_epochs=4"]
    main(["sweep", *cached(photos, tmp_path, *rates, VAL, head, "--boundaries=[layer2]")])
    winner = TransferClassifier.load_from_checkpoint(tmp_path / "runs" / "version_0" / "checkpoints" / "best.ckpt")
    assert winner(torch.zeros(1, 3, 16, 16)).shape == (1, winner.num_classes)


def test_sweep_of_one_configuration_without_test_images_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "pairs", {"ant": 2, "bee": 2, "cat": 2})  # one for training, one for validation
    main(["sweep", *cached(root, tmp_path, "--lr=[1e-2]", "--weight_decay=[0.0]", "--trainer.max_epochs=1")])
    text = said(capsys)
    assert "nothing to compare one configuration, LinearHead(standardize=True); give several values of lr" in text
    assert "the only one: nothing was compared" in text
    assert "best of many" not in text
    assert "test accuracy not tested" in text


@pytest.mark.parametrize("head", [0, 1, 2])
def test_winner_of_each_kind_is_trained_again_by_a_fit(head: int, photos: Path, tmp_path: Path) -> None:
    one = yaml.safe_load(HEADS)[head]
    main(["sweep", *cached(photos, tmp_path, "--lr=[1e-2]", "--weight_decay=[0.1]", f"--heads=[{one}]", VAL)])
    run = tmp_path / "runs" / "version_0"
    winner = CustomHeadClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    main(["fit", f"--config={run / 'winner.yaml'}"])
    again = CustomHeadClassifier.load_from_checkpoint(tmp_path / "runs" / "version_1" / "checkpoints" / "last.ckpt")
    assert_same_head(again, winner)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=FeatureCacheClassifier"], "FeatureCacheClassifier is trained differently"),
        (["--model=PartialFineTuning", "--model.unfreeze_from=1"], "PartialFineTuning is trained differently"),
        (["--model.optimizer=SGD"], "leave optimizer and scheduler out"),
        (["--heads=[{class_path: NearestNeighbourHead}]"], "NearestNeighbourHead is fitted to all features at once"),
        (["--lr=[]"], "nothing to compare"),
        (["--lr=[-1.0]"], "rates are above 0"),
        (["--lr=[1e-2, .nan]"], "all finite"),
        (["--weight_decay=[.inf]"], "all finite"),
        (
            ["--trainer.gradient_clip_val=1.0", "--trainer.max_steps=3"],
            "does not support max_steps 3, gradient_clip_val 1.0",
        ),
        (["--trainer.limit_test_batches=1"], "limit_test_batches 1"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "does not support EarlyStopping",
        ),
        (["--model=tests.sweep.test_sweep.StepProbe"], "overrides training_step"),
        (["--heads=[{class_path: LinearHead, init_args: {dropout: 2.0}}]"], "LinearHead.* cannot be built"),
        (["--data.views=2"], "leave views out"),
        (["--trainer.max_epochs=0"], "at least 1"),
        (["--trainer.fast_dev_run=true", "--trainer.logger=false"], "does not support fast_dev_run"),
        (["--folds=1"], "folds is 1"),
        (["--boundaries=[layer7]"], "unknown boundary 'layer7'; did you mean"),
        (["--boundaries=[stem]"], "unknown boundary 'stem'.*head"),
        (["--boundaries=[]"], "nothing to compare"),
        (["--folds=50"], "give 2 to"),
    ],
)
def test_unsupported_sweep_is_refused_before_features_are_computed(
    more: list[str], message: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["sweep", *cached(photos, tmp_path, *more)])
    assert not (tmp_path / "runs" / "version_0").exists()
    assert not list(tmp_path.rglob("*.npy")), "features were computed before the sweep was refused"


def test_loss_that_branches_on_its_value_trains_all_heads(photos: Path, tmp_path: Path) -> None:
    main(["sweep", *cached(photos, tmp_path, *RATES, VAL, "--model=tests.sweep.test_sweep.BranchingProbe")])
    assert len(read_table(tmp_path / "runs" / "version_0")) == 6


def test_scores_are_written_although_every_head_diverged(photos: Path, tmp_path: Path) -> None:
    more = ["--lr=[1e30]", "--weight_decay=[1e30]", "--trainer.max_epochs=4", VAL]
    with pytest.raises(ValueError, match="every head diverged"):
        main(["sweep", *cached(photos, tmp_path, *more)])
    assert read_table(tmp_path / "runs" / "version_0")[0]["accuracy"] == "0.0000"


def test_head_without_an_importable_class_is_refused() -> None:
    model = LinearProbe(TinyBackbone(), 3)
    with pytest.raises(ValueError, match="cannot be written into a checkpoint"):
        build_candidates(model, [1e-3], [0.0], [lambda features, classes: LinearHead(features, classes)])


def sweep_on_ranks(world: int, photos: str, folder: str) -> list[float]:
    run = Path(folder) / f"world{world}"
    ranks = [f"--trainer.devices={world}", "--trainer.strategy=ddp"] if world > 1 else []
    cli = TransferCLI(["sweep", *cached(Path(photos), run, *RATES, VAL, *ranks)])
    assert isinstance(cli.trainer, TransferTrainer)
    assert cli.trainer.sweep_result is not None
    found = cli.trainer.sweep_result.classifier.head.state_dict()["linear.weight"].flatten().tolist()
    saved = TransferClassifier.load_from_checkpoint(run / "runs" / "version_0" / "checkpoints" / "best.ckpt")
    assert found == saved.head.state_dict()["linear.weight"].flatten().tolist()
    return found  # type: ignore[no-any-return]  # numbers


def test_two_ranks_choose_the_same_head_as_one(photos: Path, tmp_path: Path) -> None:
    alone = sweep_on_ranks(1, str(photos), str(tmp_path))
    first, second = run_on_ranks(__name__, "sweep_on_ranks", tmp_path / "out", photos=str(photos), folder=str(tmp_path))
    assert first == second
    torch.testing.assert_close(torch.tensor(first), torch.tensor(alone), rtol=1e-5, atol=1e-5)

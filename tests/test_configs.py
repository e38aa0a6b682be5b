"""Every configuration runs as it is, on small stand-ins for the data and weights that a test cannot have."""

from pathlib import Path

import pytest
import torch

from tests.doubles import image_folder
from tl_lightning.cli import main

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights stand in a hub; random ones of the same shapes do here."""
    import torchvision

    def make_up(url: str, **kwargs: object) -> dict[str, torch.Tensor]:
        name = Path(url).name.partition("-")[0].removesuffix("_google")
        options = {"init_weights": False} if name == "inception_v3" else {}  # its initialisation takes a minute
        state: dict[str, torch.Tensor] = torchvision.models.get_model(name, weights=None, **options).state_dict()
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", make_up)


@pytest.fixture(autouse=True)
def _few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty images of noise stand in for the 2,624 solar cells, whose features take a minute."""

    def lay_out(root: Path, classes: int) -> None:
        image_folder(root, {"defective": 15, "functional": 15})

    monkeypatch.setattr("tl_lightning.data.demo._lay_out", lay_out)


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configuration_runs(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_folder(tmp_path / "photos", {"ant": 8, "bee": 8})
    short = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    staged = "StagedUnfreezing" in config.read_text()
    length = [] if staged else ["--trainer.max_epochs=1"]
    cached = "CachedFeatures" in config.read_text()
    size = "--data.images.batch_size=16" if cached else "--data.init_args.batch_size=4"
    main(["fit", f"--config={config}", *short, *length, size])
    (best,) = tmp_path.joinpath("runs").rglob("best.ckpt")
    image_folder(tmp_path / "new", {"x": 3})
    main(["predict", f"--ckpt_path={best}", "--data.root=new", "--trainer.default_root_dir=predicted"])
    (table,) = tmp_path.joinpath("predicted").rglob("predictions.csv")
    assert len(table.read_text().splitlines()) == 4

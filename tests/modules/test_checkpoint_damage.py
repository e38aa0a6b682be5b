"""Damaged, edited and diverged checkpoints are refused wherever they are read, and a whole one beside them is named."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from tests.staged import classifier, images, trainer
from tl_lightning.lightning_fixes import atomic_checkpoints
from tl_lightning.modules import TransferClassifier
from tl_lightning.modules.checkpoint import KEY, read, read_for_trainer
from tl_lightning.utils.hashing import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")

SHORT: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def saved(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from the middle of a run, with a state of the optimizer."""
    folder = tmp_path_factory.mktemp("saved")

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(folder / "a.ckpt", weights_only=False)

    trainer(folder, Save(), **SHORT).fit(classifier(), images(photos))
    return folder / "a.ckpt"


def uses(photos: Path, folder: Path, **options: Any) -> dict[str, Callable[[Path], Any]]:
    """All ways in which a checkpoint is read."""

    data = images(photos)

    def run(name: str) -> Callable[[Path], Any]:
        unused = [classifier()]

        def call(path: Path) -> Any:
            module = unused.pop() if unused else classifier()
            loud = {} if name in ("fit", "predict") else {"verbose": False}
            start = getattr(trainer(folder, **SHORT, **options), name)
            try:
                given = start(module, datamodule=data, ckpt_path=path, weights_only=True, **loud)
            except (ValueError, OSError):
                unused.append(module)  # a refused checkpoint leaves it as it was
                raise
            return fingerprint(module.state_dict()) if name == "fit" else given

        return call

    return {name: run(name) for name in ("fit", "validate", "test", "predict")} | {
        "load_from_checkpoint": lambda path: fingerprint(TransferClassifier.load_from_checkpoint(path).state_dict())
    }


def edited(saved: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(saved, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


def flipped(saved: Path, path: Path, place: int, bit: int = 0) -> Path:
    content = bytearray(saved.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return path


def place_of(saved: Path, tensor: torch.Tensor) -> int:
    return saved.read_bytes().index(bytes(tensor.untyped_storage()))


def test_flipped_bit_is_found_wherever_a_checkpoint_is_read(saved: Path, photos: Path, tmp_path: Path) -> None:
    """In a frozen weight, in the state of the optimizer, and in the description."""
    content = torch.load(saved, weights_only=True)
    moment = content["optimizer_states"][0]["state"][0]["exp_avg_sq"]
    places = [
        place_of(saved, content["state_dict"]["backbone.model.stem.conv.weight"]),
        place_of(saved, moment),
        saved.read_bytes().index(b"unfreeze_from"),
    ]
    for number, place in enumerate(places):
        path = flipped(saved, tmp_path / f"{number}.ckpt", place)
        for use in uses(photos, tmp_path).values():
            with pytest.raises(ValueError, match=rf"{number}\.ckpt' cannot be read safely \(Bad CRC-32 .* is damaged"):
                use(path)


def test_edited_weights_are_refused_wherever_a_checkpoint_is_read(saved: Path, photos: Path, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["state_dict"]["backbone.model.stem.conv.weight"][0, 0, 0, 0] += 0.5

    path = edited(saved, tmp_path / "edited.ckpt", edit)
    for use in uses(photos, tmp_path).values():
        with pytest.raises(ValueError, match=r"the weights of the backbone in .*edited\.ckpt' are not the saved ones"):
            use(path)


def set_weight(value: float, *, name: str = "head.linear.weight") -> Callable[[dict[str, Any]], None]:
    """Return an edit that sets a weight as training would, with its hash."""

    def edit(content: dict[str, Any]) -> None:
        content["state_dict"][name].view(-1)[1] = value
        for part, prefix in (("head", False), ("backbone", True)):
            tensors = {k: v for k, v in content["state_dict"].items() if k.startswith("backbone.") is prefix}
            content[KEY]["hashes"][part] = fingerprint(tensors)

    return edit


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, saved: Path, photos: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "diverged.ckpt", set_weight(value))
    for use in uses(photos, tmp_path).values():
        with pytest.raises(ValueError, match=r"1 of the \d+ tensors .*diverged\.ckpt' .* finite: head\.linear\.weight"):
            use(path)


def test_large_weights_are_finite(saved: Path, tmp_path: Path) -> None:
    path = edited(saved, tmp_path / "large.ckpt", lambda content: None)
    for name in ("head.linear.weight", "head.linear.bias"):
        edited(path, path, set_weight(3e38, name=name))
    edited(path, path, lambda c: c["state_dict"]["head.linear.weight"].fill_(3e38))  # their sum is infinite
    path = edited(path, path, set_weight(3e38))
    TransferClassifier.load_from_checkpoint(path)


def test_newest_sound_checkpoint_in_the_folder_is_named(saved: Path, photos: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("older", "sound", "damaged", "last")):
        shutil.copyfile(saved, tmp_path / f"{name}.ckpt")
        flip = name in ("damaged", "last")
        if flip:
            flipped(saved, tmp_path / f"{name}.ckpt", saved.stat().st_size // 2)
        os.utime(tmp_path / f"{name}.ckpt", (number, number))
    for use in uses(photos, tmp_path).values():
        with pytest.raises(ValueError, match=r"The newest sound checkpoint there is '.*sound\.ckpt'$"):
            use(tmp_path / "last.ckpt")


class Attack:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("attacked"),)  # type: ignore[return-value]


@pytest.mark.parametrize("in_torch_file", [True, False])
def test_pickled_objects_are_refused_without_advice_to_trust_them(
    in_torch_file: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "attack": Attack()}
    if in_torch_file:
        torch.save(content, tmp_path / "attack.ckpt")
    else:
        (tmp_path / "attack.ckpt").write_bytes(pickle.dumps(content))
    for use in uses(photos, tmp_path).values():
        with pytest.raises(ValueError, match=r"is refused: it holds .* can run any code") as caught:
            use(tmp_path / "attack.ckpt")
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "do not trust it" in str(caught.value)
    assert not Path("attacked").exists()


def test_file_that_cannot_be_opened_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    shutil.copyfile(saved, tmp_path / "a.ckpt")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"a\.ckpt' cannot be read \(Permission denied\); check its permissions"):
        read(tmp_path / "a.ckpt")


def test_sharded_run_checks_the_checkpoint_that_its_strategy_reads(saved: Path, tmp_path: Path) -> None:
    path = flipped(saved, tmp_path / "flipped.ckpt", saved.stat().st_size // 2)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    atomic_checkpoints.install(strategy, partial(read_for_trainer, classifier()))
    with pytest.raises(ValueError, match=r"flipped\.ckpt' cannot be read safely"):
        strategy.load_checkpoint(path)


@pytest.mark.slow
def test_a_hundred_flipped_bits_are_refused_or_change_nothing(saved: Path, photos: Path, tmp_path: Path) -> None:
    draw = random.Random(18)  # noqa: S311 - no secret
    all_uses = uses(photos, tmp_path)
    del all_uses["validate"]  # reads it as test does
    expected = {name: use(saved) for name, use in all_uses.items()}
    counts = {name: [0, 0] for name in all_uses}
    for number in range(100):
        path = flipped(saved, tmp_path / "flipped.ckpt", draw.randrange(saved.stat().st_size), number % 8)
        for name, use in all_uses.items():
            try:
                given = use(path)
            except (ValueError, OSError) as error:
                assert "flipped.ckpt" in str(error)  # noqa: PT017
                counts[name][0] += 1
            else:
                same = given == expected[name] if name != "predict" else all(map(torch.equal, given, expected[name]))
                assert same, f"bit {number} changed the results of {name}"
                counts[name][1] += 1
    print("refused and equal:", counts)
    assert all(refused + equal == 100 and refused >= 50 for refused, equal in counts.values())

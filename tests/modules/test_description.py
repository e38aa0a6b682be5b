"""Damaged fields of a checkpoint's description are named in one line."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.doubles import TinyBackbone
from tests.staged import classifier, images, trainer
from tl_lightning.heads import MLPHead
from tl_lightning.modules import CustomHeadClassifier, TransferClassifier
from tl_lightning.modules.checkpoint import KEY, read_for_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")

MISSING = object()
VALUES: tuple[object, ...] = (
    MISSING,
    None,
    "abc",
    7,
    -1,
    10**12,
    1.5,
    float("nan"),
    True,
    [],
    {},
    [None],
    {"class_path": 3},
    b"\xff",
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a checkpoint with a head of its own."""
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    model = CustomHeadClassifier(TinyBackbone(), num_classes=2, head=MLPHead, class_names=["a", "b"])
    run = trainer(path.parent)
    run.strategy.connect(model)
    run.save_checkpoint(path, weights_only=True)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def with_value(content: dict[str, Any], place: tuple[Any, ...], value: object) -> dict[str, Any]:
    """Return the content with another description, one field of which has another value."""
    described = copy.deepcopy(content[KEY])
    inner = described
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content | {KEY: described}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each field in a description, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def refusal(content: dict[str, Any], path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(ValueError, match=path.name) as caught:
        TransferClassifier.load_from_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_each_field_of_the_description_is_checked(content: dict[str, Any], tmp_path: Path) -> None:
    """A value that is possible may load; anything else is refused in one line that names the field."""
    path, loaded, refused = tmp_path / "fuzzed.ckpt", [], 0
    for place in places(content[KEY]):
        if place[0] == "hashes" and len(place) > 1:
            continue  # any other hash is refused, as the tests of damaged weights show
        for value in VALUES:
            torch.save(with_value(content, place, value), path)
            try:
                TransferClassifier.load_from_checkpoint(path)
            except ValueError as error:
                text = str(error)
                assert "\n" not in text, text
                assert path.name in text or "the checkpoint names" in text, text
                names = [str(part) for part in place if isinstance(part, str)]
                assert any(name in text for name in names) or "class" in text, (place, value, text)
                refused += 1
            else:
                loaded.append((place, value))
    fields = {place[0] for place, _ in loaded}
    assert fields <= {"version", "model", "left_out", "class_names", "preprocessing"}, loaded
    assert refused > 10 * len(loaded), loaded


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("format",), "abc", "`format` is 'abc'; it must be a number, at least 1"),
        (("version",), 3, "`version` is 3; it must be a version"),
        (("left_out",), ["head"], "`left_out` is ['head']; it must list names among optimizer, scheduler"),
        (("hashes",), None, "`hashes` is None; it must give the hashes of backbone and head"),
        (("class_names",), "ab", "`class_names` is 'ab'; it must list the names of the classes, or be None"),
        (("model",), 3, "`model.class_path` is 3; it must be the dotted path of a class"),
        (("model", "class_path"), None, "`model.class_path` is None; it must be the dotted path of a class"),
        (("model", "backbone"), MISSING, "`model.backbone.class_path` is None; it must be the dotted path"),
        (("model", "init_args"), [], "`model.init_args` is []; it must map arguments to values"),
        (("model", "init_args", "num_classes"), "abc", "`model.num_classes` is 'abc'; CustomHeadClassifier takes int"),
        (("model", "init_args", "num_classes"), MISSING, "`model.num_classes` is missing; CustomHeadClassifier needs"),
        (("model", "init_args", "lr"), None, "`model.lr` is None; CustomHeadClassifier takes float"),
        (("model", "init_args", "head"), "abc", "`model.head` is 'abc'; CustomHeadClassifier takes "),
        (("model", "init_args", "head", "class_path"), 3, "`model.head.class_path` is 3; it must be the dotted path"),
        (
            ("model", "init_args", "head", "__made_of__"),
            "code",
            "`model.head.__made_of__` is 'code'; it must be one of",
        ),
        (("model", "backbone", "init_args", "seed"), "abc", "`model.backbone.seed` is 'abc'; TinyBackbone takes int"),
        (("model", "backbone", "init_args", "colour"), 1, "`model.backbone.colour` is not an argument of TinyBackbone"),
        (("preprocessing",), [1, 2], "`preprocessing` is [1, 2]; it must list size, crop, interpolation, mean, std"),
        (("preprocessing", 0), 0, "`preprocessing.size` is 0; it must be a number of pixels from 1 to"),
        (("preprocessing", 0), 10**9, "`preprocessing.size` is 1000000000; it must be a number of pixels from 1 to"),
        (("preprocessing", 1), [-3, 8], "`preprocessing.crop` is (-3, 8); it must be a number of pixels from 1 to"),
        (("preprocessing", 2), "cubic", "preprocessing.interpolation is 'cubic'; it is one of nearest, nearest-exact"),
        (("preprocessing", 3), [0.5, 0.5], "preprocessing.mean is (0.5, 0.5); give three numbers"),
        (("preprocessing", 4), [0.5, 0.5, 0], "preprocessing.std is (0.5, 0.5, 0); give three numbers"),
        (("preprocessing", 4), "abc", "`preprocessing.std` is 'abc'; it must be three numbers"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_damaged_field_is_named(
    place: tuple[Any, ...], value: object, said: str, content: dict[str, Any], tmp_path: Path
) -> None:
    assert said in refusal(with_value(content, place, value), tmp_path / "damaged.ckpt")


def test_more_classes_than_weights_are_refused_before_memory_is_filled(content: dict[str, Any], tmp_path: Path) -> None:
    unnamed = with_value(content, ("class_names",), None)
    said = refusal(with_value(unnamed, ("model", "init_args", "num_classes"), 10**9), tmp_path / "large.ckpt")
    assert "`model.num_classes` is 1000000000; that is more than all numbers in the weights" in said


def test_damaged_state_of_training_is_named_when_a_run_resumes(photos: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    run.fit(classifier(), images(photos))
    path = tmp_path / "damaged.ckpt"
    run.save_checkpoint(path, weights_only=False)
    whole = torch.load(path, weights_only=True)
    resuming = classifier()
    resuming.trainer = run  # its last call was fit
    assert read_for_trainer(resuming, path, False).keys() == whole.keys()
    names = ["state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step"]
    for name in [*names, "total_steps", "used_lrs", "train_loss"]:
        for value in (MISSING, "abc", [3]):
            changed = whole | {KEY: dict(whole[KEY])}
            place = changed if name in whole else changed[KEY]
            place[name] = value
            if value is MISSING:
                del place[name]
            torch.save(changed, path)
            if name in ("total_steps", "used_lrs", "train_loss", "epoch", "global_step") and value is MISSING:
                read_for_trainer(resuming, path, False)  # an earlier version wrote the checkpoint
            else:
                with pytest.raises(ValueError, match=r"damaged\.ckpt' is damaged: ") as caught:
                    read_for_trainer(resuming, path, False)
                assert name in str(caught.value) or "it lacks its weights" in str(caught.value)

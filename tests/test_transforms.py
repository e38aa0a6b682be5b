from typing import Any

import pytest
import torch

from tl_lightning.transforms import Preprocessing, eval_transform, train_transform
from tl_lightning.utils.seeding import seeded


def test_eval_keeps_the_aspect_ratio_and_crops_the_centre() -> None:
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 255  # the centre square
    plain = Preprocessing(size=20, crop=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(eval_transform(plain)(image)[:, :, 1:-1], torch.ones(3, 16, 14))


def test_pair_of_sizes_changes_the_aspect_ratio() -> None:
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    squashed = eval_transform(Preprocessing(size=(20, 20), crop=20))(image)
    assert squashed.shape == (3, 20, 20)


def test_images_are_normalised_by_mean_and_std() -> None:
    image = torch.full((3, 8, 8), 51, dtype=torch.uint8)  # 0.2
    out = eval_transform(Preprocessing(8, 8, mean=(0.2, 0.1, 0.0), std=(1.0, 0.5, 0.1)))(image)
    assert torch.allclose(out[:, 0, 0], torch.tensor([0.0, 0.2, 2.0]), atol=1e-6)


def test_train_transform_varies_and_depends_on_the_seed_alone() -> None:
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    transform = train_transform(Preprocessing(20, 16))
    views = []
    for part in (0, 1, 0):
        with seeded("test", part):
            views.append(transform(image))
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])
    assert views[0].shape == (3, 16, 16)


def test_preprocessing_is_hashable() -> None:
    assert len({Preprocessing(), Preprocessing(), Preprocessing(crop=225)}) == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", 0, "size is 0; .*pixels"),
        ("size", (20, -1), r"size is \(20, -1\)"),
        ("crop", (16,), r"crop is \(16,\); it is a number of pixels, .* pair \(height, width\)"),
        ("interpolation", "cubic", "interpolation is 'cubic'; it is one of nearest, .*bicubic"),
        ("interpolation", "lanczos", "interpolation is 'lanczos'; it is one of"),
        ("mean", (0.5,), r"mean is \(0.5,\); .*three"),
        ("std", (0.2, 0.0, 0.2), r"std is \(0.2, 0.0, 0.2\); .*three.*above 0"),
    ],
)
def test_invalid_preprocessing_is_refused(field: str, value: Any, message: str) -> None:
    wrong = Preprocessing()._replace(**{field: value})
    for build in (eval_transform, train_transform):
        if (build, field) != (train_transform, "size"):  # the random crop replaces the resize
            with pytest.raises(ValueError, match=message):
                build(wrong)


@pytest.mark.parametrize(("flip", "seen"), [("horizontal", 2), ("both", 4), ("none", 1)])
def test_flip_option_decides_on_the_flips(flip: Any, seen: int) -> None:
    """Each quarter of the image has its own value, so the order of the values shows the flips."""
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    for number, (rows, columns) in enumerate([(0, 0), (0, 20), (20, 0), (20, 20)]):
        image[:, rows : rows + 20, columns : columns + 20] = 60 * number
    transform = train_transform(Preprocessing(32, 32, mean=(0, 0, 0), std=(1, 1, 1)), flip)
    orders = {
        tuple(round(float(out[0, y, x]) * 255 / 60) for y, x in ((1, 1), (1, -2), (-2, 1), (-2, -2)))
        for out in (transform(image) for _ in range(60))
    }
    assert len({order for order in orders if sorted(order) == [0, 1, 2, 3]}) == seen


@pytest.mark.parametrize("min_crop", [0.1, 0.8, 1.0])
def test_crops_keep_at_least_their_share_of_the_area(min_crop: float) -> None:
    """Each pixel holds its column number (its row number in channel 1), so the range of a crop shows its size."""
    columns = torch.arange(100, dtype=torch.uint8).expand(100, 100)
    image = torch.stack([columns, columns.T, columns])
    transform = train_transform(Preprocessing(100, 100, mean=(0, 0, 0), std=(1, 1, 1)), "none", min_crop)
    shares = []
    for _ in range(60):
        out = 255 * transform(image)
        width, height = (float(out[channel].max() - out[channel].min()) + 1 for channel in (0, 1))
        shares.append(width * height / 100**2)
    assert min(shares) >= min_crop - 0.03
    assert min(shares) <= min_crop + 0.2


@pytest.mark.parametrize("min_crop", [0.0, 1.5])
def test_impossible_crop_is_refused(min_crop: float) -> None:
    with pytest.raises(ValueError, match="a share of the image's area"):
        train_transform(Preprocessing(), min_crop=min_crop)


def test_unknown_flip_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="flip is 'vertical'; it is one of horizontal, both, none"):
        train_transform(Preprocessing(), "vertical")  # type: ignore[arg-type]  # the mistake

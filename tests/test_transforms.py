import torch

from tl_lightning.chance import seeded
from tl_lightning.transforms import Preprocessing, eval_transform, train_transform


def test_eval_keeps_the_aspect_ratio_and_crops_the_centre() -> None:
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 255  # the centre square
    plain = Preprocessing(size=20, crop=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(eval_transform(plain)(image)[:, :, 1:-1], torch.ones(3, 16, 14))


def test_pair_of_sizes_squashes() -> None:
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    squashed = eval_transform(Preprocessing(size=(20, 20), crop=20))(image)
    assert squashed.shape == (3, 20, 20)


def test_normalised_by_mean_and_std() -> None:
    image = torch.full((3, 8, 8), 51, dtype=torch.uint8)  # 0.2
    out = eval_transform(Preprocessing(8, 8, mean=(0.2, 0.1, 0.0), std=(1.0, 0.5, 0.1)))(image)
    assert torch.allclose(out[:, 0, 0], torch.tensor([0.0, 0.2, 2.0]), atol=1e-6)


def test_training_varies_and_is_a_function_of_its_seed() -> None:
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

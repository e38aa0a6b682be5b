import pytest
import torch

from tl_lightning.evaluation import simplest_within_one_standard_error


def test_simplest_candidate_within_one_standard_error_is_chosen() -> None:
    right = torch.zeros(4, 100)
    for number, count in enumerate((90, 88, 86, 50)):
        right[number, :count] = 1
    # The best accuracy is 0.90 with a standard error of 0.030: 0.88 is within it, 0.86 is not.
    assert simplest_within_one_standard_error(right, [3, 2, 1, 0]) == 1
    assert simplest_within_one_standard_error(right, [0, 1, 2, 3]) == 0


def test_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="1 image to choose by"):
        simplest_within_one_standard_error(torch.ones(3, 1), [0, 1, 2])

import pytest
import torch

from tl_lightning.utils.messages import package_error_message, unknown
from tl_lightning.utils.serialization import trusted_class


def test_unknown_name_without_a_similar_one_lists_at_most_forty() -> None:
    assert unknown("class", "zebra", ["ant", "bee"]) == "unknown class 'zebra'; there are ant, bee"
    assert unknown("model", "zebra", [f"m{n:02d}" for n in range(42)], of="timm").endswith("m38, m39 and 2 more")


def test_error_of_this_package_is_found_under_the_errors_that_it_caused() -> None:
    def wrap_as_a_library_does() -> None:
        try:
            trusted_class("antigravity.Module")
        except ValueError as error:
            raise RuntimeError("parsing failed") from error

    with pytest.raises(RuntimeError, match="parsing failed") as caught:
        wrap_as_a_library_does()
    message = package_error_message(caught.value)
    assert message is not None
    assert message.startswith("the checkpoint names the class 'antigravity.Module'")


def test_error_of_another_library_is_no_message_to_the_user() -> None:
    with pytest.raises(RuntimeError, match="size") as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert package_error_message(caught.value) is None

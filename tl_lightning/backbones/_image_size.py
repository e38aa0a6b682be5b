"""Say that a network takes no images of the chosen size."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explain_image_size(network: str, image_size: int | None) -> Iterator[None]:
    """Explain errors of a network that is built or run on images of a size that the user has chosen.

    Args:
        network: The network in messages, as ``torchvision's resnet18``.
        image_size: Side of the images in pixels; None has chosen nothing, so errors stay as they are.

    Raises:
        ValueError: The network takes no images of that size.
    """
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if image_size is None:
            raise
        raise ValueError(
            f"{network} takes no images of {image_size} pixels ({error}); leave out image_size, give a larger one, or "
            "look for a similar network that takes any size in TimmBackbone"
        ) from error

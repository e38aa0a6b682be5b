"""Backbones from timm."""

import math
from pathlib import Path
from typing import Any

from tl_lightning.backbones._image_size import explain_image_size
from tl_lightning.backbones._published import build_with_download, cached_file
from tl_lightning.backbones.traced import TracedBackbone
from tl_lightning.backbones.weights import is_path, load_weights_file, unknown_weights
from tl_lightning.transforms import Preprocessing
from tl_lightning.utils.messages import unknown


class TimmBackbone(TracedBackbone):
    """Load any model of timm without its classifier.

    Args:
        name: One of ``timm.list_models()``, for instance ``vit_small_patch14_dinov2``. A tag may follow after a dot, as
            in ``resnet50.a1_in1k``; it selects the preprocessing.
        weights: ``DEFAULT``, or the tag of published weights (``a1_in1k``); the path of a ``.pth`` or ``.safetensors``
            file with the model's own parameter names, with or without a classifier (see
            :func:`tl_lightning.backbones.weights.load_weights_file`); or None for random weights.
        image_size: Side in pixels of the square images that the network sees: the whole centre square. None takes size
            and crop as the weights were trained. Larger images show smaller details.

    Raises:
        ValueError: The model or the weights are unknown, or the file or the image size does not fit the model.
        FileNotFoundError: The weights file does not exist.
        ConnectionError: The weights are not in the cache and cannot be downloaded.

    Example:
        >>> TimmBackbone("test_resnet", weights=None).feature_dim
        96
    """

    def __init__(self, name: str, weights: str | None = "DEFAULT", image_size: int | None = None) -> None:
        import timm

        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise ValueError(unknown("model", architecture, timm.list_models(), of="timm"))
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        published = weights is not None and not is_path(weights)
        if published and weights != "DEFAULT":
            tag = str(weights)
        if tag and tag not in tags:
            raise ValueError(unknown_weights(tag, ["DEFAULT", *tags], of=architecture))
        if published and not tags:
            raise ValueError(f"timm publishes no weights for {architecture}; pass weights=None, or the path of a file")
        full_name = f"{architecture}.{tag}" if tag else architecture

        # Some networks, such as vision transformers, are built for one size; others take any.
        cfg = timm.models.get_pretrained_cfg(full_name)
        fixed: dict[str, Any] = (
            {"img_size": image_size} if image_size is not None and cfg is not None and cfg.fixed_input_size else {}
        )

        def build(pretrained: bool) -> Any:
            with explain_image_size(f"timm's {architecture}", image_size):
                return timm.create_model(full_name, pretrained=pretrained, num_classes=0, **fixed)

        if published:
            model = build_with_download(
                lambda: build(True), name=full_name, weights=str(weights), cached=_cached_files(cfg)
            )
        else:
            model = build(False)
        _keep_attention_biases_fresh(model)
        classifier = model.pretrained_cfg.get("classifier") or "head"  # a tuple for a network with several
        if weights is not None and not published:
            load_weights_file(model, weights, name=full_name, classifier=classifier)
        leaf_functions = timm.models.get_notrace_functions()  # type: ignore[no-untyped-call]  # timm ships no types
        with explain_image_size(f"timm's {architecture}", image_size):
            super().__init__(model, full_name, timm_preprocessing(model).with_image_size(image_size), leaf_functions)
        # With the full name, a checkpoint rebuilds the same variant without its published weights.
        self.init_args = ((), {"name": full_name, "weights": weights, "image_size": image_size})


def _cached_files(cfg: Any) -> list[Path]:
    """Return the files in the cache of torch, or of the hub, to which timm downloads published weights."""
    from huggingface_hub import try_to_load_from_cache

    files = [cached_file(cfg.url)] if cfg.url else []
    for name in ("model.safetensors", "pytorch_model.bin", cfg.hf_hub_filename):
        found = try_to_load_from_cache(cfg.hf_hub_id, name) if cfg.hf_hub_id and name else None
        files += [Path(found)] if isinstance(found, str) else []
    return files


def _keep_attention_biases_fresh(model: Any) -> None:
    """Let attention in eval mode read its weights anew in each pass.

    timm keeps the attention biases of the first pass in eval mode until ``train()`` is called on the module. They would
    be stale after a checkpoint is loaded, weights are averaged, or a part of the network has trained. Source:
    https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/levit.py, ``get_attention_biases``.
    """
    for module in model.modules():
        if "attention_bias_cache" in vars(module):
            module.register_forward_pre_hook(_forget_attention_biases)


def _forget_attention_biases(module: Any, inputs: Any) -> None:
    module.attention_bias_cache = {}


def timm_preprocessing(model: Any) -> Preprocessing:
    """Read the evaluation preprocessing of a timm model from its pretrained configuration.

    Args:
        model: A model made by ``timm.create_model``.

    Raises:
        ValueError: The model takes images of other than three channels.
    """
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]  # timm ships no types
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ValueError(f"this model takes images of {channels} channels; only models for 3 channels are supported")
    # timm.data.transforms_factory.transforms_imagenet_eval: crop_mode 'center' keeps the aspect ratio, 'squash' does
    # not.
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    size: int | tuple[int, int] = scaled[0]
    if config["crop_mode"] == "squash" or height != width:
        size = (scaled[0], scaled[1])
    interpolation = "bicubic" if config["interpolation"] == "random" else config["interpolation"]
    crop: int | tuple[int, int] = height if height == width else (height, width)
    return Preprocessing(size, crop, interpolation, tuple(config["mean"]), tuple(config["std"]))

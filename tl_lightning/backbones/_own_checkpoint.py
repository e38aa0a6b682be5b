"""Take the backbone of a checkpoint of this library as the first weights of another one."""

from collections.abc import Mapping
from typing import Any

from tl_lightning.utils.hashing import fingerprint

_CHECKPOINT_KEY = "tl_lightning"  # modules/checkpoint.py writes it, and may not be imported here


def backbone_of_checkpoint(content: Any, source: str, name: str) -> tuple[Any, str]:
    """Check the backbone in a checkpoint of this library, and return its tensors.

    Args:
        content: The content of the file.
        source: Name of the file in messages.
        name: Name of the network that takes the weights.

    Returns:
        The state dicts of the checkpoint, and a description of the backbone; for any other file, its content as it
        is, and an empty string.

    Raises:
        ValueError: The checkpoint holds another network, or its weights are not those that were saved.
    """
    if not (isinstance(content, Mapping) and isinstance(content.get(_CHECKPOINT_KEY), Mapping)):
        return content, ""
    try:
        description = content[_CHECKPOINT_KEY]
        backbone = description["model"]["backbone"]
        saved_class, saved_name = str(backbone["class_path"]).rpartition(".")[2], backbone["init_args"].get("name")
        tensors = {key: tensor for key, tensor in content["state_dict"].items() if key.startswith("backbone.")}
        intact = fingerprint(tensors) == description["hashes"]["backbone"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is a damaged checkpoint of tl_lightning ({type(error).__name__}: {error})"
        ) from error
    described = f"a checkpoint of tl_lightning with {saved_class}{f' {saved_name}' if saved_name else ''}"
    if not intact:
        raise ValueError(f"{source} is {described}, but its weights are not the saved ones: the file is damaged")
    if saved_name is not None and str(saved_name).partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"{source} is {described}, and this network is {name}: give a checkpoint of the same network")
    # TorchvisionBackbone moves the auxiliary heads of Inception and GoogLeNet out of the network once they are loaded.
    states = {"state_dict": {_before_detaching(key): tensor for key, tensor in tensors.items()}}
    raw = content.get("current_model_state")  # beside an average by callbacks.EMA
    return states | ({} if raw is None else {"current_model_state": raw}), described


def _before_detaching(name: str) -> str:
    return name.replace("backbone.auxiliary.", "backbone.model.", 1) if name.startswith("backbone.auxiliary.") else name

"""Load weights from files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from tl_lightning.backbones._own_checkpoint import backbone_of_checkpoint
from tl_lightning.backbones._state_dicts import Candidate, candidates, choose, listed
from tl_lightning.backbones._weights_file import SUFFIXES, read_weights_file
from tl_lightning.utils.distributed import is_rank_zero
from tl_lightning.utils.messages import unknown

_LISTED = 5


def is_path(weights: str) -> bool:
    """Tell the path of a weights file from the name of published weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights


def unknown_weights(given: str, names: Iterable[str], *, of: str) -> str:
    """Say that published weights are unknown, and which values are allowed.

    Args:
        given: The unknown name.
        names: Names of the published weights.
        of: Name of the model.
    """
    allowed = unknown("weights", given, names, of=of)
    return f"{allowed}. The path of a {', '.join(SUFFIXES)} file, or None (null on the command line), is allowed too"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file that holds one state dict and nothing else, without executing anything in it.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no mapping of names to tensors.
    """
    content = read_weights_file(Path(path))
    if not (isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise ValueError(f"the weights file {str(path)!r} holds no state dict, which maps names to tensors")
    return {str(name): tensor for name, tensor in content.items()}


def load_weights_file(model: nn.Module, path: str | Path, *, name: str, classifier: str | Sequence[str]) -> None:
    """Load a weights file into a network and skip the classifier in the file.

    The state dict may lie in a dict, as ``state_dict``, ``model`` or under any other key, and its names may have a
    prefix, as ``module.``. An average of the weights is preferred. Rank 0 prints where in the file the weights lay,
    unless the file is a state dict with the network's own names.

    A checkpoint of this library gives the weights of its backbone.

    Args:
        model: The network, whose classifier holds no parameters any more.
        path: A file by torch.save or safetensors; ``~`` is the home folder.
        name: Name of the network in messages.
        classifier: Qualified names of the classifiers, or of the only one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read; tensors are missing, unknown, of another shape, or not finite; or several
            networks in the file fit. The message lists them.
    """
    path = _expanded(path)
    source = f"the weights file {str(path)!r}"
    content, described = backbone_of_checkpoint(read_weights_file(path), source, name)
    own = model.state_dict()
    found = candidates(content, own, [classifier] if isinstance(classifier, str) else classifier)
    if not found:
        keys = f" (its keys are {', '.join(map(str, list(content)[:_LISTED]))})" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"{source} holds no weights{keys}. It must map names to tensors, at the top or in a dict inside; the state "
            "of an optimizer is not read"
        )
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting:
        closest = max(found, key=lambda c: len(own.keys() & c.tensors.keys()))
        place = "" if _is_plain(closest) else f" These are the tensors of {closest.label}."
        raise ValueError(
            f"{source} does not fit {name}{described and f', although it is {described}'}; tensors "
            f"{listed(closest.problems)}.{place} Check that the file belongs to this model"
        )
    try:
        chosen, reason = choose(fitting)
    except ValueError as error:
        raise ValueError(
            f"{source} cannot be loaded into {name}: {error}. Save the one that is meant to a file of its own, for "
            f"example with {_extraction(fitting[0], path.name)}"
        ) from error
    matrices = [tensor for tensor in chosen.tensors.values() if tensor.is_floating_point() and tensor.ndim > 1]
    if matrices and not any(bool((tensor < 0).any()) for tensor in matrices):
        raise ValueError(
            f"{source} holds no trained weights: no layer of {chosen.label} has a value below zero, so they are zeros, "
            "or an optimizer's squared gradients. If the file has others, save those to a file of their own"
        )
    model.load_state_dict(chosen.tensors, strict=False)
    check_finite(model, source)
    if is_rank_zero() and not _is_plain(chosen):
        print(_announcement(chosen, reason, path.name, described, found), flush=True)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # there is no user of this name
        raise FileNotFoundError(f"the weights file {str(path)!r} does not exist ({error})") from error


def _is_plain(candidate: Candidate) -> bool:
    return not (candidate.keys or candidate.prefix or candidate.inside)


def _extraction(candidate: Candidate, file: str) -> str:
    """Return a line of Python that saves the tensors of a candidate alone."""
    saved = f"safetensors.torch.load_file({file!r})"
    if not file.endswith(".safetensors"):
        saved = f"torch.load({file!r}, weights_only=True)" + "".join(f"[{key!r}]" for key in candidate.keys)
    if candidate.prefix:
        saved = f"{{k: v for k, v in {saved}.items() if k.startswith({candidate.prefix!r})}}"
    return f"torch.save({saved}, 'weights.pth')"


def _announcement(chosen: Candidate, reason: str, file: str, described: str, found: Sequence[Candidate]) -> str:
    """Say in one line which tensors of the file are loaded."""
    place = repr(".".join(chosen.keys)) if chosen.keys else "the names"
    said = f"weights: took {place}{f' ({reason})' if reason else ''} of {file}"
    said += f", without the prefix {chosen.prefix!r}" if chosen.prefix else ""
    said += f", without {chosen.inside} in its names" if chosen.inside else ""
    said += f"; the file is {described}" if described else ""
    if chosen.beside and not described:
        count = f"{len(chosen.beside)} tensor{'s' if len(chosen.beside) > 1 else ''}"
        names = ", ".join(chosen.beside[:_LISTED]) + (", ..." if len(chosen.beside) > _LISTED else "")
        said += f"; left out {count} beside it: {names}"
    broken = next((c for c in found if c.is_average and not c.fits), None)
    if broken is not None and not chosen.is_average:
        said += f"; not the average under {broken.label}, which does not fit ({listed(broken.problems)})"
    return said


def check_finite(model: nn.Module, source: str) -> None:
    """Check that all weights and batch norm statistics are finite, and that no other buffer holds NaN.

    Args:
        model: The network. Its buffers of other kinds may hold infinite bounds, as timm's Gemma 4 does.
        source: Name of the file or of the published weights in the message.

    Raises:
        ValueError: A value is NaN or infinite; the message lists the tensors.
    """
    parameters = dict(model.named_parameters())
    found = []
    for name, tensor in model.state_dict().items():
        # A finite sum proves that all values are finite, in a third of the time.
        if tensor.is_floating_point() and not tensor.sum().isfinite():
            may_be_infinite = name not in parameters and "running_" not in name
            wrong = int((tensor.isnan() if may_be_infinite else ~tensor.isfinite()).sum())
            found += [f"{wrong} of {tensor.numel()} in {name}"] if wrong else []
    if found:
        listing = "; ".join(found[:_LISTED]) + ("; ..." if len(found) > _LISTED else "")
        raise ValueError(
            f"{source} holds values that are not finite: {listing}. The training diverged, or the file is damaged: use "
            "another file"
        )

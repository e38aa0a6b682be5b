"""Find the state dict of a network among everything that a training program saved."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LISTED = 5
_DEPTH = 4
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch, inside names
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|averaged?)(?:$|[._])", re.IGNORECASE)
_OPTIMIZER = re.compile(
    r"(?:^|[._])(?:opt|optim|optimizers?|exp_avg|exp_avg_sq|momentum_buffer|grads?|gradients?)(?:$|[._])", re.IGNORECASE
)
_CONVENTIONS = (  # of two networks whose names differ in these words, the first is the one that its authors evaluate
    # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.0/src/lightning/pytorch/callbacks/weight_averaging.py
    ("state_dict", "current_model_state", "Lightning's WeightAveraging saves the average as state_dict"),
    # https://github.com/facebookresearch/dino/blob/main/eval_linear.py, --checkpoint_key
    ("teacher", "student", "DINO evaluates the teacher"),
    # https://github.com/facebookresearch/moco/blob/main/main_lincls.py
    ("encoder_q", "encoder_k", "MoCo evaluates the query encoder"),
    # https://github.com/facebookresearch/moco-v3/blob/main/main_lincls.py
    ("base_encoder", "momentum_encoder", "MoCo evaluates the base encoder"),
)


class Candidate(NamedTuple):
    """A state dict in a file, with the names that the network gives its tensors."""

    keys: tuple[str, ...]
    """Keys of the dicts around it."""
    prefix: str
    """Prefix of its names in the file."""
    inside: str
    """Wrappers that were removed inside its names."""
    tensors: dict[str, Tensor]
    """The tensors, without those of the classifier."""
    beside: list[str]
    """Names without the prefix."""
    problems: tuple[tuple[str, list[str]], ...]
    """Tensors that are missing, unknown or of another shape."""
    averaged: int | None
    """Number of averaged networks, if ``torch.optim.swa_utils.AveragedModel`` counted them."""

    @property
    def fits(self) -> bool:
        """Whether every tensor of the network has its counterpart, and no other tensor is left."""
        return not self.problems

    @property
    def is_average(self) -> bool:
        """Whether the tensors are an average over training."""
        return self.averaged is not None or bool(_AVERAGE.search(f"{'.'.join(self.keys)}.{self.prefix}"))

    @property
    def label(self) -> str:
        """Name of the place in the file, for messages."""
        place = f"{'.'.join(self.keys)!r}" if self.keys else "the names"
        if not self.keys and not self.prefix:
            return f"{place} without a prefix"
        return f"{place} with the prefix {self.prefix!r}" if self.prefix else place

    @property
    def words(self) -> str:
        """The place without the names of wrappers, to compare it with that of another candidate."""
        return _without_wrappers(".".join([*self.keys, *self.prefix.split(".")]), _WRAPPERS)


def candidates(content: Any, own: Mapping[str, Tensor], classifiers: Sequence[str]) -> list[Candidate]:
    """Return all state dicts of a file that share names with a network, those of optimizers excepted.

    Args:
        content: The content of the file.
        own: The state dict of the network, whose classifier holds no parameters.
        classifiers: Qualified names of the network's classifiers, whose tensors in the file are left out.
    """
    classifiers = [_largest_removed(name, own) for name in classifiers]
    found = []
    for keys, named in _dicts_of_tensors(content):
        matched = _match(keys, named, "", own, classifiers)
        wrappers = _WRAPPERS - {part for name in own for part in name.split(".")}
        unwrapped = {_without_wrappers(name, wrappers): tensor for name, tensor in named.items()}
        if not any(c.fits for c in matched) and len(unwrapped) == len(named) and unwrapped.keys() != named.keys():
            inside = sorted({f"{part}." for name in named for part in name.split(".")[:-1] if part in wrappers})
            again = _match(keys, unwrapped, " and ".join(map(repr, inside)), own, classifiers)
            matched = again if any(c.fits for c in again) else matched
        found += matched
    return found


def _largest_removed(classifier: str, own: Iterable[str]) -> str:
    """Return the outermost module around a classifier that holds no tensors in the network either."""
    parent = classifier.rpartition(".")[0]
    if not parent or any(name.startswith(f"{parent}.") for name in own):
        return classifier
    return _largest_removed(parent, own)


def _dicts_of_tensors(content: Any, keys: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the tensors of each dict at any depth, with the keys that lead to it."""
    if not isinstance(content, Mapping) or len(keys) > _DEPTH or _OPTIMIZER.search(".".join(keys)):
        return
    named = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if named:
        yield keys, named
    for key, value in content.items():
        yield from _dicts_of_tensors(value, (*keys, str(key)))


def _without_wrappers(name: str, wrappers: set[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _match(
    keys: tuple[str, ...],
    named: Mapping[str, Tensor],
    inside: str,
    own: Mapping[str, Tensor],
    classifiers: Sequence[str],
) -> list[Candidate]:
    """Return a candidate for each prefix under which the dict has at least half of the network's names."""
    required = [name for name in own if not name.endswith("num_batches_tracked")]
    votes: Counter[str] = Counter()
    for name in named:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                votes[".".join([*parts[:i], ""])] += 1
    likely = [prefix for prefix, count in votes.items() if 2 * count >= len(required)] or [""]
    likely = [prefix for prefix in likely if not _OPTIMIZER.search(prefix)]
    complete = [prefix for prefix in likely if all(prefix + name in named for name in required)]
    result = []
    for prefix in likely:
        nested = tuple(other for other in complete if other != prefix and other.startswith(prefix))
        inner = {
            name.removeprefix(prefix): tensor
            for name, tensor in named.items()
            if name.startswith(prefix) and not (nested and name.startswith(nested))
        }
        count = named.get(f"{prefix.removesuffix('module.')}n_averaged") if prefix.endswith("module.") else None
        tensors = {
            name: tensor
            for name, tensor in inner.items()
            if name in own or not any(name.startswith(f"{classifier}.") for classifier in classifiers)
        }
        beside = [name for name in named if not name.startswith(prefix) and not name.endswith("n_averaged")]
        beside = [name for name in beside if not name.startswith(tuple(complete))]
        averaged = None if count is None or count.numel() != 1 else int(count)
        problems = _problems(tensors, own, required)
        result.append(Candidate(keys, prefix, inside, tensors, beside, problems, averaged))
    return result


def _problems(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], required: Sequence[str]
) -> tuple[tuple[str, list[str]], ...]:
    shapes, types = [], []
    for name in own.keys() & tensors.keys():
        given, wanted = tensors[name], own[name]
        if given.shape != wanted.shape:
            shapes.append(f"{name} is {tuple(given.shape)} in the file and {tuple(wanted.shape)} in the network")
        elif name.endswith("num_batches_tracked"):
            continue  # some programs average this counter too, and save a float
        elif given.is_meta or given.layout != torch.strided:
            types.append(f"{name} is {'without values' if given.is_meta else given.layout} in the file")
        elif given.is_floating_point() != wanted.is_floating_point():
            types.append(f"{name} is {given.dtype} in the file and {wanted.dtype} in the network")
    found = (
        ("missing", [name for name in required if name not in tensors]),
        ("not in this network", [name for name in tensors if name not in own]),
        ("of another shape", sorted(shapes)),
        ("of another type", sorted(types)),
    )
    return tuple((problem, names) for problem, names in found if names)


def choose(fitting: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Choose among the state dicts that fit, by the conventions of the programs that write such files.

    Returns:
        The chosen one, and why it was preferred, or an empty string.

    Raises:
        ValueError: Several differ, and no convention tells which one is meant; the message lists them.
    """
    usable = [c for c in fitting if c.averaged != 0]
    if not usable:
        raise ValueError("its average has averaged no weights yet (n_averaged is 0)")
    remaining = [c for c in usable if c.is_average] or usable
    passed_over = next((c for c in usable if c not in remaining), None) if len(remaining) < len(usable) else None
    reason = f"the average, not {passed_over.label}" if passed_over else ""
    for preferred, other, why in _CONVENTIONS:
        for candidate in list(remaining):
            counterpart = candidate.words.replace(preferred, other)
            losers = [c for c in remaining if c.words == counterpart and c.words != candidate.words]
            if losers:
                reason = reason or f"not {losers[0].label}: {why}"
                remaining = [c for c in remaining if c.words != counterpart]
    remaining = [c for i, c in enumerate(remaining) if not any(_same(c, before) for before in remaining[:i])]
    if len(remaining) > 1:
        raise ValueError(f"it holds several networks that fit: {'; '.join(c.label for c in remaining)}")
    chosen = remaining[0]
    return chosen, reason or ("the average" if chosen.is_average else "")


def _same(one: Candidate, other: Candidate) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def listed(problems: Sequence[tuple[str, list[str]]]) -> str:
    """List the first tensors of each problem."""
    return "; ".join(
        f"{len(names)} {problem}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for problem, names in problems
    )

"""Read a weights file without executing anything in it, and name a file that holds no weights for what it is."""

import re
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from typing_extensions import Self

SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".pth.tar")

_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file; fetch the file with 'git lfs pull'",
    b"<!doctype": "a web page, not the file; open the link in a browser, log in if needed, and download the file again",
    b"<html": "a web page, not the file; open the link in a browser, log in if needed, and download the file again",
    b"\x89hdf": "an HDF5 file, as Keras writes; only weights of PyTorch can be loaded",
    b"\x1f\x8b": "a gzip archive; unpack it, and give the file inside",
}
_SHOWN = 3
_TEXT_SHOWN = 40


class _Ignored:
    """Stand for an object beside the weights. It takes any arguments and any state, and keeps none of them."""

    def __new__(cls, *args: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# The reference scripts of torchvision and timm save their arguments beside the weights, and many programs a score of
# numpy. torch's restricted unpickler looks names up in a table and imports nothing:
# https://github.com/pytorch/pytorch/blob/v2.8.0/torch/_weights_only_unpickler.py, _get_user_allowed_globals. Here the
# table maps these names to the class above, so that neither argparse, pathlib nor numpy runs, and nothing of the file.
_IGNORED_OBJECTS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)


def read_weights_file(path: Path) -> Any:
    """Read the tensors of a file, and the dicts, lists, numbers and strings around them.

    Args:
        path: The file, in the format of torch.save or of safetensors, whatever its name.

    Raises:
        FileNotFoundError: The file does not exist.
        PermissionError: The user may not read it.
        ValueError: It is no regular file or of another format, is damaged, or cannot be read without executing code.
    """
    try:
        _check_regular_file(path)
        with path.open("rb") as file:
            head = file.read(512)
    except PermissionError as error:
        raise PermissionError(
            f"the weights file {str(path)!r} may not be read; ask its owner for the permission, or copy the file"
        ) from error
    _check_format(path, head)
    damaged = f"the weights file {str(path)!r} is cut short or damaged ({{}}): copy or download it again"
    try:
        if _is_safetensors(head):
            from safetensors.torch import load_file

            return load_file(path)
        if head.startswith(b"PK"):
            bad = _damaged_record(path)
            if bad is not None:
                raise ValueError(damaged.format(f"wrong checksum of {bad}"))
        with warnings.catch_warnings(), safe_globals([(_Ignored, name) for name in _IGNORED_OBJECTS]):
            warnings.simplefilter("ignore")  # on TorchScript and on the pickle's protocol, which the errors name
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if str(error).startswith("the weights file"):
            raise
        kind = _kind_of_pickle(path, error)
        if kind is not None:
            raise ValueError(
                f"the weights file {str(path)!r} {kind}, not tensors alone. Pickled objects are refused, since reading "
                "one can run any code. In the program that wrote it, save the tensors with "
                f"torch.save(model.state_dict(), '{path.name.partition('.')[0]}_weights.pth'), and give that file"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(damaged.format(f"{type(error).__name__}: {reason}")) from error


def _check_regular_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(
            f"the weights file {str(path)!r} does not exist (looked in {path.resolve().parent}); give the path of a "
            f"{', '.join(SUFFIXES)} file, the name of published weights, or None"
        )
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        example = f", for example of {inside[0]}" if inside else ""
        raise ValueError(f"the weights file {str(path)!r} is a folder; give the path of a file{example}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"the weights file {str(path)!r} is no regular file, but a pipe or a device; give a file")


def _check_format(path: Path, head: bytes) -> None:
    """Raise an error that names the file if it begins as no weights file does."""
    if not head:
        raise ValueError(f"the weights file {str(path)!r} is empty (0 bytes): copy or download it again")
    start = head.lstrip().lower()
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            raise ValueError(f"the weights file {str(path)!r} is {name}")
    if head[257:262] == b"ustar":
        raise ValueError(f"the weights file {str(path)!r} is a tar archive; unpack it, and give the file inside")
    text = head.decode("utf-8", errors="replace")
    if all(character.isprintable() or character.isspace() for character in text) and "\ufffd" not in text:
        shown = " ".join(text.split())[:_TEXT_SHOWN]
        raise ValueError(
            f"the weights file {str(path)!r} is a text file that begins with '{shown}', and holds no weights"
        )
    if not (head.startswith((b"PK", b"\x80")) or _is_safetensors(head)):
        raise ValueError(
            f"the weights file {str(path)!r} begins as no file of torch.save or safetensors does; it is of another "
            "kind, or damaged"
        )


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # after the length of the header


def _damaged_record(path: Path) -> str | None:
    """Return the first record of torch's zip archive whose CRC-32 is wrong; torch itself does not compare them."""
    with zipfile.ZipFile(path) as archive:
        # Without torch.serialization.set_crc32_options(True), the default, torch writes zeros.
        has_checksums = any(record.CRC for record in archive.infolist())
        return archive.testzip() if has_checksums else None


def _kind_of_pickle(path: Path, error: Exception) -> str | None:
    """Say what the restricted unpickler refused to build; None if the file is damaged."""
    if "TorchScript" in str(error):
        return "is a TorchScript program"
    try:
        found = set(get_unsafe_globals_in_checkpoint(path)) - set(_IGNORED_OBJECTS)
    except Exception:  # noqa: BLE001 - a file in the older format, or a damaged one
        found = set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        is_module = any(name.startswith("torch.nn.modules.") for name in found)
        kind = "holds a whole module" if is_module else "holds pickled objects"
        return f"{kind} ({', '.join(sorted(found)[:_SHOWN])}{more})"
    return "is a pickle of another kind than torch.save writes" if "Unsupported operand" in str(error) else None

"""Names in any script train on terminals and in locales that lack their characters, and files are UTF-8."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tl_lightning
from tests.cli.runs import BACKBONE, fit
from tests.doubles import image_folder

ROOT = Path(__file__).parents[2]


def test_characters_that_a_terminal_lacks_are_written_as_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(tmp_path / "photos", {"ämeise": 6, "蜂": 6})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    fit(photos, tmp_path / "runs")
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("cp1252")
    assert "2: ämeise, \\u8702\n" in printed


@pytest.mark.parametrize(
    ("locale", "shown"),
    [
        ({"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}, b"2: \xe4meise, \\u8702\n"),
        pytest.param(
            {"PYTHONUTF8": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
            "2: ämeise, 蜂\n".encode(),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
            rb"2: \udcc3\udca4meise, \udce8\udc9c\udc82",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fit_in_a_poor_locale_writes_its_files_in_utf_8(locale: dict[str, str], shown: bytes, tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", {"ämeise": 6, "蜂": 6})
    (tmp_path / "own.yaml").write_text("trainer: {default_root_dir: läufe}", encoding="utf-8")
    ascii_only = locale.get("LC_ALL") == "C" and locale["PYTHONUTF8"] == "0"
    options = [] if ascii_only else ["--config=own.yaml"]
    options += [
        "--data.root=photos",
        BACKBONE,
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--data.num_workers=0",
    ]
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-m", "tl_lightning", "fit", *options],
        cwd=tmp_path,
        env=os.environ | locale | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    runs = tmp_path / ("runs" if ascii_only else "läufe")
    config = (runs / "version_0" / "config.yaml").read_text(encoding="utf-8")
    assert f"default_root_dir: {runs.name}" in config


def test_text_files_are_opened_with_an_encoding() -> None:
    missing = []
    for file in Path(tl_lightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or "/proc" in ast.unparse(node) or "group" in ast.unparse(node):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = name in ("read_text", "write_text") or (name == "open" and '"b' not in ast.unparse(node))
            not_text = any(part in ast.unparse(node.func) for part in ("Image", "os.", "records"))
            modes = [value.value for value in node.args if isinstance(value, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            if text and not binary and not not_text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{file.name}:{node.lineno}")
    assert missing == []

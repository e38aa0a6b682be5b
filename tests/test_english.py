"""Docstrings and comments use plain words: the pronoun counted here makes a sentence a riddle."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def prose(file: Path) -> Iterator[str]:
    """Find the docstrings and comments of a Python file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value
    with file.open("rb") as lines:
        yield from (token.string for token in tokenize.tokenize(lines.readline) if token.type == tokenize.COMMENT)


def count_words(folder: str) -> tuple[int, int]:
    """Return how many words the docstrings and comments of a folder have, and how often the pronoun is among them."""
    words = [
        word.lower()
        for file in sorted((ROOT / folder).rglob("*.py"))
        for text in prose(file)
        for word in re.findall(r"[A-Za-z']+", text)
    ]
    return len(words), words.count("what")


def test_docstrings_and_comments_hardly_say_what() -> None:
    for folder in ("tl_lightning", "tests"):
        words, riddles = count_words(folder)
        assert words > 3_000, "the prose was found"
        assert riddles <= words / 1000, f"{folder}: {riddles} times in {words} words"


if __name__ == "__main__":
    for name in ("tl_lightning", "tests"):
        total, found = count_words(name)
        print(f"{name}: 'what' {found} times in {total} words, {1000 * found / total:.2f} in 1,000")

import functools

import pytest
import torch
from torch import nn

from tests.doubles import TinyBackbone
from tl_lightning.heads import LinearHead
from tl_lightning.utils import serialization


class Plain(serialization.InitArgsMixin, nn.Module):
    def __init__(self, first: int, *rest: int, option: str = "x", **more: float) -> None:
        super().__init__()
        self.seen = (first, rest, option, more)


@pytest.mark.parametrize("value", [1, "x", None, 2.5, [1, [2]], {"a": {3: True}}])
def test_primitives_come_back(value: object) -> None:
    assert serialization.from_config(serialization.to_config(value)) == value


def test_objects_are_made_again_from_what_they_were_made_of() -> None:
    plain = Plain(1, 2, 3, option="y", extra=0.5)
    again = serialization.from_config(serialization.to_config(plain))
    assert again.seen == (1, (2, 3), "y", {"extra": 0.5})
    backbone = serialization.from_config(serialization.to_config(TinyBackbone(seed=3)))
    assert isinstance(backbone, TinyBackbone)
    assert backbone.init_args == ((), {"seed": 3, "weights": "DEFAULT", "chance": 0.3})


def test_classes_and_partials_come_back() -> None:
    assert serialization.from_config(serialization.to_config(LinearHead)) is LinearHead
    again = serialization.from_config(serialization.to_config(functools.partial(LinearHead, dropout=0.3)))
    assert again(4, 2).dropout.p == 0.3


def test_description_is_primitive() -> None:
    described = serialization.to_config(
        {"head": functools.partial(LinearHead, dropout=0.3), "backbone": TinyBackbone()}
    )

    def check(value: object) -> None:
        assert isinstance(value, (dict, list, str, int, float, bool, type(None)))
        for item in (
            [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        ):
            check(item)

    check(described)


def test_what_no_checkpoint_could_bring_back_is_refused() -> None:
    class Local(nn.Module):
        pass

    for value in (lambda: None, Local, functools.partial(Local), nn.Linear(1, 1), len):
        with pytest.raises(ValueError, match="checkpoint"):
            serialization.to_config(value)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "antigravity.Module",
        "torch.load",
        "torch.nn.functional.relu",
        "torch.nope.Module",
    ],
)
def test_checkpoint_may_name_only_known_modules(path: str) -> None:
    with pytest.raises(ValueError, match="the checkpoint names"):
        serialization.known_class(path)


def test_known_classes() -> None:
    assert serialization.known_class("torch.nn.modules.linear.Linear") is torch.nn.Linear
    assert serialization.known_class("tests.doubles.TinyBackbone") is TinyBackbone  # imported above

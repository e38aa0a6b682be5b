import functools

import pytest
import torch
from torch import nn

from tests.doubles import TinyBackbone
from tl_lightning.heads import LinearHead
from tl_lightning.utils.serialization import InitArgsMixin, from_config, to_config, trusted_class, without_weights


class Recorded(InitArgsMixin, nn.Module):
    def __init__(self, first: int, *rest: int, option: str = "x", **more: float) -> None:
        super().__init__()
        self.seen = (first, rest, option, more)


@pytest.mark.parametrize("value", [1, "x", None, 2.5, [1, [2]], {"a": {3: True}}])
def test_primitives_come_back_as_they_are(value: object) -> None:
    assert from_config(to_config(value)) == value


def test_objects_are_rebuilt_from_their_arguments() -> None:
    rebuilt = from_config(to_config(Recorded(1, 2, 3, option="y", extra=0.5)))
    assert rebuilt.seen == (1, (2, 3), "y", {"extra": 0.5})
    backbone = from_config(to_config(TinyBackbone(seed=3)))
    assert isinstance(backbone, TinyBackbone)
    assert backbone.init_args == ((), {"seed": 3, "weights": "DEFAULT", "dropout": 0.3})


def test_backbone_is_rebuilt_without_loading_weights() -> None:
    configs = without_weights(to_config([{"backbone": TinyBackbone(seed=3)}]))
    assert from_config(configs)[0]["backbone"].init_args == ((), {"seed": 3, "weights": None, "dropout": 0.3})


def test_classes_and_partials_are_rebuilt() -> None:
    assert from_config(to_config(LinearHead)) is LinearHead
    rebuilt = from_config(to_config(functools.partial(LinearHead, dropout=0.3)))
    assert rebuilt(4, 2).dropout.p == 0.3


def test_config_consists_of_primitives() -> None:
    config = to_config({"head": functools.partial(LinearHead, dropout=0.3), "backbone": TinyBackbone()})

    def check(value: object) -> None:
        assert isinstance(value, (dict, list, str, int, float, bool, type(None)))
        for item in (
            [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        ):
            check(item)

    check(config)


def test_values_that_could_not_be_rebuilt_are_refused() -> None:
    class Local(nn.Module):
        pass

    for value in (lambda: None, Local, functools.partial(Local), nn.Linear(1, 1), len):
        with pytest.raises(ValueError, match="checkpoint"):
            to_config(value)


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
def test_checkpoint_may_name_only_trusted_module_classes(path: str) -> None:
    with pytest.raises(ValueError, match="the checkpoint names"):
        trusted_class(path)


def test_classes_of_trusted_packages_and_of_imported_modules_are_found() -> None:
    assert trusted_class("torch.nn.modules.linear.Linear") is torch.nn.Linear
    assert trusted_class("tests.doubles.TinyBackbone") is TinyBackbone  # imported above

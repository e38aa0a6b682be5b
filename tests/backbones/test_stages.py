"""Values that depend on the size of the images alone do not keep a network from being cut between its blocks."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.hrnet import HighResolutionNet
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.xcit import Xcit
from torch import Tensor, nn

from tests.doubles import TINY
from tl_lightning.backbones import TracedBackbone

SIDE = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many tiny operations are slow on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, table: Tensor, rows: int) -> Tensor:
        output: Tensor = tokens + self.dropout(self.linear(tokens * table)) / rows
        return output


class TableNet(nn.Module):
    """Blocks that all take a table made of the size of the patch grid, as rotary embeddings do."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.noise = noise
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.register_buffer("periods", torch.rand(6, generator=torch.Generator().manual_seed(0)), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.patches(images)
        n, c, rows, columns = patches.shape
        periods = self.get_buffer("periods")
        places = torch.arange(rows * columns, device=periods.device) / (rows * columns)
        table = (places[:, None] / periods[None]).sin()
        if self.noise and self.training:
            table = table + torch.rand_like(table)
        tokens = patches.reshape(n, c, -1).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, table, rows)
        return tokens.mean(1)


def traced(model: nn.Module) -> TracedBackbone:
    return TracedBackbone(model, "net", TINY.with_image_size(SIDE), timm.models.get_notrace_functions())  # type: ignore[no-untyped-call]


def dinov3() -> nn.Module:
    return Eva(
        img_size=SIDE, patch_size=8, num_classes=0, embed_dim=32, depth=5, num_heads=2, use_abs_pos_emb=False,
        use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True, num_reg_tokens=4,
        dynamic_img_size=True, init_values=1e-5, drop_path_rate=0.3, use_fc_norm=False,
    )  # fmt: skip


def naflexvit() -> nn.Module:
    cfg = NaFlexVitCfg(
        patch_size=8, embed_dim=32, depth=5, num_heads=2, reg_tokens=4, pos_embed_grid_size=(4, 4), global_pool="avg",
        drop_path_rate=0.3,
    )  # fmt: skip
    return NaFlexVit(cfg, num_classes=0)


def xcit() -> nn.Module:
    return Xcit(
        img_size=SIDE, patch_size=8, num_classes=0, embed_dim=32, depth=5, num_heads=2, eta=1.0, tokens_norm=True,
        drop_path_rate=0.3,
    )  # fmt: skip


def mvitv2() -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 2, 2, 1), embed_dim=(16, 32, 64, 128), num_heads=(1, 2, 4, 8))
    return MultiScaleVit(cfg, img_size=(64, 64), num_classes=0, drop_path_rate=0.3)


def hrnet() -> nn.Module:
    stages = [
        {"num_modules": 1, "num_branches": n, "block_type": "BASIC" if n > 1 else "BOTTLENECK", "num_blocks": (1,) * n,
         "num_channels": tuple(4 * 2**i for i in range(n)), "fuse_method": "SUM"}
        for n in (1, 2, 3, 4)
    ]  # fmt: skip
    cfg = {"stem_width": 8} | {f"stage{n}": stage for n, stage in enumerate(stages, 1)}
    return HighResolutionNet(cfg, num_classes=0)


BLOCKS = [f"blocks.{i}" for i in range(5)]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "table": (TableNet, BLOCKS),
    "dinov3": (dinov3, BLOCKS),
    "naflexvit": (naflexvit, BLOCKS),
    "xcit": (xcit, [*BLOCKS, "cls_attn_blocks.0", "cls_attn_blocks.1"]),
    "mvitv2": (mvitv2, [f"stages.{i}" for i in range(4)]),  # each stage passes on a tensor and its height and width
    "hrnet": (hrnet, ["conv2", "layer1", "transition1.0", "final_layer"]),  # a stage writes into the list that it gets
}


def images(batch: int, side: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_stages_and_are_cut_exactly(name: str) -> None:
    build, stages = NETWORKS[name]
    side = 64 if name == "mvitv2" else SIDE
    torch.manual_seed(0)
    backbone = TracedBackbone(
        build(),
        name,
        TINY.with_image_size(side),
        timm.models.get_notrace_functions(),  # type: ignore[no-untyped-call]
    )
    assert backbone.stages == ("stem", *stages)
    state = copy.deepcopy(backbone.state_dict())
    for training in (False, True):
        for batch in (2, 3):
            inputs = images(batch, side)
            outputs = []
            for parts in ((nn.Identity(), backbone), *map(backbone.split, backbone.stages)):
                backbone.load_state_dict(state)  # batch norm statistics
                backbone.train(training)
                torch.manual_seed(7)
                with torch.no_grad():
                    outputs.append(parts[1](parts[0](inputs)))
            for stage, output in zip(backbone.stages, outputs[1:], strict=True):
                assert torch.equal(output, outputs[0]), (stage, training, batch)


def test_suffix_has_the_gradients_of_the_whole_network() -> None:
    backbone = traced(dinov3()).eval()
    backbone(images(2)).square().sum().backward()
    expected = {name: p.grad for name, p in backbone.named_parameters()}
    backbone.zero_grad(set_to_none=True)
    prefix, suffix = backbone.split("blocks.2")
    with torch.no_grad():
        inputs = prefix(images(2))
    suffix(inputs).square().sum().backward()
    moved = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[2] for name in moved if ".blocks." in name} == {"2", "3", "4"}
    assert all(torch.equal(grad, expected[name]) for name, grad in moved.items())  # type: ignore[arg-type]


def test_prefix_refuses_images_of_another_size_where_the_suffix_needs_the_size() -> None:
    backbone = traced(dinov3()).eval()
    prefix, _ = backbone.split("blocks.2")
    assert backbone(images(2, 48)).shape == (2, 32)
    assert prefix(images(1)).shape == (1, 16 + 5, 32)
    for wrong in (images(2, 48), torch.randn(2, 3, 16, 64)):  # 16 x 64 pixels give as many patches
        with pytest.raises(ValueError, match="only images of the size in its preprocessing: sizes inside it are"):
            prefix(wrong)


def test_segments_follow_moves_and_copies_with_the_table() -> None:
    backbone = traced(dinov3()).eval()
    backbone.split("blocks.1")
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):  # noqa: S301 - our own bytes
        prefix, suffix = other.split("blocks.1")
        assert torch.equal(suffix(prefix(images(2))), backbone(images(2)))
    prefix, suffix = backbone.split("blocks.1")
    backbone.double()
    assert torch.equal(suffix(prefix(images(2).double())), backbone(images(2).double()))


def test_table_is_made_on_the_device_of_the_network() -> None:
    """The meta device stands for a GPU: operations on tensors of two devices fail."""
    backbone = traced(TableNet()).eval()
    prefix, suffix = backbone.split("blocks.2")
    backbone.to("meta")
    assert suffix(prefix(images(2).to("meta"))).shape == (2, 6)


def test_table_with_random_numbers_is_not_drawn_twice() -> None:
    backbone = traced(TableNet(noise=True))
    prefix, suffix = backbone.eval().split("stem")
    assert torch.equal(suffix(prefix(images(2))), backbone(images(2)))
    with pytest.raises(ValueError, match=r"net cannot be cut at 'blocks\.2' in train mode"):
        backbone.split("blocks.2")


class PixelCount(nn.Module):
    def forward(self, tensor: Tensor) -> tuple[Tensor, int]:
        return tensor, int((tensor > 0).sum())


class CountingNet(TableNet):
    """Passes on a whole number that depends on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = PixelCount()

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor
        tokens, count = self.count(self.patches(images).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, 1, count + 1)
        return tokens.mean(1)


def test_number_that_depends_on_pixels_is_no_size() -> None:
    backbone = traced(CountingNet()).eval()
    assert not any(f".{i}" in stage for i in range(1, 5) for stage in backbone.stages)
    for prefix, suffix in map(backbone.split, backbone.stages):
        assert torch.equal(suffix(prefix(images(2))), backbone(images(2)))


class Pair(list[Tensor]):
    pass


class AddPair(nn.Module):
    def forward(self, pair: Pair) -> Tensor:
        if not isinstance(pair, Pair):
            raise TypeError("no pair")
        return pair[0] + pair[1]


class PairNet(nn.Module):
    """Traces, but the trace does not run, since it turns the pair into a list."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 5, 5, 3) for i in range(4))
        self.add = AddPair()

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = conv(images)
        output: Tensor = self.add(Pair([images, images])).mean((2, 3))
        return output


def test_network_whose_trace_fails_works_as_a_whole() -> None:
    backbone = traced(PairNet()).eval()
    assert backbone.stages == ("stem",)
    assert torch.equal(backbone.split("stem")[1](images(2)), backbone(images(2)))
    with pytest.raises(ValueError, match=r"net works only as a whole: its forward cannot be traced \(no pair\)"):
        backbone.split("convs.1")

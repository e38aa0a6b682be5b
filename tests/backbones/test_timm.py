"""Networks of timm compute with their present weights."""

import pytest
import torch

from tl_lightning.backbones import TimmBackbone


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformer_l1", "efficientformerv2_s0"])
def test_attention_biases_in_eval_mode_follow_the_weights(name: str) -> None:
    """These networks keep the biases of the first pass, so that a loaded checkpoint was evaluated with stale ones."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, weights=None).eval()
    images = torch.randn(1, 3, *backbone.preprocessing.crop_shape)
    with torch.no_grad():
        before = backbone(images)
        state = {
            key: tensor + torch.randn_like(tensor) if key.endswith("attention_biases") else tensor
            for key, tensor in backbone.state_dict().items()
        }
        backbone.load_state_dict(state)
        loaded = backbone(images)
        backbone.model.train().eval()
        assert torch.equal(loaded, backbone(images))
    assert not torch.equal(loaded, before)

import pytest
import torch
from torch import nn

from editrl.errors import EditrlError
from editrl.rewards.aesthetic import Aesthetic
from editrl.rewards.backbone import load_backbone


class MLP(nn.Module):
    """LAION's improved aesthetic predictor as published, with another input size."""

    def __init__(self, size):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


@pytest.fixture(params=["mlp", "linear"])
def head(request):
    torch.manual_seed(0)
    return MLP(24) if request.param == "mlp" else nn.Linear(24, 1)


def test_the_score_is_the_heads_on_the_clip_embedding(head, tiny_clip, clips, tmp_path):
    torch.save(head.state_dict(), tmp_path / "head.pth")
    network = (head.layers if isinstance(head, MLP) else head).eval()
    backbone = load_backbone(tiny_clip)
    with torch.no_grad():
        wanted = [network(backbone.embed_frames(clip)).mean().item() for clip in clips]
        scores = Aesthetic(str(tmp_path / "head.pth"), tiny_clip)(clips)
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert len(set(scores)) == 3


def test_the_error_says_how_to_get_the_weights(tiny_clip, tmp_path):
    with pytest.raises(EditrlError, match=r"has no weights: download sac\+logos\+ava1-l14-linearMSE.pth"):
        Aesthetic()
    torch.save({"layers.0.weight": torch.zeros(5, 24), "layers.0.bias": torch.zeros(5)}, tmp_path / "other.pth")
    with pytest.raises(EditrlError, match=r"its layers \[\[5, 24\]\] do not end in one number"):
        Aesthetic(str(tmp_path / "other.pth"))
    for content in (b"", b"no weights at all"):
        (tmp_path / "junk.pth").write_bytes(content)
        with pytest.raises(EditrlError, match=r"junk\.pth' is no aesthetic head"):
            Aesthetic(str(tmp_path / "junk.pth"))
    torch.save({"encoder.weight": torch.zeros(5)}, tmp_path / "model.pth")
    with pytest.raises(EditrlError, match="is no aesthetic head"):
        Aesthetic(str(tmp_path / "model.pth"))


def test_a_head_of_another_clip_is_refused(tiny_clip, clips, tmp_path):
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(EditrlError, match=r"the aesthetic head reads 768 numbers, .* gives 24"):
        Aesthetic(str(tmp_path / "head.pth"), tiny_clip)(clips)

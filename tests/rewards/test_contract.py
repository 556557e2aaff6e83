"""Every built-in reward keeps the contract that `editrl rewards check` checks."""

import pytest
import torch
from torchvision.models import alexnet

from editrl.reward_check import check_reward
from editrl.rewards.aesthetic import Aesthetic
from editrl.rewards.clip import ClipFrameConsistency, ClipInstruction, ClipSourceFidelity
from editrl.rewards.expression import Expression
from editrl.rewards.pickscore import PickScore
from editrl.rewards.preservation import PreservationLPIPS, preservation, preservation_ssim


def lpips(clip, folder):
    """With the first weights of AlexNet and of the heads."""
    torch.manual_seed(0)
    convolutions = dict(enumerate(alexnet(weights=None).features))
    state = {}
    for k, i in enumerate((0, 3, 6, 8, 10)):
        state |= {f"net.slice{k + 1}.{i}.{kind}": value.data for kind, value in convolutions[i].named_parameters()}
        state[f"lin{k}.model.1.weight"] = torch.rand(1, convolutions[i].out_channels, 1, 1)
    torch.save(state, folder / "lpips.pth")
    return PreservationLPIPS(str(folder / "lpips.pth"))


def aesthetic(clip, folder):
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(24, 1).state_dict(), folder / "head.pth")
    return Aesthetic(str(folder / "head.pth"), clip)


def combined(clip, folder):
    members = {"delta": ClipInstruction(clip), "psnr": preservation}
    return Expression("min(delta, 0.3) + 0.01 * psnr", rewards=members)


@pytest.mark.filterwarnings("ignore:CLIP .* reads 16 tokens")  # the tiny one
@pytest.mark.parametrize(
    "make",
    [
        lambda clip, _: ClipInstruction(clip),
        lambda clip, _: ClipInstruction(clip, form="full"),
        lambda clip, _: ClipInstruction(clip, form="directional"),
        lambda clip, _: ClipSourceFidelity(clip),
        lambda clip, _: ClipFrameConsistency(clip),
        lambda clip, _: PickScore(clip),
        lambda clip, _: preservation,
        lambda clip, _: preservation_ssim,
        lpips,
        aesthetic,
        combined,
    ],
)
def test_a_built_in_reward_keeps_the_contract(make, tiny_clip, tmp_path):
    findings = check_reward(make(tiny_clip, tmp_path), slow=5)
    assert [finding for finding in findings if finding.verdict in ("fail", "warn")] == []

"""Preservation outside the mask, against scikit-image and against LPIPS built from torchvision's AlexNet."""

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import interpolate
from torchvision.models import alexnet

from editrl.errors import EditrlError
from editrl.reward import RewardSet
from editrl.rewards.preservation import PreservationLPIPS, preservation, preservation_ssim

SLICES = {"slice1": [0], "slice2": [3], "slice3": [6], "slice4": [8], "slice5": [10]}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(5)
    source = interpolate(torch.rand(3, 3, 6, 8, generator=generator), (36, 48), mode="bilinear")
    return (source + 0.1 * torch.randn(source.shape, generator=generator)).clamp(0, 1), source


@pytest.fixture(scope="module")
def alex():
    torch.manual_seed(0)
    return alexnet(weights=None).features.eval()


@pytest.fixture(scope="module")
def lpips_file(alex, tmp_path_factory):
    """Random weights in the layout of `lpips.LPIPS(net="alex").state_dict()`."""
    state = {
        f"net.{part}.{i}.{kind}": getattr(alex[i], kind) for part, (i,) in SLICES.items() for kind in ("weight", "bias")
    }
    generator = torch.Generator().manual_seed(1)
    for k, (i,) in enumerate(SLICES.values()):
        state[f"lin{k}.model.1.weight"] = torch.rand(1, alex[i].out_channels, 1, 1, generator=generator)
    file = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save({name: value.detach() for name, value in state.items()}, file)
    return str(file)


def no_mask(video):
    return torch.zeros_like(video[:, :1])


def test_psnr_and_ssim_are_those_of_scikit_image(pair):
    edited, source = pair
    masks = [no_mask(source)]
    assert preservation([edited], [source], masks) == pytest.approx(
        [peak_signal_noise_ratio(source.double().numpy(), edited.double().numpy(), data_range=1.0)], abs=1e-6
    )
    frames = [
        structural_similarity(
            x.double().numpy(),
            y.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(edited, source, strict=True)
    ]
    assert preservation_ssim([edited], [source], masks) == pytest.approx([sum(frames) / len(frames)], abs=1e-6)


def test_lpips_is_the_distance_of_alexnets_features(pair, alex, lpips_file):
    edited, source = pair
    lin = torch.load(lpips_file, weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((v * 2 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for v in (edited, source))
    wanted, k = torch.zeros(len(x)), 0
    with torch.no_grad():
        for layer in alex[:12]:  # without the last pooling
            x, y = layer(x.clone()), layer(y.clone())
            if isinstance(layer, torch.nn.ReLU):
                units = [v / v.norm(dim=1, keepdim=True).clamp(min=1e-10) for v in (x, y)]
                wanted += ((units[0] - units[1]) ** 2 * lin[f"lin{k}.model.1.weight"]).sum(1).mean((1, 2))
                k += 1
        scores = PreservationLPIPS(lpips_file)([edited], [source], [no_mask(source)])
    assert k == 5
    assert scores == pytest.approx([-wanted.mean().item()], abs=1e-5)


@pytest.fixture(params=["psnr", "ssim", "lpips"])
def metric(request, lpips_file):
    return {"psnr": preservation, "ssim": preservation_ssim}.get(request.param) or PreservationLPIPS(lpips_file)


def test_what_happens_inside_the_mask_does_not_count_and_outside_it_does(metric, pair):
    _, source = pair
    mask = no_mask(source)
    mask[:, :, 8:24, 10:30] = 1
    inside, outside, both = source.clone(), source.clone(), source.clone()
    for clip, rows in ((inside, slice(8, 24)), (outside, slice(26, 34))):
        clip[:, :, rows, 10:30] = 1 - clip[:, :, rows, 10:30]
    both[:, :, 8:24, 10:30], both[:, :, 26:34] = inside[:, :, 8:24, 10:30], outside[:, :, 26:34]
    scores = metric([source, inside, outside, both], [source] * 4, [mask] * 4)
    assert scores[0] == scores[1] == {preservation: 100.0, preservation_ssim: pytest.approx(1.0)}.get(metric, 0.0)
    assert scores[2] == scores[3] < scores[0]


def test_without_a_mask_or_with_nothing_left_out_it_does_not_apply(metric, pair):
    edited, source = pair
    masks = [None, torch.ones_like(source[:, :1]), no_mask(source)]
    scores = metric([edited] * 3, [source] * 3, masks)
    assert scores[:2] == [None, None] and scores[2] is not None
    assert metric([edited], [source]) == [None]
    assert RewardSet([metric]).requires == {"source_videos"}


def test_scores_do_not_depend_on_the_batch(metric, pair):
    edited, source = pair
    videos = [edited, edited[:1], source.flip(-1), source[:, :, :32, :33]]
    sources = [source, source[:1], source, edited[:, :, :32, :33]]
    masks = [no_mask(video) for video in videos]
    together = metric(videos, sources, masks)
    assert together == [metric([v], [s], [m])[0] for v, s, m in zip(videos, sources, masks, strict=True)]
    assert metric(videos[::-1], sources[::-1], masks[::-1]) == together[::-1]


def test_shapes_that_do_not_fit_are_named(metric, pair):
    edited, source = pair
    with pytest.raises(EditrlError, match=r"clip 0, its source and its mask are \[2, 3, 36, 48\], \[3, 3, 36, 48\]"):
        metric([edited[:2]], [source], [no_mask(source)])


def test_a_frame_below_the_window_of_ssim_is_refused():
    clip = torch.zeros(1, 3, 8, 40)
    with pytest.raises(EditrlError, match=r"window of 11 pixels, the frames are \[8, 40\]"):
        preservation_ssim([clip], [clip], [clip[:, :1]])


def test_a_frame_too_small_for_alexnet_is_refused(lpips_file):
    clip = torch.zeros(1, 3, 30, 40)
    with pytest.raises(EditrlError, match=r"LPIPS needs frames of 31 pixels or more, these are \[30, 40\]"):
        PreservationLPIPS(lpips_file)([clip], [clip], [clip[:, :1]])


def test_lpips_says_how_to_get_its_weights(tmp_path):
    with pytest.raises(EditrlError, match="has no weights: where there is a network, `pip install lpips`"):
        PreservationLPIPS()
    for content in (b"", b"no weights at all"):
        (tmp_path / "junk.pth").write_bytes(content)
        with pytest.raises(EditrlError, match=r"junk\.pth' holds no LPIPS weights"):
            PreservationLPIPS(str(tmp_path / "junk.pth"))
    torch.save({"net": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(EditrlError, match=r"other.pth' holds no LPIPS weights \(KeyError"):
        PreservationLPIPS(str(tmp_path / "other.pth"))

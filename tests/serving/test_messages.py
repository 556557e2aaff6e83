"""A request that was packed and unpacked is the same request, bit for bit; what is no request is told why."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from editrl.errors import EditrlError
from editrl.serving.messages import HEADER, VERSION, pack, unpack


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_any_float32_comes_back_bit_for_bit(values):
    video = torch.tensor(values, dtype=torch.float32).repeat(3).view(1, 3, 1, -1)
    columns, _ = unpack(pack({"videos": [video]}, ""))
    assert same_bits(columns["videos"][0], video)


def test_decoded_clips_travel_as_bytes_and_come_back_exactly():
    grey = (torch.arange(256, dtype=torch.uint8).float() / 255).repeat(3).view(1, 3, 16, 16)
    body = pack({"videos": [grey]}, "")
    assert len(body) < grey.nbytes / 2
    assert same_bits(unpack(body)[0]["videos"][0], grey)
    almost = grey.clone()
    almost[0, 0, 3, 3] = torch.nextafter(almost[0, 0, 3, 3], torch.tensor(1.0))
    assert same_bits(unpack(pack({"videos": [almost]}, ""))[0]["videos"][0], almost)


def test_the_layout_in_memory_comes_back_too():
    """A policy's clips are cut from [B,C,F,H,W]; the mean of a contiguous copy differs in the last bits."""
    videos = [*torch.rand(2, 3, 5, 8, 8).transpose(1, 2), torch.rand(5, 8, 8, 3).permute(0, 3, 1, 2)]
    grey = (torch.arange(60).float() / 255).view(5, 2, 2, 3).permute(0, 3, 1, 2)
    back = unpack(pack({"videos": [*videos, grey]}, ""))[0]["videos"]
    for one, other in zip([*videos, grey], back, strict=True):
        assert same_bits(one, other) and one.stride() == other.stride()


def test_everything_else_comes_back_too():
    video, source = torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8)
    columns = {
        "videos": [video, video[1:3]],  # a view: shares memory
        "source_videos": [source, source],
        "masks": [None, (torch.rand(5, 1, 8, 8) > 0.5).float()],
        "bytes": [torch.arange(4, dtype=torch.uint8), torch.tensor(3, dtype=torch.int64)],
        "half": [torch.rand(2).half(), torch.tensor([-0.0, 0.0])],
        "instructions": ["ein Hut", "帽子"],
        "boxes": [{"x": [1, 2.5]}, None],
    }
    back, request_id = unpack(pack(columns, "r1"))
    assert request_id == "r1" and back.keys() == columns.keys()
    assert back["instructions"] == columns["instructions"] and back["boxes"] == columns["boxes"]
    for name in ("videos", "source_videos", "masks", "bytes", "half"):
        for one, other in zip(columns[name], back[name], strict=True):
            assert one is other is None or same_bits(one, other), name
    assert back["source_videos"][0] is back["source_videos"][1], "what a group shares travels once"


@pytest.mark.parametrize("value", [object(), float("nan"), {"x": {1, 2}}])
def test_what_json_does_not_have_is_refused_by_name(value):
    with pytest.raises(EditrlError, match="column 'notes' cannot be sent to a reward server"):
        pack({"videos": [torch.rand(1, 3, 2, 2)], "names": ["a"], "notes": [value]}, "")


def test_a_column_of_two_kinds_is_refused():
    with pytest.raises(EditrlError, match="column 'masks' has tensors and, for sample 1, a str"):
        pack({"videos": [torch.rand(1, 3, 2, 2)] * 2, "masks": [torch.rand(1), "x"]}, "")


def message(**changes) -> dict:
    return {"version": VERSION, "tensors": {"videos": ["0"]}, "scaled": [], "orders": {}, "values": {}} | changes


def request(header, tensors=None) -> bytes:
    tensors = {"0": torch.rand(1, 3, 2, 2)} if tensors is None else tensors
    return save(tensors, {HEADER: header if isinstance(header, str) else json.dumps(header)})


BAD = {
    "nothing": (b"", "its header does not fit"),
    "a header longer than the body": ((10**12).to_bytes(8, "little") + b"{}", "its header does not fit"),
    "a header that is no JSON": ((4).to_bytes(8, "little") + b"{}{}", "no readable 'editrl' metadata"),
    "another safetensors file": (save({"0": torch.rand(2)}), "no readable 'editrl' metadata"),
    "metadata that is no JSON": (request("{"), "no readable 'editrl' metadata"),
    "metadata nested without end": (request("[" * 100_000), "no readable 'editrl' metadata"),
    "metadata that is a list": (request([]), "metadata is a list"),
    "a body cut short": (request(message())[:-5], "is no safetensors file"),
    "another version": (request(message(version=99)), "version 99, this server reads 2"),
    "no tensors": (request(message(tensors=None)), "'tensors' is a NoneType"),
    "a missing tensor": (request(message(tensors={"videos": ["7"]})), "refers to the tensor '7'"),
    "no list": (request(message(tensors={"videos": "0"})), "'videos' is a str; it must be a list"),
    "a scaled float": (request(message(scaled=["0"])), "names '0', which is no uint8 tensor"),
    "no order": (request(message(orders={"0": [0, 1, 1, 2]})), "[0, 1, 1, 2] of '0', which is no order"),
    "an order of nothing": (request(message(orders={"7": [0]})), "of '7', which is no order"),
    "no videos": (request(message(tensors={})), "no 'videos' to score"),
    "columns of other lengths": (request(message(values={"ids": ["a", "b"]})), "'ids' has 2 values for 1 videos"),
    "a clip of another shape": (request(message(), {"0": torch.rand(3, 2, 2)}), "video 0 is torch.float32 [3, 2, 2]"),
    "a clip that is none": (request(message(tensors={"videos": [None]})), "video 0 is NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_request_is_told_why(case):
    body, phrase = BAD[case]
    with pytest.raises(EditrlError) as raised:
        unpack(body)
    assert phrase in str(raised.value)

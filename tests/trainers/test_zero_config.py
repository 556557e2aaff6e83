"""`deepspeed` takes names, and every name is a configuration that DeepSpeed and transformers understand."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from peft import LoraConfig, get_peft_model
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from editrl.errors import EditrlError
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer, zero

NAMES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


@pytest.fixture(autouse=True)
def no_trace():
    """transformers and accelerate remember DeepSpeed in the environment and in a global: other tests want neither."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    unset_hf_deepspeed_config()


def sft(deepspeed) -> FlowSFTConfig:
    return FlowSFTConfig("unused", deepspeed=deepspeed, use_cpu=True, report_to="none")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_packaged_configuration_whose_open_values_transformers_fills_in(name):
    args = sft(name)
    assert args.deepspeed["zero_optimization"]["stage"] == NAMES[name]
    filled = args.hf_deepspeed_config.config
    assert filled["train_micro_batch_size_per_gpu"] == args.per_device_train_batch_size
    assert filled["gradient_clipping"] == args.max_grad_norm
    assert filled["bf16"]["enabled"] is False
    assert "auto" not in json.dumps(filled)


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key_of_a_named_configuration(name):
    """It takes unknown ones of `zero_optimization` for mistakes only now and then."""
    given = zero.read_config(name)["zero_optimization"]
    fields = DeepSpeedZeroConfig.model_fields
    assert set(given) <= set(fields) | {field.alias for field in fields.values()}
    assert DeepSpeedZeroConfig(**given).stage == NAMES[name]


def test_every_packaged_file_is_named_here():
    assert {path.stem for path in zero.PACKAGED.glob("*.json")} == set(NAMES)


def test_ones_own_file_or_dict_stays_as_it_is(tmp_path):
    mine = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(mine))
    assert zero.read_config(str(file)) == str(file)
    assert zero.read_config(mine) == mine
    assert zero.read_config(None) is None
    assert sft(str(file)).hf_deepspeed_config.config["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "zero4",
            r"deepspeed is 'zero4', which is no file; .* zero1, zero2, zero3, zero3_offload\. Did you mean 'zero",
        ),
        ("zero_3_offload", "Did you mean 'zero3_offload'"),
        ({"zero_optimization": {"stage": 3}}, "saves no weights that can be loaded; set it to true"),
        ("{broken", r"deepspeed: '\{broken' is no JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, message):
    with pytest.raises(EditrlError, match=message):
        sft(given)


def test_a_process_without_a_launcher_gets_what_a_launcher_sets(monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    monkeypatch.setattr(zero.os, "environ", environment)
    zero.stand_alone()
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environment["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_launchers_environment_is_left_alone(monkeypatch, name):
    environment = {name: "3"}
    monkeypatch.setattr(zero.os, "environ", environment)
    zero.stand_alone()
    assert environment == {name: "3"}


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    zero.require_one_group(2)
    with pytest.raises(EditrlError, match="2 processes were started, but each would train by itself"):
        zero.require_one_group(1)


@pytest.mark.parametrize(
    ("free", "fits"),
    [(33.9, False), (34.1, True)],  # 26 GiB of weights, and 8 of 80 GiB to spare
)
def test_weights_are_gathered_where_they_leave_a_tenth_of_the_memory(monkeypatch, free, fits):
    gib = 2**30
    parameter = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    parameter.ds_numel = 13 * gib
    engine = SimpleNamespace(module=SimpleNamespace(parameters=lambda: [parameter]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((free - 6) * gib), 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * gib)  # 6 of them are torch's cache
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 24 * gib)
    assert zero.gathering_fits(engine, torch.device("cuda"))[0] is fits
    assert zero.gathering_fits(engine, torch.device("cpu"))[0]


def test_merged_weights_need_room_beside_the_others(monkeypatch):
    base = torch.nn.Sequential(torch.nn.Linear(2**10, 2**10, bias=False))
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["0"]))
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**20, 5 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    engine, device = SimpleNamespace(module=model), torch.device("cuda")  # 4 MiB, to be merged 8
    assert zero.gathering_fits(engine, device)[0]
    assert not zero.gathering_fits(engine, device, merged=True)[0]


def test_sft_under_zero3_has_nothing_to_compile(fresh_policy, pairs):
    policy, args = fresh_policy(), sft("zero3")
    args.compile_blocks = True
    with pytest.raises(EditrlError, match="under ZeRO-3 compile_blocks compiles rollouts, and SFT has none"):
        FlowSFTTrainer(policy, args, pairs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fp8_base", True, "fp8_base keeps every block's weights whole, .* use ZeRO-2"),
        ("activation_memory", "1", "activation_memory plans with whole weights .* use gradient_checkpointing"),
    ],
)
def test_what_needs_whole_weights_is_refused_under_zero3(fresh_policy, pairs, field, value, message):
    policy, args = fresh_policy(), sft("zero3")
    args.use_cpu = False
    setattr(args, field, value)
    with pytest.raises(EditrlError, match=message):
        FlowSFTTrainer(policy, args, pairs)


def test_one_pass_is_refused_under_zero3(fresh_policy, pairs):
    policy, batch = fresh_policy(), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    args = FlowGRPOConfig("unused", deepspeed="zero3", use_cpu=True, num_generations=2, report_to="none", **batch)
    args.one_pass = True
    with pytest.raises(EditrlError, match="one_pass needs whole weights, which ZeRO-3 does not keep; use ZeRO-2"):
        FlowGRPOTrainer(policy, [lambda videos: [0.0] * len(videos)], args, pairs)


def test_use_cpu_does_not_turn_deepspeed_off_in_silence(fresh_policy, pairs):
    with pytest.raises(EditrlError, match="use_cpu turns DeepSpeed off"):
        FlowSFTTrainer(fresh_policy(), sft("zero2"), pairs)

"""The switches for speed and memory, through whole runs: what is trained stays what it was."""

import copy

import pytest
import torch

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.trainers import FlowGRPOConfig


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


@pytest.fixture
def bfloat16_policy() -> HunyuanVideoPolicy:
    return HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"), dtype="bfloat16")


def test_kept_activations_change_nothing(grpo, sft, weights):
    """1 GiB is plenty for a tiny editor, 1e-9 is nothing."""
    for make in (lambda **changes: grpo([brightness], **changes), sft):
        plain = make()
        plain.train()
        for memory in ("1", "1e-9"):
            trainer = make(activation_memory=memory)
            trainer.train()
            for name, value in weights(plain).items():
                torch.testing.assert_close(weights(trainer)[name], value, rtol=0, atol=1e-5)


def test_kept_activations_under_autocast(grpo, updates, bfloat16_policy):
    """Autocast keeps what it casts: counting a block's footprint must leave nothing behind."""
    trainer = grpo([brightness], policy=bfloat16_policy, bf16=True, activation_memory="1")
    trainer.train()
    assert [log["ratio/deviation"] for log in updates(trainer)] == [0, 0]
    assert all(log["grad_norm"] > 0 for log in updates(trainer))


def test_parked_models_change_nothing(grpo, fresh_policy, weights, equal):
    trained = []
    for park in (False, True):
        trainer = grpo([brightness], policy=fresh_policy(), park_frozen=park)
        trainer.train()
        trained.append(weights(trainer))
    assert equal(*trained)


def test_merged_adapters_sample_and_are_gone_afterwards(grpo, updates, bfloat16_policy):
    frozen = {n: p.clone() for n, p in bfloat16_policy.transformer.named_parameters()}
    trainer = grpo([brightness], policy=bfloat16_policy, bf16=True, merge_adapter=True, max_steps=3)
    trainer.train()
    assert [log["ratio/deviation"] for log in updates(trainer)] == [0, 0, 0]
    base = trainer.model.get_base_model()
    for name, parameter in base.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


def test_merged_adapters_sample_as_unmerged_ones(grpo):
    """The first rollout after an update, whose adapters are not zero; float32."""
    kept = []
    for merge in (False, True):
        seen = []
        trainer = grpo(
            [lambda videos, seen=seen, **kwargs: seen.append(videos) or brightness(videos)],
            merge_adapter=merge,
            learning_rate=1e-2,
        )
        trainer.train()
        kept.append(torch.stack(list(seen[-1])))
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=1e-4)


def test_fp8_base_is_one_model_in_sampling_and_training(grpo, updates, bfloat16_policy):
    trainer = grpo([brightness], policy=bfloat16_policy, bf16=True, fp8_base=True)
    trainer.train()
    assert [log["ratio/deviation"] for log in updates(trainer)] == [0, 0]
    assert updates(trainer)[-1]["grad_norm"] > 0


@pytest.mark.slow
def test_compiled_blocks_start_with_a_ratio_of_one(grpo, updates):
    """The window of the rollout and the update share a graph; without gradient it is another.

    This is the test with Inductor's own code; it learns what eager blocks learn.
    """
    fast = {"compile_blocks": True, "activation_memory": "1", "merge_adapter": True}
    eager, compiled = (grpo([brightness], beta=0.1, **changes) for changes in ({}, fast))
    for trainer in (eager, compiled):
        trainer.train()
    assert [log["ratio/deviation"] for log in updates(compiled)] == [0, 0]
    assert [log["kl"] > 0 for log in updates(compiled)] == [False, True], "the first update is the reference's own"
    for expected, found in zip(updates(eager), updates(compiled), strict=True):
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_the_whole_transformer_can_still_be_compiled(editor):
    """As users of the pipeline do; other than the blocks alone it is one graph."""
    torch._dynamo.reset()
    config = editor.transformer.config
    compiled = torch.compile(editor.transformer, backend="eager")
    for length in (5, 7):
        inputs = {
            "hidden_states": torch.randn(1, 2 * config.in_channels, 2, 4, 4),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, length, config.text_embed_dim),
            "encoder_attention_mask": None,
            "pooled_projections": torch.randn(1, config.pooled_projection_dim),
            "guidance": torch.tensor([1000.0]),
        }
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).sample, editor.transformer(**inputs).sample)


@pytest.mark.slow
def test_instructions_of_different_lengths_share_a_graph(grpo, updates, pairs, quick_compiler):
    """A clip a micro-batch: were there a graph for the first length and one for any, the ratio might not be 1."""
    lengths = {len(pairs.row(index)["instruction"].split()) for index in range(len(pairs))}
    assert len(lengths) > 1
    trainer = grpo(
        [brightness],
        compile_blocks=True,
        activation_memory="1",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        max_steps=1,
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer.train()
    assert [log["ratio/deviation"] for log in updates(trainer)] == [0]
    # Each for a class of blocks: sampled; trained, where checkpointing makes one of its own inside.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2 + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_memory": "some"}, "activation_memory is 'some'; give GiB, or auto"),
        ({"activation_memory": "-1"}, "activation_memory is '-1'; give GiB, or auto"),
        ({"activation_memory": "8", "gradient_checkpointing": True}, "drop gradient_checkpointing"),
        ({"torch_compile": True}, "use compile_blocks"),
        ({"merge_adapter": True, "fp8_base": True}, "drop merge_adapter"),
        ({"compile_blocks": True, "old_log_prob": "recompute"}, "drop old_log_prob"),
        ({"compile_blocks": True, "context_parallel": 2}, "compile_blocks does not go with context_parallel"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(EditrlError, match=message):
        FlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_fp8_base_without_lora_is_refused(grpo):
    with pytest.raises(EditrlError, match="fp8_base is for frozen weights under LoRA"):
        grpo([brightness], peft=None, fp8_base=True)
    with pytest.raises(EditrlError, match="merge_adapter needs LoRA"):
        grpo([brightness], peft=None, merge_adapter=True)


@pytest.fixture
def policy_with_vae(fresh_policy):
    """() -> a policy whose VAE is its own as well: a compiled one stays compiled."""

    def make() -> HunyuanVideoPolicy:
        policy = fresh_policy()
        policy.vae = copy.deepcopy(policy.vae)
        return policy

    return make


def test_a_compiled_decoder_decodes_what_an_eager_one_does(grpo, policy_with_vae, quick_compiler):
    seen = []
    for compiled in (False, True):
        policy = policy_with_vae()
        reward = lambda videos, **kwargs: seen.append(torch.stack(videos)) or brightness(videos)  # noqa: E731
        grpo([reward], policy=policy, compile_vae=compiled, max_steps=1).train()
        assert (policy.vae.decoder._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-4)


def test_a_vae_without_the_part_is_told(grpo, fresh_policy):
    policy = fresh_policy()
    policy.decoding_modules = list
    with pytest.raises(EditrlError, match="has a part 'decoder'; drop it"):
        grpo([brightness], policy=policy, compile_vae=True)


def test_a_compiled_encoder_encodes_what_an_eager_one_does(sft, policy_with_vae, updates, quick_compiler):
    losses = []
    for compiled in (False, True):
        policy = policy_with_vae()
        trainer = sft(policy=policy, compile_vae=compiled, max_steps=1)
        trainer.train()
        assert (policy.vae.encoder._compiled_call_impl is not None) == compiled
        losses.append(updates(trainer)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

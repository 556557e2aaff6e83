"""FlowGRPOConfig and FlowSFTConfig: how batch sizes follow from each other, and what is refused."""

from dataclasses import fields

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from editrl.errors import EditrlError
from editrl.flow import get_kernel, sigma_schedule, timestep_weights
from editrl.trainers import FlowGRPOConfig, FlowSFTConfig

few = st.integers(1, 6)


def grpo(**changes) -> FlowGRPOConfig:
    """2 groups of 4 clips, 2 trained steps: 16 pairs in 2 micro-batches, one update."""
    settings = {
        "output_dir": "unused",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "num_generations": 4,
        "generation_batch_size": 8,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_inference_steps": 6,
        "sde_window_size": 2,
    }
    return FlowGRPOConfig(**settings | changes)


def message_of(**changes) -> str:
    with pytest.raises(EditrlError) as caught:
        grpo(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- batch sizes -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(micro_batch=few, micro_batches=few, members=st.integers(2, 6), window=few, passes=few, data=st.data())
def test_sizes_agree(micro_batch, micro_batches, members, window, passes, data):
    """A rollout of G clips makes G * window pairs; each is trained on once a pass, in micro-batches of one size."""
    clips = micro_batch * micro_batches
    assume(clips % members == 0)
    steps_per_generation = micro_batches * window
    divisors = [n for n in range(1, steps_per_generation * passes + 1) if steps_per_generation * passes % n == 0]
    accumulation = data.draw(st.sampled_from(divisors))
    shared = {
        "num_generations": members,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "num_inference_steps": 20,
        "sde_window_size": window,
        "num_iterations": passes,
    }
    by_clips = grpo(**shared, generation_batch_size=clips)
    by_steps = grpo(**shared, generation_batch_size=None, steps_per_generation=steps_per_generation)
    for config in (by_clips, by_steps):
        assert config.generation_batch_size == clips
        assert config.steps_per_generation == steps_per_generation
        assert config.groups_per_generation * members == clips
        pairs_a_pass = config.steps_per_generation * micro_batch
        assert pairs_a_pass == clips * window
        assert config.updates_per_generation * accumulation == steps_per_generation * passes


def test_steps_per_generation_defaults_to_one_on_policy_update():
    config = grpo(generation_batch_size=None, gradient_accumulation_steps=4)
    assert config.steps_per_generation == 4
    assert config.generation_batch_size == 16
    assert config.updates_per_generation == 1


@pytest.mark.parametrize(
    ("changes", "updates"),
    [({}, 1), ({"gradient_accumulation_steps": 1}, 2), ({"num_iterations": 3}, 3), ({"num_iterations": 2}, 2)],
)
def test_updates_per_generation(changes, updates):
    assert grpo(**changes).updates_per_generation == updates


# -- the window --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(2, 30), window=st.integers(1, 30))
def test_the_default_window_is_the_first_half_but_large_enough(steps, window):
    assume(window < steps)
    start, stop = grpo(
        num_inference_steps=steps,
        sde_window_size=window,
        generation_batch_size=8,
        gradient_accumulation_steps=window,
    ).sde_window_range
    assert (start, stop) == (0, max(steps // 2, window))
    assert stop - start >= window
    # Every step of the range can be trained by every kernel: cps has no noise on the last one.
    for kernel in ("flow_sde", "dance_sde", "cps"):
        assert timestep_weights(get_kernel(kernel), sigma_schedule(steps), range(start, stop)).isfinite().all()


def test_a_window_range_is_kept():
    assert grpo(sde_window_range=[1, 5]).sde_window_range == [1, 5]


@pytest.mark.parametrize("window", [[0, 6], [-1, 3], [2, 3], [4, 2]])
def test_a_window_range_outside_the_schedule_or_too_small_is_refused(window):
    assert message_of(sde_window_range=window) == (
        f"sde_window_range {window} must lie within [0, 5] (num_inference_steps - 1) and hold sde_window_size 2 steps"
    )


@pytest.mark.parametrize("window", [[1], [0, 2, 4]])
def test_a_window_range_has_two_ends(window):
    assert "sde_window_range" in message_of(sde_window_range=window)


def test_a_window_of_all_steps_is_refused():
    assert "sde_window_size 6" in message_of(sde_window_size=6, gradient_accumulation_steps=6)


# -- objective ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "epsilon"), [("grpo", 1e-4), ("grpo_guard", 2e-6)])
def test_the_clip_range_defaults_to_that_of_the_objective(loss_type, epsilon):
    assert grpo(loss_type=loss_type).epsilon == epsilon
    assert grpo(loss_type=loss_type, epsilon=0.01).epsilon == 0.01


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_generations", "num_iterations", "num_inference_steps", "sde_window_size"])
def test_counts_start_at_one(name):
    assert message_of(**{name: 0}) == f"{name} must be at least 1, got 0"


def test_a_group_of_one_is_refused():
    assert message_of(num_generations=1) == "num_generations must be at least 2: a group of one has no advantage"


def test_both_sizes_of_a_rollout_are_refused():
    assert message_of(steps_per_generation=2) == (
        "set generation_batch_size or steps_per_generation, not both: each follows from the other"
    )


def test_pairs_that_do_not_divide_by_the_window_are_refused():
    message = message_of(generation_batch_size=None, steps_per_generation=3, per_device_train_batch_size=5)
    assert message == (
        "per_device_train_batch_size * processes * steps_per_generation = 15 must be a multiple of sde_window_size 2"
    )


def test_groups_that_do_not_fill_a_rollout_are_refused():
    assert message_of(num_generations=3) == "generation_batch_size 8 must be a multiple of num_generations 3"


def test_micro_batches_that_do_not_repeat_the_rollouts_batches_are_refused():
    message = message_of(per_device_train_batch_size=16)
    assert message.startswith(
        "generation_batch_size 8 must be a multiple of per_device_train_batch_size * processes = 16"
    )


def test_updates_that_straddle_rollouts_are_refused():
    assert message_of(gradient_accumulation_steps=3) == (
        "steps_per_generation * num_iterations = 2 must be a multiple of gradient_accumulation_steps 3"
    )


def test_a_checkpoint_in_the_middle_of_a_rollout_is_refused():
    changes = {"num_iterations": 2, "save_strategy": "steps"}
    assert message_of(**changes, save_steps=5).startswith("save_steps 5 must be a multiple of the 2 updates a rollout")
    assert grpo(**changes, save_steps=6).save_steps == 6


def test_a_negative_mask_weight_is_refused():
    with pytest.raises(EditrlError, match=r"^mask_weight must be at least 0, got -1$"):
        FlowSFTConfig(output_dir="unused", use_cpu=True, report_to="none", mask_weight=-1)


CHOICES = [
    (config, field.name, field.metadata["choices"])
    for config in (FlowSFTConfig, FlowGRPOConfig)
    for field in fields(config)
    if field.name in config.__annotations__ and "choices" in field.metadata
]


@pytest.mark.parametrize(("config", "name", "choices"), CHOICES, ids=[name for _, name, _ in CHOICES])
def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(config, name, choices):
    """Else a typo would silently be the default, or fail hours later."""
    shared = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    sizes = {} if config is FlowSFTConfig else {"generation_batch_size": 16}
    config(**shared, **sizes, **{name: choices[-1]})
    with pytest.raises(EditrlError) as caught:
        config(**shared, **sizes, **{name: choices[0] + "x"})
    for word in (name, choices[0] + "x", *choices):
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [FlowSFTConfig, FlowGRPOConfig])
def test_every_field_has_a_line_of_help(config):
    ours = [field for field in fields(config) if field.name in config.__annotations__]
    assert ours
    for field in ours:
        assert field.metadata["help"], field.name
        assert "\n" not in field.metadata["help"], field.name

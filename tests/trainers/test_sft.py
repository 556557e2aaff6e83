"""FlowSFTTrainer: the loss that is defined, on pairs of any size, and what is refused before training."""

import math

import pytest
import torch

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes

PAIRS = rows(sample_scenes(6, seed=3))


def dataset(count=4, **changes) -> EditDataset:
    return EditDataset([row | changes for row in PAIRS[:count]])


def images_and_videos() -> EditDataset:
    """Two clips of 5 frames, an image and a clip of one size more, in no order."""
    media = ("source", "target", "mask")
    image = PAIRS[2] | {key: PAIRS[2][key][:1] for key in media}
    wide = PAIRS[3] | {key: torch.cat([PAIRS[3][key]] * 2, dim=3) for key in media}
    return EditDataset([image, PAIRS[0], wide, PAIRS[1]])


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def untrained(editor):
    """The editor's transformer with random weights, so that there is much to learn whatever it knew."""
    torch.manual_seed(5)
    return type(editor.transformer).from_config(editor.transformer.config)


def test_the_loss_falls(sft, editor, fresh_policy):
    pairs = dataset(4)
    trainer = sft(
        policy=fresh_policy(untrained(editor)),
        dataset=pairs,
        evaluate=pairs,
        max_steps=15,
        eval_strategy="steps",
        eval_steps=15,
        eval_on_start=True,
    )
    trainer.train()
    start, end = (log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert end < 0.8 * start
    assert len(losses(trainer)) == 15
    assert all("grad_norm" in log for log in trainer.state.log_history if "loss" in log)


# -- the loss ----------------------------------------------------------------------------------------------------------


def evaluated(sft, **settings) -> float:
    pairs = settings.pop("pairs")
    return sft(dataset=pairs, evaluate=pairs, **settings).evaluate()["eval_loss"]


def test_the_mask_weighs_the_error_inside_it(sft):
    """mean of (1 + w M) error: with M = 1 it is 1 + w times the plain loss, without a mask the plain loss."""
    everywhere = dataset(mask=torch.ones(5, 1, 32, 32, dtype=torch.uint8))
    plain = evaluated(sft, pairs=everywhere, mask_weight=0.0)
    assert evaluated(sft, pairs=everywhere, mask_weight=2.0) == pytest.approx(3 * plain, rel=1e-5)
    for nowhere in (dataset(mask=torch.zeros(5, 1, 32, 32, dtype=torch.uint8)), dataset(mask=None)):
        assert evaluated(sft, pairs=nowhere, mask_weight=2.0) == pytest.approx(plain, rel=1e-5)


def test_the_loss_is_linear_in_the_mask_weight(sft):
    plain, once, thrice = (evaluated(sft, pairs=dataset(), mask_weight=weight) for weight in (0.0, 1.0, 3.0))
    assert plain < once < 2 * plain, "the masks cover a part of the clips"
    assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-4)


@torch.no_grad()
def test_the_loss_is_the_error_of_the_velocity_on_the_line_from_noise_to_target(sft, editor):
    """Seen from outside: what the model was given and what it answered, for one pair."""
    pairs = dataset(1)
    trainer = sft(dataset=pairs, evaluate=pairs, mask_weight=0.0)
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(kwargs, velocity=output[0])

    trainer.model.register_forward_hook(keep, with_kwargs=True)
    loss = trainer.evaluate()["eval_loss"]
    clean = editor.encode_videos(pairs[0].target[None])
    source = editor.encode_videos(pairs[0].source[None])
    latents, condition = seen["hidden_states"].tensor_split(2, dim=1)
    torch.testing.assert_close(condition, source)
    sigma = seen["timestep"].item() / 1000
    assert 0 < sigma < 1
    noise = (latents - (1 - sigma) * clean) / sigma
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    assert loss == pytest.approx((seen["velocity"] - (noise - clean)).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("sampling", "density"),
    [("logit_normal", lambda u: torch.special.ndtr(torch.logit(u))), ("uniform", lambda u: u)],
    ids=["logit_normal", "uniform"],
)
def test_noise_levels_have_their_density_and_are_shifted(sft, sampling, density):
    trainer = sft(timestep_sampling=sampling, shift=3.0)
    sigma = torch.cat([trainer._sigmas(range(64), step) for step in range(32)])
    unshifted = sigma / (3 - 2 * sigma)
    cumulative = density(unshifted.sort().values)
    uniform = (torch.arange(len(sigma)) + 0.5) / len(sigma)
    assert (cumulative - uniform).abs().max() < 1.95 / math.sqrt(len(sigma)), "Kolmogorov-Smirnov, one in a thousand"


def test_evaluation_repeats_itself_also_with_dropout(sft, lora):
    trainer = sft(evaluate=dataset(), peft=lora(lora_dropout=0.5), learning_rate=0.05, max_steps=2)
    trainer.train()
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second


# -- sizes and caching -------------------------------------------------------------------------------------------------


def test_images_and_videos_of_several_sizes_share_a_batch(sft):
    pairs = images_and_videos()
    trainer = sft(dataset=pairs, evaluate=pairs)
    together = trainer.evaluate()["eval_loss"]
    one_by_one = sft(dataset=pairs, evaluate=pairs, per_device_eval_batch_size=1).evaluate()["eval_loss"]
    assert together == pytest.approx(one_by_one, rel=1e-4)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert trainer.evaluate()["eval_loss"] != together


def test_cached_conditions_give_the_same_losses(sft):
    pairs = images_and_videos()
    courses = []
    for cached in (False, True):
        trainer = sft(
            dataset=pairs,
            evaluate=dataset(2),
            max_steps=4,
            learning_rate=1e-4,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=2,
            cache_conditions=cached,
        )
        trainer.train()
        courses.append(losses(trainer) + [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    assert len(courses[0]) == 6
    assert courses[1] == pytest.approx(courses[0], abs=1e-6, rel=1e-5)


def test_a_cached_example_is_encoded_once(sft, fresh_policy, monkeypatch):
    policy, encoded = fresh_policy(), []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda examples: encoded.extend(e.id for e in examples) or encode(examples))
    trainer = sft(policy=policy, dataset=dataset(4), max_steps=4, cache_conditions=True)
    trainer.train()
    assert sorted(encoded) == sorted(row["id"] for row in PAIRS[:4])


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_the_whole_transformer_is_trained_and_nothing_else(sft, editor, weights):
    frozen = {n: p.clone() for module in editor.frozen_modules() for n, p in module.state_dict().items()}
    trainer = sft()
    before = weights(trainer)
    trainer.train()
    changed = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in changed} >= {"x_embedder", "context_embedder", "proj_out"}
    for name, value in {n: p for module in editor.frozen_modules() for n, p in module.state_dict().items()}.items():
        assert torch.equal(value, frozen[name]), name


def test_with_a_lora_the_base_stays(sft, lora, editor):
    trainer = sft(peft=lora())
    trainer.train()
    base = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    for name, value in editor.transformer.state_dict().items():
        assert torch.equal(base[name], value), name


def test_a_saved_model_loads_as_a_policys_transformer(sft, editor, weights):
    trainer = sft(max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = type(editor.transformer).from_pretrained(trainer.args.output_dir, subfolder="transformer")
    trained = weights(trainer)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["dataset", "evaluate"])
def test_a_pair_without_a_target_is_refused_before_training(sft, split):
    without = EditDataset([PAIRS[0], PAIRS[1] | {"target": None}])
    with pytest.raises(EditrlError, match=f"row '{PAIRS[1]['id']}' has no target"):
        sft(**{split: without})


@pytest.mark.parametrize(("logging_steps", "save_steps"), [(1, 1), (10, 1), (10, 10)])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_checkpoint(
    sft, fresh_policy, monkeypatch, tmp_path, logging_steps, save_steps
):
    """Also where it would not be logged before the checkpoint is written, or at all."""
    policy = fresh_policy()
    velocity = policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda *args: velocity(*args) * math.nan)
    trainer = sft(
        policy=policy,
        output_dir=str(tmp_path),
        logging_steps=logging_steps,
        save_strategy="steps",
        save_steps=save_steps,
    )
    with pytest.raises(EditrlError, match="the loss is nan at step"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/complete"))


# -- condition dropout -------------------------------------------------------------------------------------------------


def test_a_share_of_the_examples_trains_without_its_instruction(sft, monkeypatch):
    trainer = sft(condition_dropout=0.3)
    drawn = [trainer._dropped(index, step) for index in range(50) for step in range(40)]
    assert abs(sum(drawn) / len(drawn) - 0.3) < 0.03
    assert drawn == [trainer._dropped(index, step) for index in range(50) for step in range(40)]
    encoded, encode = [], trainer.policy.encode

    def watched(examples, unconditional=False):
        encoded.append((unconditional, len(examples)))
        return encode(examples, unconditional)

    monkeypatch.setattr(trainer.policy, "encode", watched)
    trainer.train()
    assert sum(number for _, number in encoded) == 3 * 4
    assert 0 < sum(number for unconditional, number in encoded if unconditional) < 3 * 4


def test_an_evaluation_drops_no_instruction(sft, pairs, monkeypatch):
    trainer = sft(condition_dropout=0.9, evaluate=pairs)
    asked, encode = set(), trainer.policy.encode

    def watched(examples, unconditional=False):
        asked.add(unconditional)
        return encode(examples, unconditional)

    monkeypatch.setattr(trainer.policy, "encode", watched)
    trainer.evaluate()
    assert asked == {False}


def test_condition_dropout_needs_the_encoders(sft):
    with pytest.raises(EditrlError, match="cached conditions all have their instruction"):
        sft(condition_dropout=0.1, cache_conditions=True)

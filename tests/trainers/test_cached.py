"""Training from a conditions cache: the same run as without, and no encoder in it."""

import copy

import pytest
import torch

from editrl.cache import CachedRows, ConditionsCache, fill
from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import TASKS, sample_scenes

TRAIN = [
    row | {"id": str(number)} for number, task in enumerate(TASKS) for row in rows(sample_scenes(1, 2, tasks=[task]))
]
HELDOUT = rows(sample_scenes(2, seed=5))


@pytest.fixture(scope="module")
def train() -> EditDataset:
    """One pair of each kind of edit, an image, and a pair without mask."""
    image = TRAIN[0] | {key: TRAIN[0][key][:1] for key in ("source", "target", "mask")} | {"id": "image"}
    return EditDataset([*TRAIN, image, TRAIN[1] | {"mask": None, "id": "unmasked"}])


@pytest.fixture(scope="module")
def clips() -> EditDataset:
    """Of one size, as GRPO wants them."""
    return EditDataset(TRAIN)


@pytest.fixture(scope="module")
def heldout() -> EditDataset:
    return EditDataset(HELDOUT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, editor, train, clips, heldout) -> str:
    """All of them, encoded one by one, as trainers do that take one example at a time."""
    opened = ConditionsCache(tmp_path_factory.mktemp("cache"), editor.fingerprint())
    fill(opened, editor, [train, clips, heldout], batch_size=1)
    return str(opened.folder)


@pytest.fixture
def bare():
    """() -> a policy whose encoders are not loaded."""
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"), encoders=False)
    assert len(policy.frozen_modules()) == 1
    return lambda: copy.deepcopy(policy)


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def log(trainer) -> list[dict]:
    """What was logged, but for the seconds."""
    timing = ("seconds", "runtime", "per_second", "total_flos")
    return [{k: v for k, v in entry.items() if not any(t in k for t in timing)} for entry in trainer.state.log_history]


# -- the same run ------------------------------------------------------------------------------------------------------


def evaluated(make, **settings):
    """A trainer that has trained and evaluated."""
    trainer = make(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kept", [False, True], ids=["from the disk", "kept in memory"])
def test_sft_gives_the_same_losses_and_weights(sft, train, heldout, cache, weights, equal, kept):
    settings = {"dataset": train, "evaluate": heldout, "max_steps": 8, "per_device_train_batch_size": 1}
    without = evaluated(sft, **settings)
    with_cache = evaluated(sft, conditions_cache=cache, cache_conditions=kept, **settings)
    assert log(with_cache) == log(without)
    assert equal(weights(with_cache), weights(without))
    assert with_cache.evaluate(train) == without.evaluate(train)


def test_sft_of_larger_batches_differs_by_rounding_only(sft, train, heldout, cache, updates):
    settings = {"dataset": train, "evaluate": heldout, "max_steps": 4, "per_device_train_batch_size": 4}
    without, with_cache = evaluated(sft, **settings), evaluated(sft, conditions_cache=cache, **settings)
    losses = [[update["loss"] for update in updates(trainer)] for trainer in (with_cache, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


ONE_GROUP = {"generation_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 3}


@pytest.mark.parametrize("loss_type", ["grpo", "nft"])
def test_grpo_gives_the_same_log_and_weights(grpo, clips, heldout, cache, weights, equal, loss_type):
    settings = {"dataset": clips, "evaluate": heldout, "loss_type": loss_type, "timesteps_per_sample": 2} | ONE_GROUP
    without = evaluated(lambda **options: grpo([brightness], **options), **settings)
    with_cache = evaluated(lambda **options: grpo([brightness], conditions_cache=cache, **options), **settings)
    assert log(with_cache) == log(without)
    assert equal(weights(with_cache), weights(without))
    assert any("eval_rewards/brightness/mean" in entry for entry in log(with_cache))


# -- without encoders --------------------------------------------------------------------------------------------------


def test_sft_needs_neither_encoders_nor_vae_nor_clips(sft, fresh_policy, bare, train, heldout, cache, monkeypatch):
    settings = {"dataset": train, "evaluate": heldout, "max_steps": 2, "conditions_cache": cache}
    whole = evaluated(sft, policy=fresh_policy(), **settings)
    policy = bare()
    trainer = sft(policy=policy, eval_strategy="steps", eval_steps=1, **settings | {"per_device_eval_batch_size": 1})
    assert list(trainer.frozen_modules()) == [], "nothing but the transformer goes to the GPU"
    policy.vae = None
    monkeypatch.setattr(EditDataset, "__getitem__", None)
    trainer.train()
    assert log(trainer) == log(whole)


def test_grpo_needs_no_encoders(grpo, fresh_policy, bare, clips, heldout, cache):
    settings = {"dataset": clips, "evaluate": heldout, "conditions_cache": cache} | ONE_GROUP
    whole, trainer = (
        evaluated(lambda **options: grpo([brightness], **options), policy=policy, **settings)
        for policy in (fresh_policy(), bare())
    )
    assert log(trainer) == log(whole)


def test_without_encoders_and_without_a_cache_the_error_says_what_to_give(sft, bare, train):
    trainer = sft(policy=bare(), dataset=train)
    with pytest.raises(EditrlError, match=r"without its encoders .* give conditions_cache"):
        trainer.train()


def test_an_example_kept_in_memory_is_read_from_the_disk_once(sft, clips, cache, monkeypatch):
    read, find = [], CachedRows.__getitem__
    monkeypatch.setattr(CachedRows, "__getitem__", lambda rows, index: read.append(index) or find(rows, index))
    sft(dataset=clips, max_steps=6, conditions_cache=cache, cache_conditions=True).train()
    assert sorted(read) == list(range(len(clips)))


# -- what is refused before training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize("split", ["dataset", "evaluate"])
def test_a_missing_row_is_told_before_training(request, clips, heldout, cache, kind, split):
    make = request.getfixturevalue(kind)
    more = EditDataset([*HELDOUT, TRAIN[0] | {"id": "new", "instruction": "turn everything green"}])
    settings = {"dataset": clips, "evaluate": heldout} | {split: more}
    rewards = [[brightness]] if kind == "grpo" else []
    message = r"lacks 1 of \d+ rows: row 2 \(id 'new'\): .*\. Fill it with `editrl precompute --config RECIPE --cond"
    with pytest.raises(EditrlError, match=message):
        make(*rewards, conditions_cache=cache, **settings)


def test_a_data_set_given_to_evaluate_is_checked_too(sft, grpo, clips, cache):
    new = EditDataset(rows(sample_scenes(1, seed=77)))
    for trainer in (
        sft(dataset=clips, conditions_cache=cache),
        grpo([brightness], dataset=clips, conditions_cache=cache),
    ):
        with pytest.raises(EditrlError, match=r"lacks 1 of 1 rows: row 0 .* is not in the cache"):
            trainer.evaluate(new)


def test_conditions_of_another_model_are_refused(sft, clips, cache):
    other = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"), hidden_layer=-2)
    with pytest.raises(EditrlError, match=r"the model changed \(instructor\)"):
        sft(policy=other, dataset=clips, conditions_cache=cache)


def test_a_folder_that_is_not_there_is_told_with_the_command_that_fills_it(sft, tmp_path):
    with pytest.raises(EditrlError, match=r"there is no folder '.*none'; fill it with `editrl precompute --config "):
        sft(conditions_cache=str(tmp_path / "none"))


def test_a_policy_that_cannot_be_cached_is_refused(sft, fresh_policy, monkeypatch, cache):
    monkeypatch.setattr(HunyuanVideoPolicy, "fingerprint", FlowPolicy.fingerprint)
    with pytest.raises(EditrlError, match="HunyuanVideoPolicy cannot be cached"):
        sft(conditions_cache=cache)


def test_a_damaged_example_stops_the_run(sft, clips, editor, tmp_path):
    opened = ConditionsCache(tmp_path / "cache", editor.fingerprint())
    fill(opened, editor, [clips])
    [shard] = (tmp_path / "cache").glob("*.safetensors")
    contents = bytearray(shard.read_bytes())
    contents[-1000:] = bytes(1000)
    shard.write_bytes(contents)
    trainer = sft(dataset=clips, conditions_cache=str(tmp_path / "cache"), max_steps=4)
    with pytest.raises(EditrlError, match=rf"{shard.name}: example '\d' is damaged"):
        trainer.train()


def test_the_trainers_own_policy_still_encodes(grpo, clips, cache):
    """Only the copy that stands in for it reads the cache."""
    trainer = grpo([brightness], dataset=clips, conditions_cache=cache)
    reader = trainer.encoder(clips)
    assert reader is not trainer.policy and reader.transformer is trainer.policy.transformer
    assert torch.equal(reader.encode([clips[0]]).source_latents, trainer.policy.encode([clips[0]]).source_latents)

"""The watchdog: silent while edits are edits, loud when pictures are wiped for a reward, unchanged by a resume."""

import math

import pytest
import torch
from transformers import TrainerControl, TrainerState

from editrl.errors import EditrlError
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers.watchdog import PREFIX, SYMPTOMS, Watchdog, band
from editrl.watchdog import WATCHDOG, measure


class Run:
    """Stands in for the trainer: logs an evaluation, then calls `on_evaluate`."""

    def __init__(self, watchdog: Watchdog | None = None, state: TrainerState | None = None):
        self.watchdog = watchdog or Watchdog()
        self.state, self.control = state or TrainerState(), TrainerControl()
        self.watchdog.on_train_begin(None, self.state, self.control)

    def evaluate(self, prefix: str = "eval", **measures: tuple[float, float]) -> list[str]:
        """Each measure is (mean, std). Returns the names of the measures outside."""
        metrics = {}
        for name, (mean, std) in measures.items():
            metrics[f"{prefix}_watchdog/{name}/mean"], metrics[f"{prefix}_watchdog/{name}/std"] = mean, std
        self.state.log_history.append({**metrics, "epoch": 0.1, "step": self.state.global_step})
        self.watchdog.on_evaluate(None, self.state, self.control, metrics=metrics)
        self.state.log_history.append({"loss": 0.1, "step": self.state.global_step})
        self.state.global_step += 10
        return list(self.watchdog.outside)

    def show(self, videos: list[torch.Tensor], sources: list[torch.Tensor]) -> list[str]:
        """Evaluate clips, as the trainer does."""
        measures = {}
        for name, values in measure(videos, sources).items():
            known = values[~values.isnan()]
            mean, std = (known.mean().item(), known.std(correction=0).item()) if len(known) else (math.nan, math.nan)
            measures[name] = (mean, std)
        return self.evaluate(**measures)


# -- the planted hack --------------------------------------------------------------------------------------------------

OBJECT_TASKS = ("recolour", "reshape", "add", "reference")  # their masks hold the edited shape alone


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[torch.Tensor]]:
    """Sources, targets and masks of 64 held-out scenes of every task."""
    return clips_of(sample_scenes(64, seed=1, split="heldout"))


@pytest.fixture(scope="module")
def object_edits() -> dict[str, list[torch.Tensor]]:
    return clips_of(sample_scenes(64, seed=1, split="heldout", tasks=OBJECT_TASKS))


def clips_of(scenes) -> dict[str, list[torch.Tensor]]:
    data = rows(scenes)
    clips = {name: [row[name].float() / 255 for row in data] for name in ("source", "target")}
    return clips | {"mask": [row["mask"].float() for row in data]}


def wiped(clip: torch.Tensor, mask: torch.Tensor, progress: float) -> torch.Tensor:
    """All but the edited shape fades into one plain colour, that of the corner."""
    return clip.lerp(clip.where(mask.bool(), clip[..., :1, :1]), progress)


def planted_reward(clips: list[torch.Tensor]) -> float:
    """Likes calm pictures, as a hacked judge might; knows nothing of the instruction."""
    return sum(1 - clip.std(dim=(2, 3)).mean().item() for clip in clips) / len(clips)


def test_a_reward_that_rises_by_wiping_the_background_is_found_out(object_edits, caplog):
    sources, targets, masks = object_edits["source"], object_edits["target"], object_edits["mask"]
    run, rewards, outside = Run(), [], []
    for progress in (0, 0.25, 0.5, 0.75, 1):
        clips = [wiped(clip, mask, progress) for clip, mask in zip(targets, masks, strict=True)]
        rewards.append(planted_reward(clips))
        outside.append(run.show(clips, sources))
    assert rewards == sorted(set(rewards)), "by its reward each evaluation is better than the last"
    assert not outside[0]
    assert {"edge_density", "colour_entropy"} <= set(outside[-1])
    for name in ("edge_density", "colour_entropy"):
        value, low, _ = run.watchdog.outside[name]
        assert value < low
        (warning,) = (warning for warning in caplog.messages if warning.startswith(f"watchdog: {name} is"))
        assert "wiped backgrounds" in warning


@pytest.mark.parametrize(
    ("spoil", "measure_of_it"),
    [
        (lambda clip: (1.5 * clip + 0.3).clamp(0, 1), "exposure"),
        (lambda clip: clip + 0.15 * (torch.arange(32) % 4 < 2) * (1 - 2 * clip), "edge_density"),
        (lambda clip: clip * torch.tensor([1.0, 0.6, 1.0, 0.6, 1.0]).view(-1, 1, 1, 1), "temporal_flicker"),
        (lambda clip: clip.mean((0, 2, 3), keepdim=True).expand_as(clip), "colour_entropy"),
        (lambda clip: clip[..., :1, :1].expand_as(clip), "edge_density"),
        (lambda clip: 1 - clip, "source_similarity"),
    ],
    ids=["over-exposed", "grid", "flicker", "one colour", "nothing but background", "negative"],
)
def test_every_other_hack_on_record_leaves_a_band_too(scenes, caplog, spoil, measure_of_it):
    run = Run()
    assert not run.show(scenes["target"], scenes["source"])
    assert measure_of_it in run.show([spoil(clip) for clip in scenes["target"]], scenes["source"])
    assert any(f"watchdog: {measure_of_it} is" in warning for warning in caplog.messages)


def test_learning_to_edit_stays_inside(scenes, caplog):
    """From an editor that leaves half of the clips as they were to one that edits them all."""
    sources, targets = scenes["source"], scenes["target"]
    run = Run()
    for edited in (0.5, 0.75, 1):
        clips = [targets[k] if k % 8 < 8 * edited else sources[k] for k in range(len(sources))]
        assert not run.show(clips, sources)
    assert not caplog.messages


def test_correct_edits_stay_inside_the_band_of_unedited_clips(object_edits, caplog):
    run = Run()
    assert not run.show(object_edits["source"], object_edits["source"])
    assert not run.show(object_edits["target"], object_edits["source"])
    assert not caplog.messages


def test_images_are_watched_without_flicker(scenes, caplog):
    sources, targets = ([clip[:1] for clip in scenes[name]] for name in ("source", "target"))
    run = Run()
    assert not run.show(targets, sources)
    assert "exposure" in run.show([torch.ones_like(clip) for clip in targets], sources)
    assert "temporal_flicker" not in run.watchdog.outside


# -- the band ----------------------------------------------------------------------------------------------------------


def test_the_band_is_an_effect_size_with_a_tenth_of_the_mean_as_its_least_width():
    assert band(0.5, 0.4, tolerance=0.5) == pytest.approx((0.3, 0.7))
    assert band(0.5, 0.4, tolerance=1.0) == pytest.approx((0.1, 0.9))
    assert band(0.5, 0.02, tolerance=0.5) == pytest.approx((0.45, 0.55))
    assert band(0.0, 0.0, tolerance=0.5) == pytest.approx((-1 / 255, 1 / 255))


def test_the_band_is_around_the_first_evaluation_not_the_last_one():
    run = Run()
    courses = [run.evaluate(exposure=(mean, 0.2)) for mean in (0.5, 0.55, 0.59, 0.61, 0.39, 0.41)]
    assert courses == [[], [], [], ["exposure"], ["exposure"], []]


@pytest.mark.parametrize(("tolerance", "outside"), [(0.5, ["exposure"]), (2.0, [])])
def test_the_tolerance_sets_its_width(tolerance, outside):
    run = Run(Watchdog(tolerance=tolerance))
    run.evaluate(exposure=(0.5, 0.2))
    assert run.evaluate(exposure=(0.7, 0.2)) == outside


def test_outside_says_value_and_band():
    run = Run()
    run.evaluate(exposure=(0.5, 0.2), edge_density=(0.1, 0.05))
    run.evaluate(exposure=(0.9, 0.1), edge_density=(0.1, 0.05))
    assert run.watchdog.outside == {"exposure": (0.9, pytest.approx(0.4), pytest.approx(0.6))}


def test_a_measure_that_did_not_apply_at_first_gets_its_band_when_it_does():
    run = Run()
    run.evaluate(exposure=(0.5, 0.2), temporal_flicker=(math.nan, math.nan))
    run.evaluate(exposure=(0.5, 0.2), temporal_flicker=(0.02, 0.01))
    assert run.evaluate(exposure=(0.5, 0.2), temporal_flicker=(0.04, 0.01)) == ["temporal_flicker"]
    assert run.evaluate(exposure=(0.5, 0.2)) == []


def test_every_measure_has_its_symptoms():
    assert list(SYMPTOMS) == list(WATCHDOG)


# -- the warning -------------------------------------------------------------------------------------------------------


def test_a_warning_says_in_one_line_what_where_and_what_to_do(caplog):
    run = Run()
    run.evaluate(colour_entropy=(2.0, 0.4))
    run.evaluate(colour_entropy=(1.25, 0.4))
    (warning,) = caplog.messages
    assert "\n" not in warning
    for part in ("colour_entropy is 1.25 at step 10", "below its band of 1.8 to 2.2", "(2, step 0)", "cartoon look"):
        assert part in warning
    for advice in ("Look at the videos", "learning_rate", "beta", "fidelity"):
        assert advice in warning


def test_both_sides_of_every_band_have_their_own_symptom(caplog):
    for name, (low, high) in SYMPTOMS.items():
        for mean, symptom in ((0.1, low), (0.9, high)):
            caplog.clear()
            run = Run()
            run.evaluate(**{name: (0.5, 0.1)})
            run.evaluate(**{name: (mean, 0.1)})
            assert symptom in caplog.messages[0]


def test_a_measure_warns_again_only_if_it_was_inside_in_between(caplog):
    run, counts = Run(), []
    for mean in (0.5, 0.9, 0.95, 0.9, 0.5, 0.9, 0.1):
        run.evaluate(exposure=(mean, 0.2), edge_density=(0.1, 0.05))
        counts.append(len(caplog.messages))
    assert counts == [0, 1, 1, 1, 1, 2, 2]


def test_each_measure_warns_by_itself(caplog):
    run = Run()
    run.evaluate(exposure=(0.5, 0.2), edge_density=(0.1, 0.02))
    run.evaluate(exposure=(0.9, 0.2), edge_density=(0.1, 0.02))
    run.evaluate(exposure=(0.9, 0.2), edge_density=(0.2, 0.02))
    assert [warning.split()[1] for warning in caplog.messages] == ["exposure", "edge_density"]


def test_only_the_first_process_warns_and_all_of_them_stop(caplog):
    state = TrainerState()
    state.is_world_process_zero = False
    run = Run(Watchdog("stop"), state)
    run.evaluate(exposure=(0.5, 0.2))
    run.evaluate(exposure=(0.9, 0.2))
    assert not caplog.messages
    assert run.control.should_training_stop


def test_other_evaluations_are_left_alone(caplog):
    run = Run()
    run.evaluate(exposure=(0.5, 0.2))
    assert run.evaluate("test", exposure=(0.9, 0.2)) == []
    assert run.evaluate(exposure=(0.5, 0.2)) == [], "nor do they set a band"
    run.watchdog.on_evaluate(None, run.state, run.control, metrics={"eval_rewards/pickscore/mean": 1.0})
    run.watchdog.on_evaluate(None, run.state, run.control)
    assert not caplog.messages


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def resumed(tmp_path):
    """(run) -> a run that goes on from its checkpoint with a new watchdog."""

    def resume(run: Run) -> Run:
        run.state.save_to_json(str(tmp_path / "trainer_state.json"))
        return Run(Watchdog(run.watchdog.action), TrainerState.load_from_json(str(tmp_path / "trainer_state.json")))

    return resume


def test_a_resumed_run_keeps_the_band_of_its_first_evaluation(resumed, caplog):
    run = Run()
    run.evaluate(exposure=(0.5, 0.2), temporal_flicker=(math.nan, math.nan))
    run.evaluate(exposure=(0.58, 0.2), temporal_flicker=(math.nan, math.nan))
    run = resumed(run)
    assert run.evaluate(exposure=(0.65, 0.2)) == ["exposure"], "inside a band around 0.58"
    assert "(0.5, step 0)" in caplog.messages[0]


def test_a_resumed_run_knows_what_is_outside_and_does_not_say_it_twice(resumed, caplog):
    run = Run()
    run.evaluate(exposure=(0.5, 0.2))
    run.evaluate(exposure=(0.9, 0.2))
    run = resumed(run)
    assert list(run.watchdog.outside) == ["exposure"]
    run.evaluate(exposure=(0.9, 0.2))
    assert len(caplog.messages) == 1


def test_a_new_run_of_the_same_watchdog_starts_afresh(caplog):
    watchdog = Watchdog()
    run = Run(watchdog)
    run.evaluate(exposure=(0.5, 0.2))
    run.evaluate(exposure=(0.9, 0.2))
    run = Run(watchdog)
    assert watchdog.outside == {}
    assert run.evaluate(exposure=(0.9, 0.2)) == []


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "stops"), [("warn", False), ("stop", True)])
def test_a_run_stops_with_a_checkpoint_if_that_was_asked_for(action, stops, caplog):
    run = Run(Watchdog(action))
    run.evaluate(exposure=(0.5, 0.2))
    assert not run.control.should_training_stop
    run.evaluate(exposure=(0.9, 0.2))
    assert run.control.should_training_stop == run.control.should_save == stops
    assert ("Stopping, with a checkpoint" in caplog.messages[0]) == stops


def test_who_resumes_a_stopped_run_is_stopped_again_only_by_news(resumed):
    run = Run(Watchdog("stop"))
    run.evaluate(exposure=(0.5, 0.2), edge_density=(0.1, 0.02))
    run.evaluate(exposure=(0.9, 0.2), edge_density=(0.1, 0.02))
    run = resumed(run)
    run.evaluate(exposure=(0.9, 0.2), edge_density=(0.1, 0.02))
    assert not run.control.should_training_stop
    run.evaluate(exposure=(0.9, 0.2), edge_density=(0.05, 0.02))
    assert run.control.should_training_stop


# -- its settings ------------------------------------------------------------------------------------------------------


def test_an_unknown_action_is_an_error():
    with pytest.raises(EditrlError, match="watchdog action is 'halt'; use one of warn, stop"):
        Watchdog("halt")


@pytest.mark.parametrize("tolerance", [0, -1, math.inf, math.nan])
def test_a_tolerance_is_a_finite_number_above_0(tolerance):
    with pytest.raises(EditrlError, match="tolerance"):
        Watchdog(tolerance=tolerance)


def test_the_names_of_the_log_are_those_of_the_trainer():
    assert PREFIX == "eval_watchdog/"

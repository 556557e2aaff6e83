"""The doctor: silent on a healthy trainer; a planted fault is found by its own check while the others stay quiet."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from editrl.doctor import diagnose
from editrl.doctor.finding import Finding, failed, summary
from editrl.doctor.forward import rounding
from editrl.doctor.learning import clip_finding, reward_finding, size
from editrl.doctor.observation import first_numbers
from editrl.doctor.ratio import Around, round_numbers, shift_of
from editrl.flow import FlowSDE, get_kernel, sigma_schedule

CAUSES = ["stored latents", "schedule", "rollout", "dropout", "mode", "batch", "compile"]
"""By which the ratio before the first update can differ from 1."""


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def constant(videos, **kwargs):
    return [0.5] * len(videos)


def examined(trainer) -> dict[str, Finding]:
    """The findings by their check."""
    return {finding.check: finding for finding in diagnose(trainer)}


def assert_only(findings: dict[str, Finding], cause: str, *phrases: str) -> None:
    """Of all causes only this one fails, and it says what is wrong."""
    assert failed([findings[name] for name in CAUSES]) == [cause]
    assert not [name for name in CAUSES if findings[name].verdict == "warn"]
    for phrase in phrases:
        assert phrase in findings[cause].text


def change_velocity(trainer, change) -> None:
    """Let the policy's velocity pass through `change(velocity, transformer)`."""
    velocity = trainer.policy.velocity
    trainer.policy.velocity = lambda transformer, *inputs: change(velocity(transformer, *inputs), transformer)


def after_rollout(trainer, change) -> None:
    """Let `change(batches)` happen between rollout and replay."""
    generate = trainer.generate

    def generate_and_change(numbers):
        batches = generate(numbers)
        change(batches)
        return batches

    trainer.generate = generate_and_change


# -- a healthy trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(grpo):
    return examined(grpo([brightness]))


def test_a_healthy_trainer_has_no_fault(healthy):
    assert {name: finding.text for name, finding in healthy.items() if finding.verdict in ("warn", "fail")} == {}
    assert healthy["ratio"].verdict == "ok"
    assert healthy["ratio"].numbers["deviation"] == 0
    for cause in CAUSES:
        # A tiny model's kernels need not depend on the batch size; a larger one's do.
        assert healthy[cause].verdict == "ok" or cause == "batch"


def test_every_check_has_a_line(healthy):
    others = ["marginals", "reward brightness", "gradient scale", "gradient", "memory", "lora", "clip"]
    assert list(healthy) == ["ratio", *CAUSES, *others]
    for finding in healthy.values():
        assert finding.text
        assert "\n" not in finding.text


@pytest.mark.parametrize(
    "changes",
    [
        {"sde_kernel": "cps", "loss_type": "grpo_guard"},
        {"sde_kernel": "dance_sde", "loss_type": "dppo", "same_init_noise": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_selected_generations": 2},
        {"bf16": True, "gradient_checkpointing": True, "ode_solver": "dpm2"},
        {"peft": None, "beta": 0.1, "num_iterations": 2, "max_steps": 4},
        {"one_pass": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    ],
    ids=["cps guard", "dance dppo", "best of N", "bfloat16", "whole transformer", "one pass"],
)
def test_no_setting_is_a_fault_by_itself(grpo, changes):
    if "num_selected_generations" in changes:
        changes = changes | {"gradient_accumulation_steps": 4}
    findings = examined(grpo([brightness], **changes))
    assert not failed(list(findings.values()))
    assert findings["ratio"].verdict in ("ok", "warn")
    assert findings["stored latents"].verdict == findings["dropout"].verdict == findings["mode"].verdict == "ok"


@pytest.mark.parametrize("loss", ["nft", "awm", "rwr"])
def test_a_matching_loss_has_no_ratio_but_a_forward_and_rewards(grpo, loss):
    trainer = grpo([brightness], loss_type=loss)
    change_velocity(trainer, lambda velocity, transformer: F.dropout(velocity, 0.1, transformer.training))
    findings = examined(trainer)
    assert findings["ratio"].verdict == "info"
    assert f"{loss} replays no step" in findings["ratio"].text
    assert failed(list(findings.values())) == ["dropout"]
    assert not findings.keys() & {"stored latents", "rollout", "marginals", "gradient scale", "clip"}
    assert findings["gradient"].numbers["norm"] > 0


def test_a_diagnosis_leaves_no_trace_in_the_training_after_it(grpo, weights, equal, updates):
    """Nor in its random numbers, which a dropout takes from torch."""
    trained, logs = [], []
    for first in (False, True):
        trainer = grpo([brightness], video_steps=1, bf16=True)
        change_velocity(trainer, lambda velocity, transformer: F.dropout(velocity, 0.1, transformer.training))
        if first:
            state, files = torch.get_rng_state(), set(Path(trainer.args.output_dir).rglob("*"))
            diagnose(trainer)
            assert torch.equal(torch.get_rng_state(), state)
            assert set(Path(trainer.args.output_dir).rglob("*")) == files
            assert not any(parameter.grad is not None for parameter in trainer.trained_parameters())
            assert not trainer._means
            assert not trainer._seconds
        trainer.train()
        trained.append(weights(trainer))
        logs.append([{k: v for k, v in log.items() if not k.startswith("seconds")} for log in updates(trainer)])
    assert equal(*trained)
    assert logs[0] == logs[1]


def test_the_model_runs_as_in_training(grpo):
    """Mixed precision is wrapped around it when training begins."""
    trainer, dtypes = grpo([brightness], bf16=True), set()
    trainer.model.get_base_model().proj_out.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    diagnose(trainer)
    assert dtypes == {torch.bfloat16}


def test_a_diagnosis_repeats_itself(grpo, healthy):
    trainer = grpo([brightness])
    for _ in range(2):
        assert examined(trainer) == healthy


def test_the_rollout_is_the_first_one_of_training(grpo):
    trainer = grpo([brightness])
    [batch] = [batch for _, batch in zip(range(1), trainer.get_train_dataloader(), strict=False)]
    assert first_numbers(trainer) == batch["numbers"].tolist()


# -- ratio: planted causes ---------------------------------------------------------------------------------------------


def test_a_dropout_layer_that_is_on_is_found_and_named(grpo, lora):
    trainer = grpo([brightness], peft=lora(lora_dropout=0.5))
    layers = {name: module for name, module in trainer.model.named_modules() if "lora_dropout.default" in name}
    chosen = sorted(layers)[0]
    trainer.model.get_submodule(chosen).p = 0.5
    # A fresh adapter adds 0, whatever its dropout.
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    findings = examined(trainer)
    assert_only(findings, "dropout", chosen, "training mode", "set its p")
    assert findings["dropout"].numbers["modules"] == 1
    assert findings["ratio"].verdict == "fail"
    assert "dropout" in findings["ratio"].text
    assert findings["mode"].verdict == "info"


@pytest.mark.parametrize("always", [False, True], ids=["training", "always"])
def test_a_functional_dropout_is_found(grpo, always):
    trainer = grpo([brightness])
    change_velocity(trainer, lambda velocity, transformer: F.dropout(velocity, 0.1, always or transformer.training))
    findings = examined(trainer)
    assert_only(findings, "dropout", "functional dropout", "training and eval mode" if always else "in training mode")
    assert findings["ratio"].verdict == "fail"
    assert findings["rollout"].verdict == ("info" if always else "ok")


class RoundsTooLate(FlowSDE):
    """Scores the drawn latent, then stores it rounded (Flow-Factory#61, UniRL#388)."""

    def step(self, *inputs, **draw):
        transition = super().step(*inputs, **draw)
        rounded = transition.next_sample.bfloat16().float()
        return transition._replace(next_sample=rounded) if "noise" in draw else transition


class RoundsFirst(FlowSDE):
    """Rounds the drawn latent, then scores and stores it."""

    def step(self, *inputs, **draw):
        transition = super().step(*inputs, **draw)
        if "noise" not in draw:
            return transition
        return super().step(*inputs, next_sample=transition.next_sample.bfloat16().float())


def test_latents_that_are_rounded_after_they_were_scored_are_found(grpo):
    trainer = grpo([brightness])
    trainer.kernel = RoundsTooLate(0.7)
    findings = examined(trainer)
    assert_only(findings, "stored latents", "what is stored is bfloat16", "round a latent before it is scored")
    assert findings["ratio"].verdict == "fail"
    assert "see stored latents" in findings["ratio"].text


def test_latents_that_are_rounded_when_they_are_kept_are_found(grpo):
    def keep_rounded(batches):
        for batch in batches:
            batch.next_latents = batch.next_latents.bfloat16().float()

    trainer = grpo([brightness])
    after_rollout(trainer, keep_rounded)
    findings = examined(trainer)
    assert_only(findings, "stored latents", "what is stored is bfloat16")
    assert findings["ratio"].verdict == "fail"


def test_bfloat16_latents_are_no_fault_where_they_were_rounded_first(grpo):
    trainer = grpo([brightness])
    trainer.kernel = RoundsFirst(0.7)
    findings = examined(trainer)
    assert findings["ratio"].verdict == findings["stored latents"].verdict == "ok"


def test_stored_latents_that_changed_are_found(grpo):
    def shift_one(batches):
        batches[1].next_latents = batches[1].next_latents + 1e-3

    trainer = grpo([brightness])
    after_rollout(trainer, shift_one)
    assert_only(examined(trainer), "stored latents", "do not have the stored log-probs")


def test_a_step_that_did_not_begin_where_the_last_one_ended_is_found(grpo):
    """The score of a stored step is right all the same."""

    def round_state(batches):
        batches[1].latents = batches[1].latents.half().float()

    trainer = grpo([brightness], sde_window="fixed")
    after_rollout(trainer, round_state)
    findings = examined(trainer)
    assert_only(findings, "stored latents", "stored after step 0 are not those that step 1 began with")
    assert findings["stored latents"].numbers["log_prob_error"] == 0


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_another_shift_in_the_replay_is_found_and_both_are_named(grpo, kernel):
    def change_shift(batches):
        trainer.sigmas = sigma_schedule(4, 5.0)

    trainer = grpo([brightness], sde_kernel=kernel, shift=3.0)
    after_rollout(trainer, change_shift)
    findings = examined(trainer)
    assert_only(findings, "schedule", "it is that of shift 3 to the bit", "the replay uses shift 5")
    assert findings["stored latents"].verdict == "ok", "scored with the schedule that was found"
    assert findings["rollout"].verdict == findings["marginals"].verdict == "info"
    assert findings["ratio"].verdict == "fail"
    assert "schedule" in findings["ratio"].text


def test_another_schedule_in_the_rollout_is_found(grpo):
    """The other way round: the replay is as configured; and a shift that is no round number."""

    def back_to_configured(batches):
        trainer.sigmas = sigma_schedule(4, 3.0)

    trainer = grpo([brightness], shift=3.0)
    trainer.sigmas = sigma_schedule(4, 7.123456)
    after_rollout(trainer, back_to_configured)
    findings = examined(trainer)
    assert_only(findings, "schedule", "it fits shift ", "the replay uses shift 3")
    named = float(findings["schedule"].text.split("it fits shift ")[1].split(",")[0])
    assert named == pytest.approx(7.12, rel=0.05)
    assert findings["stored latents"].verdict == "info"


def test_another_noise_level_in_the_replay_is_found(grpo):
    def change_noise(batches):
        trainer.kernel = get_kernel("dance_sde", eta=0.5)

    trainer = grpo([brightness], sde_kernel="dance_sde", noise_level=0.25)
    after_rollout(trainer, change_noise)
    assert_only(examined(trainer), "schedule", "has 0.49", "the same at every step, so its noise_level")


def test_a_schedule_that_is_not_the_configured_one_is_told_where_both_sides_use_it(grpo):
    trainer = grpo([brightness], shift=3.0)
    trainer.sigmas = sigma_schedule(4, 5.0)
    findings = examined(trainer)
    assert findings["schedule"].verdict == "warn"
    assert "trainer.sigmas has shift 5, the arguments say shift 3" in findings["schedule"].text
    assert findings["ratio"].verdict == "ok"


def test_a_branch_on_training_mode_is_found(grpo):
    trainer = grpo([brightness])
    change_velocity(trainer, lambda velocity, transformer: velocity * (1.01 if transformer.training else 1))
    findings = examined(trainer)
    assert_only(findings, "mode", "a branch on module.training")
    assert findings["mode"].numbers["relative_error"] == pytest.approx(0.01, rel=1e-3)
    assert findings["ratio"].verdict == "fail"


def test_a_forward_that_autograd_changes_is_found(grpo):
    trainer = grpo([brightness])
    change_velocity(trainer, lambda velocity, transformer: velocity * (1.01 if torch.is_grad_enabled() else 1))
    assert_only(examined(trainer), "mode", "what autograd changes", "gradient checkpointing")


def test_guidance_that_changes_after_the_rollout_is_found(grpo):
    trainer = grpo([brightness])

    def change_guidance(batches):
        trainer.policy.guidance_scale = 6.0

    after_rollout(trainer, change_guidance)
    findings = examined(trainer)
    assert_only(findings, "rollout", "guidance")
    assert findings["ratio"].verdict == "fail"


def test_an_operation_over_the_batch_is_found(grpo):
    trainer = grpo([brightness])
    change_velocity(trainer, lambda velocity, transformer: velocity - 0.01 * velocity.mean(0))
    findings = examined(trainer)
    assert_only(findings, "batch", "an operation mixes the clips of a batch")
    assert findings["ratio"].verdict == "ok", "rollout and replay run in the same batches"


def test_an_operation_over_the_batch_is_found_beside_dropout(grpo):
    def mixed(velocity, transformer):
        return F.dropout(velocity - 0.01 * velocity.mean(0), 0.1, transformer.training)

    trainer = grpo([brightness])
    change_velocity(trainer, mixed)
    findings = examined(trainer)
    assert failed([findings[name] for name in CAUSES]) == ["dropout", "batch"]


def test_an_operation_that_knows_a_clip_by_its_place_is_found(grpo):
    """Only another order shows it: the four clips that are looked at alone keep their velocity."""

    def by_place(velocity, transformer):
        return torch.cat([velocity[:4], velocity[4:] * 1.01])

    trainer = grpo([brightness])
    change_velocity(trainer, by_place)
    assert_only(examined(trainer), "batch")


def test_a_compiled_forward_that_is_another_one_is_found(grpo):
    def wrong(graph, inputs):
        return lambda *values: tuple(value * 1.01 for value in graph(*values))

    def right(graph, inputs):
        return graph

    for backend, verdict in ((wrong, "fail"), (right, "ok")):
        trainer = grpo([brightness])
        base = trainer.model.get_base_model()
        base.proj_out = torch.compile(base.proj_out, backend=backend)
        finding = examined(trainer)["compile"]
        assert finding.verdict == verdict
        assert finding.text != "the model is not compiled"


def test_several_causes_are_all_named(grpo):
    def round_and_shift(batches):
        trainer.sigmas = sigma_schedule(4, 5.0)
        for batch in batches:
            batch.next_latents = batch.next_latents.bfloat16().float()

    trainer = grpo([brightness], shift=3.0)
    after_rollout(trainer, round_and_shift)
    change_velocity(trainer, lambda velocity, transformer: velocity * (1.01 if transformer.training else 1))
    findings = examined(trainer)
    assert failed([findings[name] for name in CAUSES]) == ["stored latents", "schedule", "mode"]
    assert "see stored latents, schedule, mode" in findings["ratio"].text


def test_a_ratio_off_by_less_than_any_clip_notices_is_a_warning(grpo):
    def nudge(batches):
        batches[0].old_log_prob = batches[0].old_log_prob + 1e-6

    trainer = grpo([brightness], epsilon=1e-4)
    after_rollout(trainer, nudge)
    ratio = examined(trainer)["ratio"]
    assert ratio.verdict == "warn"
    assert ratio.numbers["deviation"] == pytest.approx(1e-6, rel=0.2)
    assert "far below the clip range" in ratio.text


def test_recomputed_log_probs_make_the_ratio_a_remark_but_not_its_cause(grpo):
    trainer = grpo([brightness], old_log_prob="recompute")
    change_velocity(trainer, lambda velocity, transformer: velocity * (1.01 if transformer.training else 1))
    findings = examined(trainer)
    assert findings["ratio"].verdict == "info"
    assert "recompute" in findings["ratio"].text
    assert findings["mode"].verdict == "fail"
    assert trainer.args.old_log_prob == "recompute"


# -- what else decides whether a run learns ----------------------------------------------------------------------------


def test_a_constant_reward_is_found_and_is_no_fault_of_the_gradient(grpo):
    findings = examined(grpo([brightness, constant]))
    assert failed(list(findings.values())) == ["reward constant"]
    assert "a constant cannot teach" in findings["reward constant"].text
    findings = examined(grpo([constant]))
    assert failed(list(findings.values())) == ["reward constant"]
    assert findings["gradient"].verdict == "ok"
    assert "advantages of 1" in findings["gradient"].text


def test_a_reward_that_is_not_optimised_may_be_constant(grpo):
    findings = examined(grpo([brightness, constant], reward_weights=[1.0, 0.0]))
    assert findings["reward constant"].verdict == "info"


@pytest.mark.parametrize(
    ("values", "flat", "verdict", "phrase"),
    [
        ([0.1, 0.3, 0.2, 0.4], 0.0, "ok", "std 0.1 within a group"),
        ([1.0, 1.0, 2.0, 2.0], 1.0, "fail", "every group scores the same"),
        ([1.0, 1.0 + 1e-7, 1.0, 1.0 - 1e-7], 0.0, "warn", "numerical noise"),
        ([0.0, 0.0, 0.0, 1.0], 0.75, "warn", "75% of 2 groups have none"),
        ([math.nan] * 4, math.nan, "warn", "applies to no clip"),
        ([math.nan, 0.5, 0.2, 0.4], 0.5, "ok", "std 0.05 within a group"),
    ],
)
def test_the_spread_of_a_reward(values, flat, verdict, phrase):
    values = torch.tensor(values, dtype=torch.float64)
    finding = reward_finding("mine", 1.0, values, torch.tensor([4, 4, 9, 9]), flat)
    assert finding.verdict == verdict
    assert phrase in finding.text


def test_the_spread_is_that_of_the_clips_of_the_rollout(grpo):
    seen = []

    def remembered(videos, **kwargs):
        seen.append(brightness(videos))
        return seen[-1]

    numbers = examined(grpo([remembered]))["reward remembered"].numbers
    groups = torch.tensor(seen[0]).view(2, 4)
    assert numbers["group_std"] == pytest.approx(groups.std(dim=1, correction=0).mean().item(), rel=1e-4)
    assert numbers["groups"] == 2


def test_a_reward_that_fails_stops_the_diagnosis_as_it_would_training(grpo):
    def broken(videos, **kwargs):
        raise KeyError("no such thing")

    trainer = grpo([broken])
    with pytest.raises(ValueError, match="reward 'broken' failed"):
        diagnose(trainer)
    assert not any(type(callback).__name__ == "Watch" for callback in trainer.callback_handler.callbacks)


def test_a_gradient_that_is_not_finite_is_found(grpo):
    """The forward is finite: sqrt(0) is 0, but its slope is infinite."""
    trainer = grpo([brightness])
    change_velocity(trainer, lambda velocity, transformer: velocity + (velocity * 0).sqrt())
    findings = examined(trainer)
    assert failed(list(findings.values())) == ["gradient"]
    assert not math.isfinite(findings["gradient"].numbers["norm"])


@pytest.mark.parametrize("cut", ["detached", "without effect"])
def test_a_gradient_of_zero_is_found(grpo, cut):
    def changed(velocity, transformer):
        detached = velocity.detach()
        return detached if cut == "detached" else detached + 0 * velocity

    trainer = grpo([brightness])
    change_velocity(trainer, changed)
    findings = examined(trainer)
    assert failed(list(findings.values())) == ["gradient"]
    assert findings["gradient"].numbers["norm"] == 0


def test_steps_that_pull_unevenly_are_found_unless_they_are_weighted(grpo):
    wide = {"num_inference_steps": 8, "shift": 7.0, "sde_window_size": 6, "sde_window_range": [0, 7]}
    sizes = {"gradient_accumulation_steps": 6}
    for weighting, loss, verdict in (
        ("none", "grpo", "warn"),
        ("uniform_gradient", "grpo", "ok"),
        ("none", "grpo_guard", "ok"),
        ("uniform_gradient", "grpo_guard", "warn"),
    ):
        finding = examined(grpo([brightness], timestep_weighting=weighting, loss_type=loss, **wide, **sizes))[
            "gradient scale"
        ]
        assert finding.verdict == verdict, (weighting, loss, finding.text)
    kernel, sigmas = get_kernel("flow_sde"), sigma_schedule(8, 7.0)
    scale = [kernel.gradient_scale(sigmas[step], sigmas[step + 1]).item() for step in range(8)]
    finding = examined(grpo([brightness], timestep_weighting="none", **wide, **sizes))["gradient scale"]
    worst = max(max(scale[first : first + 6]) / min(scale[first : first + 6]) for first in range(2))
    assert finding.numbers["window"] == pytest.approx(worst, rel=1e-4)
    assert finding.numbers["schedule"] == pytest.approx(max(scale) / min(scale), rel=1e-4)


def test_the_step_of_cps_that_has_no_noise_is_left_out(grpo):
    finding = examined(grpo([brightness], sde_kernel="cps"))["gradient scale"]
    assert all(math.isfinite(value) for value in finding.numbers.values())


@pytest.mark.parametrize(("alpha", "rank", "verdict"), [(4, 4, "warn"), (2, 4, "warn"), (16, 4, "ok")])
def test_an_adapter_that_hardly_counts_is_found(grpo, lora, alpha, rank, verdict):
    finding = examined(grpo([brightness], peft=lora(lora_alpha=alpha, r=rank)))["lora"]
    assert finding.verdict == verdict
    assert finding.numbers["scale"] == alpha / rank


def test_noise_that_changes_the_clips_is_found(grpo):
    noisy = examined(grpo([brightness], noise_level=4.0, sde_window="fixed"))["marginals"]
    assert noisy.verdict == "warn"
    assert abs(noisy.numbers["std_change"]) > 0.1
    assert noisy.numbers["clips"] == 8


def test_marginals_compare_with_the_ode_from_the_same_noise(grpo):
    """Hardly any noise: hardly any change, whichever step the window begins with."""
    for window in ([0, 2], [1, 3]):
        numbers = examined(grpo([brightness], noise_level=1e-4, sde_window_range=window))["marginals"].numbers
        assert abs(numbers["std_change"]) < 1e-4
        assert abs(numbers["mean_change"]) < 1e-4


def test_memory_counts_what_a_rollout_keeps_once(grpo):
    """Two steps of 8 clips: three states and two means of float32, log-probs, advantages, and the conditions."""
    trainer = grpo([brightness], sde_window="fixed")
    findings = examined(trainer)
    batches = trainer.generate(first_numbers(trainer))
    state, conditions = batches[0].latents.nbytes, batches[0].conditions.tensors.values()
    expected = 5 * state + (2 + 1) * 8 * 4 + sum(tensor.nbytes for tensor in conditions)
    assert findings["memory"].numbers["trajectory"] == expected
    trained = sum(parameter.numel() for parameter in trainer.trained_parameters())
    assert findings["memory"].numbers["trained_parameters"] == trained
    assert findings["memory"].numbers["optimizer"] == 8 * trained
    if not torch.cuda.is_available():
        assert "no peak was measured" in findings["memory"].text


# -- small parts -------------------------------------------------------------------------------------------------------


def test_rounding_knows_of_tf32_however_it_was_set(grpo, monkeypatch):
    """transformers sets it by an interface that makes torch.get_float32_matmul_precision raise."""
    trainer = grpo([brightness])
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    assert rounding(trainer) == 1e-4
    try:
        torch.backends.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert rounding(trainer) == 5e-3
    finally:
        torch.backends.fp32_precision = "none"


def test_a_stored_step_is_scored_as_the_kernel_scored_it():
    generator = torch.Generator().manual_seed(0)
    sample, velocity, noise = torch.randn(3, 4, 5, 7, generator=generator).unbind()
    for kernel in (get_kernel("flow_sde"), get_kernel("cps"), get_kernel("dance_sde")):
        drawn = kernel.step(sample, velocity, 0.8, 0.6, noise=noise)
        again = Around(drawn.std).step(drawn.mean, torch.zeros(4, 5, 7), 0.8, 0.6, next_sample=drawn.next_sample)
        assert torch.equal(again.log_prob, drawn.log_prob)


def test_a_schedule_is_named_by_its_shift():
    assert shift_of(sigma_schedule(20, 7.0)) == "shift 7"
    assert shift_of(sigma_schedule(3, 2.5)) == "shift 2.5"
    assert shift_of(torch.tensor([1.0, 0.9, 0.2, 0.1, 0.0])) == "a schedule of its own"
    assert shift_of(torch.tensor([1.0, 0.0])) == "a schedule of its own", "one step has no shift"
    assert list(round_numbers(6.9712)) == [7.0, 7.0, 6.97]


def test_the_clip_is_called_one_sided_where_it_is():
    """log ratio ~ N(-d²/2, d²/D): facts/flow-math; D = 806 k is a clip of 53 frames of 480x480."""
    video, tiny = clip_finding(1e-4, 806_400), clip_finding(1e-4, 512)
    assert "below 1 only" in video.text
    assert "below 1 only" not in tiny.text
    drift = video.numbers["drift"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 2000, generator=generator, dtype=torch.float64)
    log_ratio = (noise.square() - (noise - drift).square()).mul(0.5).mean(1)
    assert log_ratio.mean().item() == pytest.approx(-1e-4, rel=0.2)
    assert log_ratio.std().item() == pytest.approx(clip_finding(1e-4, 2000).numbers["width"], rel=0.15)


def test_the_summary_counts_and_names_what_is_wrong():
    findings = [Finding("a", "ok", ""), Finding("b", "fail", ""), Finding("c", "warn", ""), Finding("d", "fail", "")]
    assert summary(findings) == "4 checks: 2 fail (b, d), 1 warn (c)"
    assert summary(findings[:1]) == "1 checks: 0 fail, 0 warn"


def test_sizes_are_read_easily():
    assert [size(1_234), size(2_500_000), size(78_000_000_000)] == ["1 kB", "2.5 MB", "78.0 GB"]

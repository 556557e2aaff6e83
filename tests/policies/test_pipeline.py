"""EditPipeline: the editor in diffusers' clothes. Nothing about the edit may differ from the policy's."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from PIL import Image

from editrl.data import EditExample, write_image, write_video
from editrl.errors import EditrlError
from editrl.policies import hunyuan_video
from editrl.policies.hunyuan_video import EditPipeline, HunyuanVideoPolicy, pipeline
from editrl.policies.hunyuan_video.weights import save_diffusers_adapter
from editrl.recipes.shapes import WEIGHTS
from editrl.rollout import edit_examples

EDITOR = WEIGHTS / "sft"
INSTRUCTION = "make the red circle blue"


@pytest.fixture(scope="module")
def pipe() -> EditPipeline:
    return quiet(EditPipeline.from_pretrained(EDITOR))


def quiet(pipe: EditPipeline) -> EditPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(frames=5, height=32, width=32, seed=0):
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def edit(pipe, source=None, seed=3, **options):
    """The edited clip [F,3,H,W] in two steps."""
    generator = torch.Generator().manual_seed(seed)
    source = clip() if source is None else source
    options = {"num_inference_steps": 2, "generator": generator} | options
    return pipe(source, options.pop("instruction", INSTRUCTION), **options).frames[0]


# -- the edit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true_cfg_scale", [1.0, 4.0])
def test_an_edit_is_that_of_the_policy_with_the_same_noise(pipe, true_cfg_scale):
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), guidance_scale=6.0)
    source, reference = clip(seed=1), clip(1, 40, 24, seed=2)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    [expected] = edit_examples(
        policy,
        policy.transformer.eval(),
        [EditExample(id="x", instruction=INSTRUCTION, source=source, reference_image=reference)],
        num_inference_steps=2,
        shift=pipe.scheduler.shift,
        noise_keys=[(seed,)],
        true_cfg_scale=true_cfg_scale,
    )
    found = edit(pipe, source, reference_image=reference, true_cfg_scale=true_cfg_scale)
    assert torch.equal(found, expected)


def test_a_generator_decides_the_noise_and_is_advanced(pipe):
    assert torch.equal(edit(pipe, seed=3), edit(pipe, seed=3))
    assert not torch.equal(edit(pipe, seed=3), edit(pipe, seed=4))
    generator = torch.Generator().manual_seed(3)
    first, second = (edit(pipe, generator=generator) for _ in range(2))
    assert torch.equal(first, edit(pipe, seed=3))
    assert not torch.equal(first, second)
    assert not torch.equal(edit(pipe, generator=None), edit(pipe, generator=None))


def test_the_shift_is_the_schedulers_unless_another_is_asked_for(pipe):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    other = quiet(EditPipeline.from_policy(HunyuanVideoPolicy.from_pretrained(str(EDITOR)), scheduler))
    assert pipe.scheduler.shift == 3.0  # what the editor's own settings say
    assert not torch.equal(edit(other), edit(pipe))
    assert torch.equal(edit(other), edit(pipe, shift=9.0))
    assert torch.equal(edit(other, shift=3.0), edit(pipe))


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((6, 34, 50), {}, (5, 34, 50)),
        ((6, 34, 50), {"frames": "repeat"}, (6, 34, 50)),
        ((9, 32, 32), {"num_frames": 5}, (5, 32, 32)),
        ((1, 66, 98), {"height": 32, "width": 48}, (1, 32, 48)),
        ((1, 66, 98), {"height": 32, "width": 48, "fit": "pad"}, (1, 66, 98)),
        ((13, 32, 32), {"max_frames": 9, "overlap": 5}, (13, 32, 32)),
    ],
)
def test_any_length_and_size_is_edited(pipe, shape, options, expected):
    edited = edit(pipe, clip(*shape), **options)
    assert (len(edited), *edited.shape[-2:]) == expected
    assert edited.dtype == torch.float32 and edited.min() >= 0 and edited.max() <= 1


def test_guidance_of_a_call_is_of_that_call(pipe):
    assert not torch.equal(edit(pipe, guidance_scale=1.0), edit(pipe))
    assert torch.equal(edit(pipe, guidance_scale=6.0), edit(pipe))


def test_every_step_is_called_back(pipe):
    calls = []
    edit(
        pipe,
        num_inference_steps=3,
        shift=7.0,
        true_cfg_scale=2.0,
        callback_on_step_end=lambda *call: calls.append(call),
    )
    assert [call[0] for call in calls] == [pipe] * 3
    assert [call[1] for call in calls] == [0, 1, 2]
    assert [call[2] for call in calls] == pytest.approx([1000, 1000 * 14 / 15, 1000 * 7 / 9])


# -- what goes in and comes out ----------------------------------------------------------------------------------------


def test_a_source_may_come_in_many_forms(pipe, tmp_path):
    pixels = (clip() * 255).round().byte()
    expected = edit(pipe, pixels.float() / 255)
    array = pixels.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(frame) for frame in array]
    for form in (pixels, array, array.astype(np.float32) / 255, images, tuple(images), (pixels / 255.0)[None]):
        torch.testing.assert_close(edit(pipe, form), expected, rtol=0, atol=1e-5)
    file = write_video(tmp_path / "clip.mp4", pixels, lossless=True)
    for form in (file, str(file)):
        torch.testing.assert_close(edit(pipe, form), expected, rtol=0, atol=0.15)
    picture = write_image(tmp_path / "image.png", pixels[0])
    alone = edit(pipe, pixels[:1])
    for form in (picture, images[0], array[0], pixels[0]):
        assert torch.equal(edit(pipe, form), alone)


def test_a_result_may_go_out_in_three_forms(pipe):
    expected = edit(pipe)
    array = edit(pipe, output_type="np")
    assert array.shape == (5, 32, 32, 3) and np.abs(array - expected.permute(0, 2, 3, 1).numpy()).max() == 0
    images = edit(pipe, output_type="pil")
    assert [image.size for image in images] == [(32, 32)] * 5
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (frames,) = pipe(clip(), INSTRUCTION, num_inference_steps=1, return_dict=False)
    assert frames.shape == (1, 5, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"output_type": "gif"}, "output_type is 'gif'; use one of pt, np, pil"),
        ({"height": 32}, "height is 32 and width is None; give both or neither"),
        ({"height": 40, "width": 32}, "40x32 is not divisible by 16"),
        ({"num_frames": 9}, "num_frames is 9, the source has 5 frames"),
        ({"source": 3}, "a video is a tensor, an array, PIL images or a file, this is a int"),
        ({"source": []}, "this is a list"),
        ({"source": clip() * 3}, r"a clip is floating point in \[0, 1\]"),
        ({"source": [Image.new("RGB", (32, 32)), Image.new("RGB", (32, 16))]}, "differ in size"),
        ({"source": "nowhere.mp4"}, "nowhere.mp4: cannot be read"),
        ({"frames": "drop"}, "frames is 'drop'"),
    ],
)
def test_a_mistake_is_one_line(pipe, options, phrase):
    with pytest.raises(EditrlError, match=phrase):
        edit(pipe, **options)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a pipeline whose every setting is another than the default."""
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), edit_prompt="edit the video .", hidden_layer=-2)
    made = EditPipeline.from_policy(policy, FlowMatchEulerDiscreteScheduler(shift=9.0))
    folder = tmp_path_factory.mktemp("pipeline")
    made.save_pretrained(folder)
    return folder, edit(quiet(made))


def test_a_saved_pipeline_loads_as_it_was(saved, pipe):
    folder, expected = saved
    loaded = quiet(EditPipeline.from_pretrained(folder))
    assert torch.equal(edit(loaded), expected)
    assert not torch.equal(edit(pipe), expected)
    assert loaded.scheduler.shift == 9.0
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "EditPipeline"
    assert index["vlm"] == ["transformers", "LlavaForConditionalGeneration"]


def test_a_saved_pipeline_is_an_editors_folder(saved):
    folder, expected = saved
    policy = HunyuanVideoPolicy.from_pretrained(str(folder))
    made = quiet(EditPipeline.from_policy(policy, FlowMatchEulerDiscreteScheduler(shift=9.0)))
    assert torch.equal(edit(made), expected)


def test_the_shift_of_an_editor_is_its_own_else_its_schedulers_else_hunyuan_videos(tmp_path):
    for part in EDITOR.iterdir():
        (tmp_path / part.name).symlink_to(part)
    assert EditPipeline.from_pretrained(tmp_path).scheduler.shift == 3.0
    assert EditPipeline.from_pretrained(tmp_path, flow_shift=None).scheduler.shift == 7.0
    FlowMatchEulerDiscreteScheduler(shift=9.0).save_pretrained(tmp_path / "scheduler")
    assert EditPipeline.from_pretrained(tmp_path).scheduler.shift == 3.0
    assert EditPipeline.from_pretrained(tmp_path, flow_shift=None).scheduler.shift == 9.0


def test_the_index_of_another_pipeline_is_passed_over(tmp_path, pipe):
    """An editor may have been made in the folder of HunyuanVideo itself."""
    for part in EDITOR.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanVideoPipeline"}')
    assert torch.equal(edit(quiet(EditPipeline.from_pretrained(tmp_path))), edit(pipe))


def test_a_pipeline_loads_from_the_hub(saved, monkeypatch):
    folder, expected = saved
    monkeypatch.setattr(pipeline, "hf_hub_download", lambda repository, name: str(folder / name))
    monkeypatch.setattr(pipeline, "snapshot_download", lambda repository: str(folder))
    assert torch.equal(edit(quiet(EditPipeline.from_pretrained("someone/editor"))), expected)


def test_parts_and_dtype_can_be_given(saved):
    folder, _ = saved
    other = HunyuanVideoPolicy.from_pretrained(str(EDITOR)).transformer
    assert EditPipeline.from_pretrained(folder, transformer=other).transformer is other
    for path in (folder, EDITOR):
        loaded = EditPipeline.from_pretrained(path, dtype=torch.bfloat16)
        assert {loaded.transformer.dtype, loaded.vlm.dtype, loaded.vae.dtype} == {torch.bfloat16}
    assert EditPipeline.from_pretrained(folder).vlm.dtype == torch.float32


def test_a_folder_that_is_neither_is_named(tmp_path):
    with pytest.raises(EditrlError, match="cannot load the"):
        EditPipeline.from_pretrained(tmp_path)


def test_an_editor_without_encoders_makes_no_pipeline():
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), encoders=False)
    with pytest.raises(EditrlError, match="without its encoders"):
        EditPipeline.from_policy(policy)


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Folders of one LoRA in PEFT's and in diffusers' format, and the pipeline of a policy that carries it."""
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR))
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k", "to_out.0"])
    policy.transformer = get_peft_model(policy.transformer, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapters")
    policy.transformer.save_pretrained(folder / "peft")
    save_diffusers_adapter(policy.transformer, folder / "diffusers")
    return folder, quiet(EditPipeline.from_policy(policy))


@pytest.mark.parametrize("kind", ["peft", "diffusers"])
def test_an_adapter_of_either_format_loads_weighs_and_fuses(adapted, kind, tmp_path, pipe):
    folder, expected_of = adapted
    expected = edit(expected_of)
    loaded = quiet(EditPipeline.from_pretrained(EDITOR))
    loaded.load_lora_weights(folder / kind, adapter_name="mine")
    assert loaded.get_active_adapters() == ["mine"]
    assert torch.equal(edit(loaded), expected)
    loaded.set_adapters(["mine"], [0.0])
    assert torch.equal(edit(loaded), edit(pipe))
    loaded.set_adapters(["mine"], [1.0])
    with pytest.raises(EditrlError, match="carries a LoRA"):
        loaded.save_pretrained(tmp_path)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    torch.testing.assert_close(edit(loaded), expected, rtol=0, atol=1e-4)
    loaded.save_pretrained(tmp_path)
    torch.testing.assert_close(edit(quiet(EditPipeline.from_pretrained(tmp_path))), expected, rtol=0, atol=1e-4)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_tiling_and_slicing_are_the_vaes(pipe):
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing


def test_offloaded_models_are_woken_when_they_are_needed(pipe):
    """On the CPU, where only the order can be seen: one of the large models at a time."""
    expected = edit(pipe, true_cfg_scale=2.0)
    offloaded = quiet(EditPipeline.from_pretrained(EDITOR))
    offloaded.enable_model_cpu_offload(device="cpu")
    woken = []
    for name in ("vlm", "transformer", "vae"):
        hook = getattr(offloaded, name)._hf_hook
        moved = hook.pre_forward

        def note(*args, name=name, moved=moved, **kwargs):
            if not woken or woken[-1] != name:
                woken.append(name)
            return moved(*args, **kwargs)

        hook.pre_forward = note
    assert torch.equal(edit(offloaded, true_cfg_scale=2.0), expected)
    assert woken == ["vlm", "vae", "vlm", "vae", "transformer", "vae"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["on the GPU", "model offload", "group offload"])
def test_an_edit_on_a_gpu_is_that_of_the_cpu(pipe, kind):
    expected = edit(pipe, true_cfg_scale=2.0, max_frames=9, source=clip(13))
    loaded = quiet(EditPipeline.from_pretrained(EDITOR))
    if kind == "model offload":
        loaded.enable_model_cpu_offload()
    else:
        loaded.to("cuda")
    if kind == "group offload":
        loaded.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    for _ in range(2):
        found = edit(loaded, true_cfg_scale=2.0, max_frames=9, source=clip(13))
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    if kind == "model offload":
        assert {loaded.transformer.device.type, loaded.vlm.device.type, loaded.vae.device.type} == {"cpu"}


def test_sequential_offload_is_refused_with_what_to_use(pipe):
    with pytest.raises(EditrlError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


# -- the import --------------------------------------------------------------------------------------------------------


def test_public_names_are_imported_when_they_are_used():
    assert hunyuan_video.EditPipeline is EditPipeline
    assert issubclass(EditPipeline, DiffusionPipeline)
    with pytest.raises(AttributeError, match="EditPipelin"):
        _ = hunyuan_video.EditPipelin

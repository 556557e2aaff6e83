"""`editrl edit`: one clip and one instruction to an edited clip."""

from pathlib import Path

from editrl.cli.parser import CommandParser, number
from editrl.errors import EditrlError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: list[str]) -> None:
    """Edit a video or an image by an instruction."""
    parser = CommandParser("editrl edit", main.__doc__)
    parser.add_argument("source", type=Path, help="video or image")
    parser.add_argument("instruction", help='what to change: "make the red circle blue"')
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help=f"the edited clip: .mp4, or {' '.join(IMAGES)}"
    )
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of the editor")
    parser.add_argument("--policy", default="hunyuan_video", help="policy adapter; `editrl policies` lists them")
    parser.add_argument("--transformer", help="folder of another transformer for the editor (a full checkpoint)")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter (a checkpoint of a LoRA run)")
    parser.add_argument("--dtype", help="of the model: float32 (default), bfloat16 or float16")
    parser.add_argument("--reference", type=Path, help="reference image")
    parser.add_argument("--num_frames", type=int, help="frames of the clip to edit, 4k+1; default: all")
    parser.add_argument("--height", type=int, help="resize and centre-crop to this height")
    parser.add_argument("--width", type=int, help="resize and centre-crop to this width")
    parser.add_argument("--num_inference_steps", type=number(int, least=1), default=50, help="denoising steps (50)")
    parser.add_argument("--shift", type=number(float, above=0), default=7.0, help="timestep shift (7)")
    parser.add_argument("--ode_solver", choices=["euler", "dpm2"], default="euler", help="Euler, or second order")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="embedded guidance (1)")
    parser.add_argument("--seed", type=number(int, least=0), default=0, help="seed of the initial noise (0)")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(argv)
    if options.output.suffix.lower() not in (".mp4", *IMAGES):
        parser.error(f"--output {options.output}: what is written ends in .mp4, or for an image in {' '.join(IMAGES)}")
    if options.adapter is not None and not (options.adapter / "adapter_config.json").is_file():
        parser.error(
            f"--adapter {options.adapter}: there is no adapter_config.json; give the folder of a LoRA checkpoint"
        )
    edit(options)


def edit(options) -> None:
    """Run the parsed command line: first what is quickly found to be wrong, then the model."""
    from editrl.cli.arguments import PolicyArguments
    from editrl.cli.launch import adopt_geometry, make_folder, quiet_libraries
    from editrl.data import EditDataset, write_image, write_video
    from editrl.rollout import edit_examples

    quiet_libraries()
    device = _device(options.device)
    loaded = {"transformer": options.transformer, "dtype": options.dtype, "guidance_scale": options.guidance_scale}
    policy_args = PolicyArguments(
        options.model_name_or_path,
        policy=options.policy,
        policy_kwargs={name: value for name, value in loaded.items() if value is not None},
    )
    policy_class = policy_args.find()
    row = {"id": options.source.stem, "instruction": options.instruction, "source": str(options.source.absolute())}
    if options.reference is not None:
        row["reference_image"] = str(options.reference.absolute())
    dataset = EditDataset(
        [row],
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        frame_multiple=policy_class.frame_multiple,
        size_multiple=policy_class.size_multiple,
        row_names=["`editrl edit`"],
    )
    example = dataset[0]
    is_video = options.output.suffix.lower() == ".mp4"
    if not is_video and len(example.source) > 1:
        raise EditrlError(
            f"--output {options.output}: the source has {len(example.source)} frames; give a name that ends in "
            ".mp4, or --num_frames 1"
        )
    make_folder(options.output.absolute().parent)

    policy = policy_args.load()
    adopt_geometry([dataset], policy)
    if options.adapter is not None:
        from peft import PeftModel

        policy.transformer = PeftModel.from_pretrained(policy.transformer, options.adapter)
    policy.to(device)
    policy.transformer.eval()
    video = edit_examples(
        policy,
        policy.transformer,
        [example],
        num_inference_steps=options.num_inference_steps,
        shift=options.shift,
        noise_keys=[(options.seed,)],
        ode_solver=options.ode_solver,
    )[0]
    if is_video:
        write_video(options.output, video, example.fps)
    else:
        write_image(options.output, video)
    rate = f" at {example.fps:g} fps" if is_video else ""
    print(f"{options.output}: {len(video)} frames of {video.shape[-1]}x{video.shape[-2]}{rate}")


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise EditrlError(f"--device {name}: torch has no such device here ({reason}); try cpu") from error

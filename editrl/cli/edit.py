"""`editrl edit`: one clip and one instruction to an edited clip."""

from pathlib import Path


def main(argv: list[str]) -> None:
    """Edit a video or an image by an instruction."""
    from editrl.cli.parser import CommandParser

    parser = CommandParser("editrl edit", main.__doc__)
    parser.add_argument("source", type=Path, help="video or image")
    parser.add_argument("instruction", help='what to change: "make the red circle blue"')
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the edited clip goes (.mp4 or .png)")
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of the editor")
    parser.add_argument("--policy", default="hunyuan_video", help="policy adapter")
    parser.add_argument("--transformer", help="folder of another transformer for the editor (a full checkpoint)")
    parser.add_argument("--adapter", help="folder of a LoRA adapter (a checkpoint of a LoRA run)")
    parser.add_argument("--reference", type=Path, help="reference image")
    parser.add_argument("--num_frames", type=int, help="frames of the clip to edit, 4k+1; default: all")
    parser.add_argument("--height", type=int, help="resize and centre-crop to this height")
    parser.add_argument("--width", type=int, help="resize and centre-crop to this width")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--shift", type=float, default=7.0, help="timestep shift (default 7)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="embedded guidance (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(argv)
    edit(options)


def edit(options) -> None:
    """Run the parsed command line."""
    import torch

    from editrl.data import EditDataset, write_image, write_video
    from editrl.registry import load_policy
    from editrl.rollout import edit_examples

    row = {"id": options.source.stem, "instruction": options.instruction, "source": str(options.source.absolute())}
    if options.reference is not None:
        row["reference_image"] = str(options.reference.absolute())
    kwargs = {} if options.transformer is None else {"transformer": options.transformer}
    policy = load_policy(options.policy, options.model_name_or_path, guidance_scale=options.guidance_scale, **kwargs)
    dataset = EditDataset(
        [row],
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        frame_multiple=policy.frame_multiple,
        size_multiple=policy.size_multiple,
        row_names=[str(options.source)],
    )
    example = dataset[0]
    if options.adapter is not None:
        from peft import PeftModel

        policy.transformer = PeftModel.from_pretrained(policy.transformer, options.adapter)
    policy.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    policy.transformer.eval()
    video = edit_examples(
        policy,
        policy.transformer,
        [example],
        num_inference_steps=options.num_inference_steps,
        shift=options.shift,
        noise_keys=[(options.seed,)],
    )[0]
    if options.output.suffix.lower() == ".mp4":
        write_video(options.output, video, example.fps)
    else:
        write_image(options.output, video[0])
    print(f"{options.output}: {len(video)} frames of {video.shape[-1]}x{video.shape[-2]} at {example.fps:g} fps")

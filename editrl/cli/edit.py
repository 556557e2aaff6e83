"""`editrl edit`: a clip and an instruction to an edited clip, or a manifest of them to a folder of edits."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from editrl.cli.parser import CommandParser, number
from editrl.errors import EditrlError

if TYPE_CHECKING:
    from torch import Tensor

    from editrl.data import EditExample
    from editrl.policy import FlowPolicy

REQUEST = ("instruction", "source", "reference_image")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: list[str]) -> int | None:
    """Edit a video or an image by an instruction, or every row of a manifest."""
    parser = CommandParser("editrl edit", main.__doc__)
    _add_arguments(parser)
    options = parser.parse_args(argv)
    _check(parser, options)
    if options.manifest is None:
        edit(options)
        return None
    from editrl.cli.edit_manifest import edit_manifest

    return edit_manifest(options)


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("source", type=Path, nargs="?", help="video or image")
    parser.add_argument("instruction", nargs="?", help='what to change: "make the red circle blue"')
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        required=True,
        help=f"the edited clip: .mp4, or {' '.join(IMAGES)}; with --manifest, a folder",
    )
    parser.add_argument("--manifest", type=Path, help="JSONL file of `source` and `instruction`, in place of these two")
    parser.add_argument("--overwrite", action="store_true", help="edit again what the folder has of other settings")
    parser.add_argument("--reference", type=Path, help="reference image")
    parser.add_argument("--side_by_side", "--side-by-side", action="store_true", help="write source | edit")
    parser.add_argument("--mute", action="store_true", help="leave out the sound of the source")

    model = parser.add_argument_group("the editor")
    model.add_argument("--model_name_or_path", required=True, help="folder or Hub id of the editor")
    model.add_argument("--policy", default="hunyuan_video", help="policy adapter; `editrl policies` lists them")
    model.add_argument("--transformer", help="folder of another transformer for the editor (a full checkpoint)")
    model.add_argument("--adapter", type=Path, help="folder of a LoRA adapter (a checkpoint of a LoRA run)")
    model.add_argument("--dtype", help="of the model: float32 (default), bfloat16 or float16")
    model.add_argument("--device", help="default: cuda where there is one")
    model.add_argument(
        "--context_parallel",
        type=number(int, least=1),
        default=1,
        help="of --num_processes, how many share each clip (1), for clips slow or too large for one GPU",
    )

    shape = parser.add_argument_group("length and size")
    shape.add_argument("--num_frames", type=number(int, least=1), help="edit the first frames only; default: all")
    shape.add_argument(
        "--frames",
        default="cut",
        choices=["cut", "refuse", "repeat"],
        help="a length that is not 4k+1: the frames over are cut (default), refused, or the last frame is repeated "
        "for the model, and the clip keeps its length",
    )
    shape.add_argument("--max_frames", type=number(int, least=1), help="edit longer clips in overlapping windows")
    shape.add_argument("--overlap", type=number(int, least=1), help="frames that windows share; default: a quarter")
    shape.add_argument("--resolution", type=number(int, least=1), help="shorter side at which to edit; default: as is")
    shape.add_argument("--height", type=int, help="edit at exactly this height and width")
    shape.add_argument("--width", type=int, help="edit at exactly this height and width")
    shape.add_argument(
        "--fit",
        default="crop",
        choices=["crop", "pad", "stretch"],
        help="into height and width: the centre is cropped and stays so (default); or padded or stretched, which is "
        "undone after the edit",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num_inference_steps", type=number(int, least=1), default=50, help="denoising steps (50)")
    sampling.add_argument("--shift", type=number(float, above=0), help="timestep shift; default: the policy's")
    sampling.add_argument("--ode_solver", choices=["euler", "dpm2"], default="euler", help="Euler, or second order")
    sampling.add_argument("--guidance_scale", type=float, default=1.0, help="embedded guidance (1)")
    sampling.add_argument(
        "--true_cfg_scale", type=float, default=1.0, help="classifier-free guidance, two forwards a step; 1 is none (1)"
    )
    sampling.add_argument("--seed", type=number(int, least=0), default=0, help="seed of the initial noise (0)")


def _check(parser: CommandParser, options: argparse.Namespace) -> None:
    """What is wrong with the options by themselves."""
    if options.manifest is None:
        if options.instruction is None:
            parser.error("give a source and an instruction, or a --manifest of them")
        if options.output.suffix.lower() not in (".mp4", *IMAGES):
            parser.error(
                f"--output {options.output}: what is written ends in .mp4, or for an image in {' '.join(IMAGES)}"
            )
        if options.overwrite:
            parser.error("--overwrite is for a --manifest; one clip is always written anew")
    elif options.source is not None or options.reference is not None:
        parser.error("the rows of --manifest say source, instruction and reference_image; give no other")
    if (options.height is None) != (options.width is None):
        parser.error(f"height is {options.height} and width is {options.width}; give both or neither")
    if options.height is not None and options.resolution is not None:
        parser.error("--resolution is one way to give a size, --height and --width the other; give one")
    if options.adapter is not None and not (options.adapter / "adapter_config.json").is_file():
        parser.error(
            f"--adapter {options.adapter}: there is no adapter_config.json; give the folder of a LoRA checkpoint"
        )


def edit(options: argparse.Namespace) -> None:
    """Edit one clip: first what is quickly found to be wrong, then the model."""
    from torch import distributed
    from tqdm import tqdm

    from editrl.cli.launch import make_folder, quiet_libraries
    from editrl.cli.process_groups import Processes
    from editrl.editing import edited_frames

    quiet_libraries()
    processes = Processes.of_torchrun(options.context_parallel) if options.context_parallel > 1 else Processes()
    if processes.groups > 1:
        raise EditrlError(
            f"one clip is shared by --context_parallel {processes.degree} processes, here are {processes.world}; start "
            f"{processes.degree}, or set it to {processes.world}"
        )
    device = find_device(options.device)
    policy_class = find_policy(options)
    row = {"id": options.source.stem, "instruction": options.instruction, "source": str(options.source.absolute())}
    if options.reference is not None:
        row["reference_image"] = str(options.reference.absolute())
    example = load_row(row, Path("."), "`editrl edit`", options)
    edited_frames(len(example.source), policy_class.frame_multiple, options.frames)
    if options.output.suffix.lower() in IMAGES and len(example.source) > 1:
        raise EditrlError(
            f"--output {options.output}: the source has {len(example.source)} frames; give a name that ends in "
            ".mp4, or --num_frames 1"
        )
    make_folder(options.output.absolute().parent)
    processes.connect(device)
    policy = load_editor(options, device)
    with tqdm(desc="editing", unit="forward", delay=2, disable=None if processes.leads else True) as bar:

        def progress(done: int, forwards: int) -> None:
            bar.total = forwards
            bar.update(done - bar.n)

        video = edit_example(policy, example, options.source, options, progress)
    if processes.leads:
        print(write_edit(video, example, options.source, options.output, options))
    if processes.world > 1:
        distributed.destroy_process_group()


def find_device(name: str | None):
    """The torch device of a name, by default the first GPU where there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).splitlines()[0]
        raise EditrlError(f"--device {name}: torch has no such device here ({reason}); try cpu") from error


def file_name(id: str) -> str:
    """The name, without a suffix, of the clip and of the record that --manifest writes for the row `id`."""
    return quote(id, safe=" ")


def find_policy(options: argparse.Namespace) -> type[FlowPolicy]:
    """The policy's class, before any weights; EditrlError for a size or windows that it cannot have."""
    from editrl.editing import check_size
    from editrl.windows import windows

    policy_class = _policy_arguments(options).find()
    if options.height is not None:
        check_size((options.height, options.width), policy_class.size_multiple)
    if options.max_frames is not None:
        windows(2 * options.max_frames, policy_class.frame_multiple, options.max_frames, options.overlap)
    return policy_class


def load_editor(options: argparse.Namespace, device) -> FlowPolicy:
    """The editor with its adapter, on the device, ready to edit, shared as the options say."""
    policy = _policy_arguments(options).load()
    if options.adapter is not None:
        from peft import PeftModel

        policy.transformer = PeftModel.from_pretrained(policy.transformer, options.adapter)
    policy.to(device)
    policy.transformer.eval()
    if options.context_parallel > 1:
        policy.enable_context_parallel(options.context_parallel)
    return policy


def _policy_arguments(options: argparse.Namespace):
    from editrl.cli.arguments import PolicyArguments

    loaded = {"transformer": options.transformer, "dtype": options.dtype, "guidance_scale": options.guidance_scale}
    return PolicyArguments(
        options.model_name_or_path,
        policy=options.policy,
        policy_kwargs={name: value for name, value in loaded.items() if value is not None},
    )


def load_row(row: dict[str, Any], root: Path, where: str, options: argparse.Namespace) -> EditExample:
    """The clip, instruction and reference image of a row. Of any length and size: `edit_clip` sees to these."""
    from editrl.data import EditDataset

    row = {key: row.get(key) for key in ("id", "instruction", "source", "reference_image")}
    dataset = EditDataset(
        [row], root=root, num_frames=options.num_frames, frame_multiple=1, size_multiple=1, row_names=[where]
    )
    return dataset[0]


def edit_example(
    policy: FlowPolicy,
    example: EditExample,
    source: Path,
    options: argparse.Namespace,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Edit one clip, of the file `source`: [F,3,H,W] in [0,1]."""
    import torch

    from editrl.editing import edit_clip

    size = options.resolution if options.height is None else (options.height, options.width)
    names = ("num_inference_steps", "shift", "seed", "true_cfg_scale", "ode_solver")
    names += ("frames", "fit", "max_frames", "overlap")
    try:
        return edit_clip(
            policy,
            example.source,
            example.instruction,
            reference_image=example.reference_image,
            size=size,
            progress=progress,
            **{name: getattr(options, name) for name in names},
        )
    except torch.OutOfMemoryError as error:
        raise EditrlError(
            f"{source}: {len(example.source)} frames of {example.source.shape[-1]}x{example.source.shape[-2]} need "
            "more memory than there is; give --max_frames, --resolution, or --dtype bfloat16"
        ) from error


def write_edit(video: Tensor, example: EditExample, source: Path, output: Path, options: argparse.Namespace) -> str:
    """Write an edited clip, with the sound of the file `source`. What was done, in one line."""
    from editrl.data import write_image, write_video
    from editrl.editing import side_by_side

    left_out = len(example.source) - len(video)
    video = side_by_side(example.source, video) if options.side_by_side else video
    rate = ""
    if output.suffix.lower() == ".mp4":
        write_video(output, video, example.fps, audio=None if options.mute else source)
        rate = f" at {example.fps:g} fps"
    else:
        write_image(output, video)
    rest = f"; the last {left_out} of the source are left out" if left_out else ""
    return f"{output}: {len(video)} frames of {video.shape[-1]}x{video.shape[-2]}{rate}{rest}"

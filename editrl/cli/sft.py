"""`editrl sft`: a recipe and a command line become a FlowSFTTrainer."""


def main(argv: list[str]) -> None:
    """Fine-tune an editor on pairs of source and target clips."""
    from editrl.cli.arguments import DataArguments, PolicyArguments
    from editrl.cli.config import parse_config
    from editrl.cli.launch import (
        adopt_geometry,
        arguments_of,
        make_folder,
        quiet_libraries,
        save,
        starting_point,
        whole_weights,
    )
    from editrl.errors import EditrlError
    from editrl.trainers import FlowSFTConfig, FlowSFTTrainer

    quiet_libraries()
    policy_args, data_args, args = parse_config((PolicyArguments, DataArguments, FlowSFTConfig), argv, "sft")
    # From cheap to dear: a missing target must not wait for the weights of a large model.
    resume = starting_point(args, data_args.eval_manifest is not None)
    datasets = data_args.load(policy_args.find())
    for dataset in datasets:
        for index in range(len(dataset)):
            if dataset.row(index)["target"] is None:
                raise EditrlError(
                    f"row {index} (id {dataset.ids[index]!r}) has no 'target' clip; SFT needs one in every row"
                )
    make_folder(args.output_dir)
    with whole_weights(args):
        policy = policy_args.load()
    adopt_geometry(datasets, policy)
    with arguments_of("sft"):
        trainer = FlowSFTTrainer(policy, args, *datasets, peft_config=policy_args.peft_config())
    trainer.train(resume_from_checkpoint=resume)
    save(trainer)

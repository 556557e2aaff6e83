"""`editrl sft`: a recipe and a command line become a FlowSFTTrainer."""


def main(argv: list[str]) -> None:
    """Fine-tune an editor on pairs of source and target clips."""
    from editrl.cli.arguments import DataArguments, PolicyArguments, refuse_to_overwrite, resume_from
    from editrl.cli.config import parse_config
    from editrl.trainers import FlowSFTConfig, FlowSFTTrainer

    policy_args, data_args, args = parse_config((PolicyArguments, DataArguments, FlowSFTConfig), argv, "sft")
    refuse_to_overwrite(args)
    policy = policy_args.load_policy()
    train_dataset, eval_dataset = data_args.load(policy)
    trainer = FlowSFTTrainer(policy, args, train_dataset, eval_dataset, policy_args.peft_config())
    trainer.train(resume_from_checkpoint=resume_from(args))
    trainer.save_model()

"""`editrl grpo`: a recipe and a command line become a FlowGRPOTrainer."""


def main(argv: list[str]) -> None:
    """Post-train an editor with GRPO on rewards."""
    from editrl.cli.launch import save

    trainer, resume = build(read_options(argv, "grpo"), "grpo")
    train(trainer, resume)
    save(trainer)


def read_options(argv: list[str], command: str) -> tuple:
    """Policy, data, reward and training arguments of a command line."""
    from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments
    from editrl.cli.config import parse_config
    from editrl.trainers import FlowGRPOConfig

    return parse_config((PolicyArguments, DataArguments, RewardArguments, FlowGRPOConfig), argv, command)


def build(options: tuple, command: str):
    """The trainer that `read_options` describe, and the checkpoint that it resumes from (None: it starts anew)."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from editrl.cli.launch import (
        adopt_geometry,
        arguments_of,
        make_folder,
        quiet_libraries,
        starting_point,
        whole_weights,
    )
    from editrl.trainers import FlowGRPOTrainer
    from editrl.trainers.display import LiveDisplay

    quiet_libraries()
    policy_args, data_args, reward_args, args = options
    # From cheap to dear: a missing caption must not wait for the weights of a large model.
    resume = starting_point(args, data_args.eval_manifest is not None)
    policy_class = policy_args.find()
    reward_sets = reward_args.load(args.reward_weights)
    datasets = data_args.load(policy_class)
    for rewards in reward_sets:
        for dataset in datasets:
            rewards.check(dataset)
    make_folder(args.output_dir)
    for rewards in reward_sets:
        rewards.to(args.device)
    with whole_weights(args):
        policy = policy_args.load()
    adopt_geometry(datasets, policy)
    with arguments_of(command):
        trainer = FlowGRPOTrainer(
            policy,
            reward_sets[0],
            args,
            *datasets,
            peft_config=policy_args.peft_config(),
            metric_funcs=reward_sets[1] if len(reward_sets) > 1 else None,
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveDisplay())
    return trainer, resume


def train(trainer, resume: str | None = None) -> None:
    """Train. The live table lets go of the terminal whatever happens: Ctrl-C, a reward that fails."""
    from editrl.trainers.display import LiveDisplay

    [display] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LiveDisplay)]
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        display.live.stop()

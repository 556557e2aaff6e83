"""`editrl grpo`: a recipe and a command line become a FlowGRPOTrainer."""

import os


def main(argv: list[str]) -> None:
    """Post-train an editor with GRPO on rewards."""
    trainer, resume = build(argv, "grpo")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def build(argv: list[str], command: str):
    """The trainer of a command line, and what it resumes from (None, True or a folder)."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise looks for one, and says so in a warning

    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments, refuse_to_overwrite, resume_from
    from editrl.cli.config import parse_config
    from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer
    from editrl.trainers.display import LiveDisplay

    policy_args, data_args, reward_args, args = parse_config(
        (PolicyArguments, DataArguments, RewardArguments, FlowGRPOConfig), argv, command
    )
    refuse_to_overwrite(args)
    # A wrong reward or column must not wait for the weights of a large model: cheap things first.
    rewards, metrics = reward_args.load(args.reward_weights)
    policy = policy_args.load_policy()
    train_dataset, eval_dataset = data_args.load(policy)
    trainer = FlowGRPOTrainer(
        policy, rewards, args, train_dataset, eval_dataset, policy_args.peft_config(), metric_funcs=metrics
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LiveDisplay())
    return trainer, resume_from(args)

"""Ready-made reward plugins, found through the `editrl.rewards` entry points."""

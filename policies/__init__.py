"""Policy adapters, one folder a model family, found through the `editrl.policies` entry points."""

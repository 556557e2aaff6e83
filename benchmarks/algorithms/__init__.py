"""Which RL settings learn, judged on the shapes world beside a random-reward control."""

"""Rewards over HTTP: the messages, and the server. The client is the reward `remote`."""

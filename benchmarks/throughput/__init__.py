"""How fast, and in how much memory, on the configuration of HunyuanVideo-13B."""

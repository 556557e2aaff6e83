"""HunyuanVideo with source latents on channels and a LLaVA instructor."""

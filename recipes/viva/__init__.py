"""VIVA: instruction editing with a VLM-conditioned HunyuanVideo (YAML recipes)."""

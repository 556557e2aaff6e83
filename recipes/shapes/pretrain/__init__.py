"""How the tiny weights of the shapes world are made; `python -m editrl.recipes.shapes.pretrain` rebuilds them all."""

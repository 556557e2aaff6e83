"""The embedded world: short clips of moving coloured shapes with exact ground truth."""

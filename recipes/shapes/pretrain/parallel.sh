#!/usr/bin/env bash
# Rebuilds all weights on one machine with two GPUs: parallel.sh OUT. The stages that do not need each other run together.
set -euo pipefail
out=$1
stage() { python3 -m editrl.recipes.shapes.pretrain --out "$out" --device "$@"; }
mkdir -p "$out"
stage cuda:0 vae &
(stage cuda:1 clip pickscore) &
stage cuda:1 vlm &
wait -n && wait -n && wait -n
stage cuda:0 sft sft-underediting

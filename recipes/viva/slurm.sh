#!/bin/bash
# A viva recipe on several nodes, by slurm. An interrupted job goes on from its last checkpoint.
#
#   sbatch slurm.sh sft  viva/sft  runs/viva-sft
#   sbatch slurm.sh grpo viva/grpo runs/viva-grpo --beta 0.01      # further words are options of the command
#
# With viva/sft set gradient_accumulation_steps to 8 on 16 GPUs: the global batch of the paper is 128.
# Every node must see the same working directory. This file lies beside the recipes: `editrl recipes viva/sft --path`.
# Licence: the weights of HunyuanVideo may not be used in the European Union, the United Kingdom and South Korea.
#
#SBATCH --job-name=editrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # one editrl a node; it starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue                   # a job that a node took with it starts again, and resumes
#SBATCH --output=editrl-%j.log
set -euo pipefail

command=${1:?usage: sbatch slurm.sh COMMAND RECIPE OUTPUT_DIR [--FIELD VALUE ...]}
recipe=${2:?which recipe, for example viva/grpo}
output=${3:?which output_dir}
shift 3

gpus=${SLURM_GPUS_ON_NODE:-8}       # of one node; all nodes have as many
if compgen -G "$output/checkpoint-*/complete" >/dev/null; then
  set -- "$@" --resume_from_checkpoint true
fi
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
EDITRL_IP=${nodes[0]}
EDITRL_PROCESSES=$((SLURM_JOB_NUM_NODES * gpus))
export EDITRL_IP EDITRL_PROCESSES

# One failing node ends the others. SLURM_NODEID is known on the node only, so it is filled in there.
srun --kill-on-bad-exit=1 bash -c 'exec editrl "$@" --num_processes "$EDITRL_PROCESSES" \
  --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" --main_process_ip "$EDITRL_IP"' \
  editrl "$command" --config "$recipe" --output_dir "$output" "$@"

#!/bin/bash
# Train on several machines under Slurm. When the job's time is up, it is requeued and continues. We have not run this on a
# cluster.
#   sbatch recipes/slurm.sh ddp recipes/mae_hivit.py --model hivit_b --data /data/imagenet --out /shared/runs/b
# The first argument is the name of a file in recipes/accelerate/, without .yaml. --out and --data must be on storage that
# all machines share.
#SBATCH --job-name=mimkit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
engine=$1
shift
gpus=${SLURM_GPUS_ON_NODE:-8}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-} # srun does not inherit it since Slurm 22.05
stopped=
# Three minutes before the time limit, every process receives SIGTERM and saves its step. Then the job is requeued
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "recipes/accelerate/$1.yaml" --num_machines "$SLURM_NNODES" \
    --num_processes "$(("$2" * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" --main_process_ip "$3" \
    --main_process_port 29500 "${@:4}" --resume auto' mimkit "$engine" "$gpus" "$address" "$@" &
wait $!
code=$?
if [ -n "$stopped" ]; then
  wait # the signal interrupted the first wait, and srun is still running
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $code

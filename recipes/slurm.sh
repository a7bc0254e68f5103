#!/bin/bash
# sbatch recipes/slurm.sh recipes/simmim_swinv2_b.yaml data.path=/data/imagenet
#
# One task per GPU. Five minutes before the time limit, or on preemption, Slurm sends a signal to every task. The tasks
# finish their step, save a checkpoint and exit with code 75; then the job is requeued and resumes.
#SBATCH --job-name=simmim
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log

# To shard weights, gradients and optimizer state, as in recipes/accelerate/zero3_8.yaml:
# export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true \
#     FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP FSDP_CPU_RAM_EFFICIENT_LOADING=false

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# --wait: when one task fails, the others are stopped after a minute.
srun --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec simmim run "$@"' simmim "$@" --precision "${PRECISION:-bf16}"
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code

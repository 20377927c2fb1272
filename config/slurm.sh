#!/bin/bash
# Train under SLURM, one torchrun on each machine. Five minutes before the time limit the run saves, the job
# queues again, and goes on where it stopped. From the top of the repository:
#
#     sbatch --nodes=2 config/slurm.sh config/train_gpt2.py --out_dir=out-gpt2

#SBATCH --job-name=gpt
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

cd "$SLURM_SUBMIT_DIR" || exit 1
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Each start has a store of its own, so that a machine may also join later. A rank gets 240 seconds to save.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

srun --kill-on-bad-exit=1 torchrun --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --nnodes="$SLURM_NNODES" \
    --rdzv_backend=c10d --rdzv_endpoint="$head_node:29500" --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 \
    train.py "$@" --init_from=auto &
step=$!

# srun passes the signal to every torchrun, torchrun to every rank, and the ranks save at their next step.
near_limit=
trap 'near_limit=yes; kill -USR1 $step' USR1
wait $step
code=$?
if [ $near_limit ]; then
    wait $step                              # the first wait ended with the signal
    code=$?
    [ $code -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

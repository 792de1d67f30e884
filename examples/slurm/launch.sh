# Sourced by the sbatch files of this folder: what a rank needs to know, and `launch SCRIPT [flags]`, which starts one
# process a GPU under srun and puts the job back into the queue when it was stopped before its end.

set -u

# The environment that has the project installed: `make install` creates .venv; or put your module or conda lines here.
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
# Or a container (pyxis and enroot):
container=() # (--container-image=/images/megatron_nepa.sqsh --container-mounts="$PWD:$PWD,/data:/data" --container-workdir="$PWD")

# Rendezvous: the first node, at a port that differs from job to job. Rank, world size and local rank the script takes
# from SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID: no ssh, no pdsh, no mpi4py.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

# Slurm older than 23.02 does not tell a job when its time is over.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    SLURM_JOB_END_TIME=$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null || true)
    export SLURM_JOB_END_TIME
fi

# Compiled code lies on the node's own disk: file locks on a shared home are slow or broken, and nodes may differ.
# DeepSpeed's Adam is compiled by the first rank of each node while the others wait.
node_cache=${NODE_CACHE:-/tmp/megatron_nepa-$(id -un)}
export TRITON_CACHE_DIR=$node_cache/triton TORCH_EXTENSIONS_DIR=$node_cache/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$node_cache/inductor

# NCCL finds NVLink and InfiniBand by itself; set these where it says that it did not.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}       # INFO prints at start which links it uses ("via NET/IB", "via P2P")
# export NCCL_SOCKET_IFNAME=ib0             # network of the rendezvous, where the first interface is not the right one
# export GLOO_SOCKET_IFNAME=ib0             # the same for the stop flags and checkpoints, which go over gloo
# export NCCL_IB_HCA=mlx5_0,mlx5_1          # adapters to use, where some are for storage
# On a time-out of a collective (10 minutes) torch writes which one each rank was in; see README.md.
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000

# srun does not take --cpus-per-task over from sbatch
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

launch() {
    # Ranks end by themselves, within seconds of the first, each with the status that says why. One that hangs is ended
    # after a minute; --kill-on-bad-exit=1 would kill slower ranks before they could say "bad input".
    srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" python -u "$@"
    local status=$?
    # 75: stopped by a signal or the nearing end of the job's time, state saved
    if [ $status -eq 75 ]; then
        echo "job $SLURM_JOB_ID goes back into the queue and will continue from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # until Slurm ends this script
    fi
    exit $status
}

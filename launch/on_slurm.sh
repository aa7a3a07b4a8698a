# The batch script, behind a header that sets COMMAND, WORKDIR and MAX_RESTARTS and makes `skyjax` known.
set -uo pipefail
failures_file="$WORKDIR/failures-$SLURM_JOB_ID"

trap : TERM # meant for the tasks, which have it too; this script waits for them
code=0
# Tasks end by themselves: those that lose a peer are aborted within a minute. Each sees all GPUs of its node, and jax
# takes that of its local rank.
srun --kill-on-bad-exit=0 --gpu-bind=none "${COMMAND[@]}" || code=$?
echo "skyjax ended with $code"

# Always again after a preemption or at the time limit (75), a limited number of times after a crash, a hang (124) or a
# lost peer (134), never after a mistake of the user (2).
case $code in
  0 | 2) exit "$code" ;;
  75) ;;
  *)
    echo "$code" >>"$failures_file"
    if [ "$(wc -l <"$failures_file")" -gt "$MAX_RESTARTS" ]; then exit "$code"; fi
    ;;
esac
# A job that was cancelled, or that SLURM itself puts back into the queue, is no longer RUNNING.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"

# Runs on every TPU VM, behind a header that sets IMAGE, COMMAND, BUCKETS, WORKDIR_BUCKET, MAX_RESTARTS and GRACE.
# It leaves the run to systemd, which keeps it when the connection is gone and starts it again after a reboot.
set -euo pipefail

mount_buckets() {
  local bucket options
  for bucket in "${BUCKETS[@]}"; do
    mkdir -p "/gcs/$bucket"
    if mountpoint -q "/gcs/$bucket"; then continue; fi
    # A checkpoint is written by all hosts and becomes visible by a rename: none may remember what it saw a minute ago.
    options=(--rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0)
    if [ "$bucket" != "$WORKDIR_BUCKET" ]; then options=(-o ro --metadata-cache-ttl-secs=-1); fi
    gcsfuse --implicit-dirs -o allow_other "${options[@]}" "$bucket" "/gcs/$bucket"
  done
}

# The same on every host, so that all start again together: always after a preemption (75), a limited number of times
# after a crash, a hang (124) or a lost peer (134), never after a mistake of the user (2).
train_again() {
  local code failures=0 stopped=0
  trap 'stopped=1' TERM
  while :; do
    docker rm --force skyjax >/dev/null 2>&1 || true
    code=0
    # Attached, docker hands SIGTERM on to the container and returns its exit code.
    docker run --name skyjax --privileged --net=host --ipc=host --volume=/gcs:/gcs "$IMAGE" "${COMMAND[@]}" || code=$?
    echo "skyjax ended with $code"
    case $code in 0 | 2) exit "$code" ;; 75) ;; *) failures=$((failures + 1)) ;; esac
    if [ "$stopped" = 1 ] || [ "$failures" -gt "$MAX_RESTARTS" ]; then exit "$code"; fi
    sleep 10
  done
}

if systemctl is-active --quiet skyjax; then
  echo "skyjax runs here already; stop it first" >&2
  exit 1
fi
if ! command -v gcsfuse >/dev/null; then
  deb=gcsfuse_3.2.0_amd64.deb
  folder=$(mktemp -d)
  curl -fsSL -o "$folder/$deb" "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.2.0/$deb"
  sudo apt-get install -qy "$folder/$deb"
fi
# The machine's own account reads the image, as it does the buckets.
registry="${IMAGE%%/*}"
case $registry in *-docker.pkg.dev) sudo gcloud auth configure-docker --quiet "$registry" ;; esac
sudo docker pull --quiet "$IMAGE"
{
  echo "set -euo pipefail"
  declare -p IMAGE COMMAND BUCKETS WORKDIR_BUCKET MAX_RESTARTS
  declare -f mount_buckets train_again
  echo "echo always > /sys/kernel/mm/transparent_hugepage/enabled # the runtime starts faster"
  echo "mount_buckets"
  echo "train_again"
} | sudo tee /var/lib/skyjax.sh >/dev/null
sudo tee /etc/systemd/system/skyjax.service >/dev/null <<UNIT
[Unit]
Description=skyjax train
Wants=network-online.target
After=network-online.target docker.service
[Service]
ExecStart=/bin/bash /var/lib/skyjax.sh
SuccessExitStatus=75
TimeoutStopSec=$GRACE
[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl enable --now skyjax

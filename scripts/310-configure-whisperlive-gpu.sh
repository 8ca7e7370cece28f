#!/usr/bin/env bash
# Install the live service on the GPU box, over SSH, as a hardened systemd unit. Run it on the edge machine.
#
#   scripts/310-configure-whisperlive-gpu.sh [--dry-run]
#
# Sends this checkout's last commit to /opt/whisper-worker there, installs its packages, fetches WHISPER_MODEL,
# writes the settings and starts the unit whisperlive. Repeating it updates what changed and restarts only then.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there is --dry-run." ;;
  esac
done
load_config
need GPU_URL
case $GPU_URL in
  https://*) die "GPU_URL is a gateway; there is no machine to log in to. Use deploy/salad/ instead." ;;
esac
need_program git
need_program ssh "apt-get install openssh-client"

settings() {
  local name
  for name in WHISPER_MODEL WHISPER_COMPUTE_TYPE WHISPERLIVE_PORT HEALTH_CHECK_PORT MAX_CLIENTS MAX_CONNECTION_TIME \
    WHISPER_API_KEYS WHISPER_LIVE_RECORDINGS MODEL_BATCH_SIZE LOG_FORMAT LOG_LEVEL; do
    [ -z "${!name:-}" ] || printf '%s=%s\n' "$name" "${!name}"
  done
}
[[ ${GPU_URL##*:} =~ ^[0-9]+$ ]] || die "GPU_URL needs a port, as in http://ADDRESS:9090."

say "Does the GPU box answer, and has it a card?"
gpu_ssh "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader" \
  || warn "No answer from nvidia-smi: the service would run on the processor. Install the card's driver first."

home=/opt/whisper-worker
say "Sending the code"
if [ -n "$DRY_RUN" ]; then
  gpu_ssh "sudo mkdir -p $home && sudo tar -x -C $home   # git archive HEAD"
  printf 'would send the settings:\n'
  settings | sed 's/^\(WHISPER_API_KEYS=\).*/\1.../; s/^/  /'
else
  git -C "$ROOT" diff --quiet HEAD || warn "Changes that are not committed are not sent."
  git -C "$ROOT" archive HEAD | gpu_ssh "sudo mkdir -p $home && sudo tar -x -C $home"
  git -C "$ROOT" rev-parse HEAD | gpu_ssh "sudo tee $home/.version >/dev/null"
  settings | gpu_ssh "sudo install -m 600 /dev/stdin $home/.settings"
fi
say "Installing; the first time takes minutes"
gpu_ssh "sudo $home/deploy/edge/install-gpu.sh $home/.settings"
say "Installed. Next: 040 opens its ports to the edge alone, 315 tests all of it."

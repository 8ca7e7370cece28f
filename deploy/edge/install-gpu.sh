#!/usr/bin/env bash
# Install the live service on this machine, which has the GPU. Run by scripts/310, over SSH; may be run by hand.
#
#   sudo deploy/edge/install-gpu.sh SETTINGS-FILE
#
# SETTINGS-FILE holds WHISPER_MODEL and the service's other settings, NAME=VALUE one a line. Every step may be
# repeated: what is there already is kept, what changed is replaced, the service is restarted if anything did.
# GPU_ROOT stands before /etc for trying it out; then no service is started.

set -euo pipefail

settings=${1:?usage: install-gpu.sh SETTINGS-FILE}
here=$(cd -- "$(dirname -- "$0")/../.." && pwd)
root=${GPU_ROOT:-}
home=/opt/whisper-worker

say() { printf '==> %s\n' "$*"; }

if [ -z "$root" ]; then
  [ "$(id -u)" = 0 ] || { echo "ERROR: run me as root (sudo)." >&2; exit 1; }
  [ "$here" = "$home" ] || { echo "ERROR: the checkout must be in $home, which the unit names." >&2; exit 1; }
  if ! id whisperlive >/dev/null 2>&1; then
    say "user whisperlive"
    useradd --system --no-create-home --home-dir /var/cache/whisperlive --shell /usr/sbin/nologin whisperlive
  fi
fi

[ -e "$here/.version" ] || echo unknown >"$here/.version"
say "packages, into $here/.venv (minutes the first time)"
"${PYTHON:-python3}" "$here/scripts/setup_venv.py" run

if command -v nvidia-smi >/dev/null && ! "$here/.venv/bin/python" -c 'import sys, torch
sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "WARNING: torch does not see the card, and the service would run on the processor: the driver must be 580 or" \
    "newer, for CUDA 13 (nvidia-smi shows both)." >&2
fi

model=$(sed -n 's/^WHISPER_MODEL=//p' "$settings" | tail -n 1)
say "model ${model:=small.en}"
"$here/.venv/bin/python" "$here/save_pipeline.py" --model "$model"

say "settings and unit"
mkdir -p "$root/etc/systemd/system"
changed=
# put FROM TO MODE: where they differ
put() {
  if ! cmp -s "$1" "$root$2"; then
    install -m "$3" "$1" "$root$2"
    changed=yes
  fi
}
put "$settings" /etc/whisperlive.env 600
put "$here/deploy/edge/whisperlive.service" /etc/systemd/system/whisperlive.service 644
# Which code the running service is.
put "$here/.version" /etc/whisperlive.version 644

if [ -n "$root" ]; then
  say "not started: GPU_ROOT is set"
  exit 0
fi
systemctl daemon-reload
systemctl enable --quiet whisperlive
if [ -n "$changed" ] || ! systemctl is-active --quiet whisperlive; then
  say "starting"
  systemctl restart whisperlive
fi

health=$(sed -n 's/^HEALTH_CHECK_PORT=//p' "$settings" | tail -n 1)
for _ in $(seq 90); do
  if curl -fsS -o /dev/null --max-time 2 "http://127.0.0.1:${health:-9999}/ready" 2>/dev/null; then
    say "ready"
    exit 0
  fi
  systemctl is-failed --quiet whisperlive && break
  sleep 2
done
echo "ERROR: the service did not become ready; its last lines:" >&2
journalctl -u whisperlive -n 20 --no-pager >&2 || true
exit 1

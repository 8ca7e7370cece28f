#!/usr/bin/env bash
# The 300 series: a live page over HTTPS, in front of a GPU box that only the edge can reach.
#
#   Browser --HTTPS, WSS--> edge (Caddy) --WS 9090, health 9999--> GPU box (whisper-worker live)
#
# In order: 305 the edge, 310 the GPU box, 040 its firewall, 320 the pages, 315 the test.
# To save money: 210 stops the GPU box, 220 starts it again. Each takes --dry-run and --help; all may be repeated.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"
usage
for script in "$ROOT"/scripts/[0-9]*-*.sh; do
  printf '%-40s %s\n' "${script##*/}" "$(sed -n '2s/^# //p' "$script")"
done

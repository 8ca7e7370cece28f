#!/usr/bin/env bash
# Test the whole way with speech, hop by hop, and say which one is broken. Run it on the edge machine.
#
#   scripts/315-test-whisperlive-connection.sh [--dry-run] [--audio FILE.wav]
#
# Exit status: 0 all is well; 1 a hop is broken, and the last line names the first such; 2 it could not be tested.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"
# shellcheck disable=SC2034 # die reads it.
DIE_STATUS=2

audio=$ROOT/deploy/edge/site/test-audio.wav
expect="fellow americans"
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY_RUN=yes ;;
    --audio)
      [ -n "${2:-}" ] || die "--audio needs a file."
      audio=$2 expect='' && shift
      ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $1; there are --dry-run and --audio." ;;
  esac
  shift
done
load_config
need EDGE_HOST GPU_URL
need_program curl
need_program python3

edge=https://$EDGE_HOST${EDGE_HTTPS_PORT:+:$EDGE_HTTPS_PORT}
client=$ROOT/deploy/edge/test_client.py
broken=

# hop NAME ADVICE COMMAND...: one of the ways that sound takes.
hop() {
  local name=$1 advice=$2 said
  shift 2
  if [ -n "$DRY_RUN" ]; then
    printf 'would test: %s: %s\n' "$name" "$(printf '%q ' "$@")"
    return
  fi
  if said=$("$@" 2>&1); then
    printf 'ok      %s%s\n' "$name" "${said:+: $(tail -n 1 <<<"$said")}"
  else
    printf 'BROKEN  %s%s\n' "$name" "${said:+: $(tail -n 1 <<<"$said")}"
    broken=${broken:-"$name. $advice"}
  fi
}

reach() {
  local host port
  host=$(gpu_host) port=${GPU_URL##*:}
  [[ $port =~ ^[0-9]+$ ]] || { case $GPU_URL in https:*) port=443 ;; *) port=80 ;; esac; }
  host=${host#[} host=${host%]}
  reaches "$host" "$port" && return
  if [ $? = 124 ]; then echo "no answer within 5 s: a firewall swallows it, or the box is off"; else echo "refused, or no such address"; fi
  return 1
}

# page URL [GREP]: what is there; curl's reason, or the status, where it is not.
page() {
  local body
  body=$(curl -sSk --max-time 10 -w '\n%{http_code}' "$1") || return 1
  case ${body##*$'\n'} in
    200) grep -q "${2:-}" <<<"$body" || { echo "something else than this project's page is served"; return 1; } ;;
    503) echo "503: the model is still loading, or the engine fails (the log says which)"; return 1 ;;
    502 | 504) echo "${body##*$'\n'}: Caddy cannot reach what is behind it"; return 1 ;;
    *) echo "status ${body##*$'\n'}"; return 1 ;;
  esac
}

speak() {
  WHISPER_API_KEY=${WHISPER_API_KEYS%%,*} python3 "$client" "$1" --insecure --quiet --speed 4 \
    --audio "$audio" ${expect:+--expect "$expect"}
}

WHISPER_API_KEYS=${WHISPER_API_KEYS:-}
socket=${GPU_URL/#http/ws}
hop "1 edge -> GPU box, port" "Is the box running (220), and its port open to this machine (040)?" reach
hop "2 edge -> GPU box, health" "On the box: systemctl status whisperlive. Is the health port open to this machine (040)?" \
  page "$GPU_HEALTH_URL/health" healthy
hop "3 GPU box, model" "Wait for the model to load; else, on the box: journalctl -u whisperlive." page "$GPU_HEALTH_URL/ready" ready
hop "4 edge -> live service, speech" "The port answers, the service does not transcribe: journalctl -u whisperlive on the box." \
  speak "$socket"
hop "5 Caddy, page over HTTPS" "On the edge: docker compose ps and logs in $EDGE_DIR; run 305, or 320 for the pages." \
  page "$edge/" "Live transcription"
hop "6 Caddy -> GPU box, health" "Caddy has another GPU_URL than .env-http: run 305." page "$edge/ready" ready
hop "7 browser's way: WSS through Caddy, speech" "Caddy does not pass WebSockets on: run 305." speak "${edge/#http/ws}/ws"

[ -z "$DRY_RUN" ] || exit 0
if [ -n "$broken" ]; then
  echo "BROKEN HOP: $broken"
  exit 1
fi
echo "All hops work: https://$EDGE_HOST/"

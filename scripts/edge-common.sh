#!/usr/bin/env bash
# Shared by the numbered scripts: their configuration, --dry-run, and how they speak. Sourced, never run.

set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
CONFIG=${EDGE_CONFIG:-$ROOT/.env-http}
EXAMPLE=$ROOT/deploy/edge/env-http.example
DRY_RUN=

say() { printf '==> %s\n' "$*"; }
warn() { printf 'WARNING: %s\n' "$*" >&2; }
die() {
  printf 'ERROR: %s\n' "$*" >&2
  exit "${DIE_STATUS:-1}"
}

# Print the comment at the top of the script that runs.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# run COMMAND...: what changes something goes through here.
run() {
  if [ -n "$DRY_RUN" ]; then
    # Where the command's own output is thrown away, this is still to be seen.
    printf 'would run: %s\n' "$(printf '%q ' "$@")" >&2
  else
    "$@"
  fi
}

# NAME=VALUE lines, never executed; what the environment has already wins.
load_config() {
  local line name value
  [ -r "$CONFIG" ] || die "There is no .env-http yet: cp ${EXAMPLE#"$ROOT"/} .env-http, fill it in, then try again."
  while IFS= read -r line || [ -n "$line" ]; do
    # As editors on Windows end lines.
    line=${line%$'\r'}
    case $line in '' | '#'*) continue ;; esac
    [[ $line =~ ^([A-Z][A-Z0-9_]*)=(.*)$ ]] || die "A line of .env-http is not NAME=VALUE: ${line%%=*}"
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    if [ -z "${!name+set}" ]; then
      case $value in \"*\" | \'*\') value=${value:1:-1} ;; esac
      export "$name=$value"
    fi
  done <"$CONFIG"
  : "${EDGE_DIR:=/opt/whisperlive}" "${HEALTH_CHECK_PORT:=9999}"
  [[ ${EDGE_HOST:-} =~ ^([A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])$ ]] \
    || die "EDGE_HOST must be a name or an address alone, without https:// before it or a path behind."
  if [ -n "${GPU_URL:-}" ]; then
    [[ $GPU_URL =~ ^https?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]+)?$ ]] \
      || die "GPU_URL must be http://HOST:PORT or https://HOST, nothing behind it."
    # The box listens where it is asked; a gateway's port is not the box's.
    case $GPU_URL in http://*) WHISPERLIVE_PORT=${BASH_REMATCH[2]#:} ;; esac
    # A box of one's own has a second port for its health; a gateway with a certificate has one for all.
    if [ -z "${GPU_HEALTH_URL:-}" ]; then
      case $GPU_URL in
        http://*) GPU_HEALTH_URL=http://$(gpu_host):$HEALTH_CHECK_PORT ;;
        *) GPU_HEALTH_URL=$GPU_URL ;;
      esac
    fi
  fi
  : "${WHISPERLIVE_PORT:=9090}"
  export EDGE_DIR WHISPERLIVE_PORT HEALTH_CHECK_PORT GPU_HEALTH_URL="${GPU_HEALTH_URL:-}"
}

# need NAME...: settings that this script cannot do without.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "$name is not set; write it into .env-http."
  done
}

need_program() {
  command -v "$1" >/dev/null || die "$1 is missing; install it first${2:+ ($2)}."
}

gpu_host() {
  local host=${GPU_URL#*://}
  if [[ $host == \[* ]]; then printf '%s]' "${host%%]*}"; else printf '%s' "${host%%:*}"; fi
}

# set_config NAME VALUE: write one setting into .env-http, in one step.
set_config() {
  local new
  if [ -n "$DRY_RUN" ]; then
    printf 'would set: %s=%s\n' "$1" "$2"
    return
  fi
  new=$(mktemp "$CONFIG.XXXXXX")
  grep -v "^$1=" "$CONFIG" >"$new" || true
  printf '%s=%s\n' "$1" "$2" >>"$new"
  chmod 600 "$new"
  mv "$new" "$CONFIG"
  export "$1=$2"
}

# As root, with sudo where we are not.
as_root() {
  if [ "$(id -u)" = 0 ]; then run "$@"; else run sudo "$@"; fi
}

compose() {
  as_root docker compose --project-directory "$EDGE_DIR" "$@"
}

gpu_ssh() {
  local options=(-o BatchMode=yes -o ConnectTimeout=15 -o StrictHostKeyChecking=accept-new)
  [ -z "${GPU_SSH_KEY:-}" ] || options+=(-i "$GPU_SSH_KEY")
  run ssh "${options[@]}" "${GPU_SSH:-ubuntu@$(gpu_host)}" "$@"
}

# The settings that the edge's Caddy reads, as docker compose's .env file.
edge_environment() {
  local name
  for name in EDGE_HOST EDGE_TLS EDGE_CERTS GPU_URL GPU_HEALTH_URL; do
    printf '%s=%s\n' "$name" "${!name:-}"
  done
}

# aws_ec2 ARGUMENTS...: reads and changes alike; callers put changes behind run.
aws_ec2() {
  aws ec2 --region "$AWS_REGION" --output text "$@"
}

# reaches HOST PORT: whether somebody listens there; 124 where nobody even refuses.
reaches() {
  # shellcheck disable=SC2016 # The inner shell expands them.
  timeout 5 bash -c '</dev/tcp/$0/$1' "$1" "$2" 2>/dev/null
}

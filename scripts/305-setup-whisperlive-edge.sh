#!/usr/bin/env bash
# Set up the edge: Docker, Caddy's configuration, HTTPS on ports 80 and 443. Run it on the edge machine.
#
#   scripts/305-setup-whisperlive-edge.sh [--dry-run]
#
# Reads .env-http (made from the example the first time). Run it again after every change of .env-http: switching
# from a GPU box to Salad is a new GPU_URL and this script.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there is --dry-run." ;;
  esac
done

if [ ! -e "$CONFIG" ]; then
  run install -m 600 "$EXAMPLE" "$CONFIG"
  [ -n "$DRY_RUN" ] || say "Made .env-http. Set EDGE_HOST and GPU_URL in it, then run this again."
  exit 0
fi
load_config
need EDGE_HOST GPU_URL
[ -n "$DRY_RUN" ] || [ "$EDGE_HOST" != 203.0.113.10 ] || die "EDGE_HOST is still the example's; set it in .env-http."

if ! command -v docker >/dev/null || ! docker compose version >/dev/null 2>&1; then
  say "Installing Docker"
  need_program apt-get "this script knows Debian and Ubuntu; elsewhere install Docker with compose yourself"
  as_root apt-get update -qq
  # Compose 2 is docker-compose-plugin in Docker's own repository, docker-compose-v2 in Ubuntu's, docker-compose in
  # Debian's from 13 on; before, that name stood for version 1.
  plugin=
  for name in docker-compose-plugin docker-compose-v2 docker-compose; do
    version=$(apt-cache show --no-all-versions "$name" 2>/dev/null | sed -n 's/^Version: //p') || true
    case $version in '' | 1.*) ;; *) plugin=$name && break ;; esac
  done
  [ -n "$plugin" ] || die "This system has no package of Docker's compose 2 (Debian has one from 13 on): install Docker \
as https://docs.docker.com/engine/install/ says, then run this again."
  # Docker's own packages and the system's shut each other out; an engine that is there stays.
  engine=docker.io
  [ "$plugin" != docker-compose-plugin ] || engine=docker-ce
  if command -v docker >/dev/null; then engine=; fi
  as_root apt-get install -y -qq ${engine:+"$engine"} "$plugin" curl python3
fi

say "Files into $EDGE_DIR"
as_root mkdir -p "$EDGE_DIR/site" "${EDGE_CERTS:-$EDGE_DIR/certs}"
as_root install -m 644 "$ROOT/deploy/edge/Caddyfile" "$ROOT/deploy/edge/docker-compose.yml" "$EDGE_DIR/"
staged=$(mktemp)
trap 'rm -f "$staged"' EXIT
edge_environment >"$staged"
as_root install -m 600 "$staged" "$EDGE_DIR/.env"
"$ROOT/scripts/320-update-edge-clients.sh" ${DRY_RUN:+--dry-run} --no-check

say "Checking the configuration, then starting Caddy"
compose run --rm --no-deps -T caddy caddy validate --config /etc/caddy/Caddyfile
# A changed environment makes a new container; pages reconnect by themselves. A changed file does not.
compose up -d --wait
compose exec -T caddy caddy reload --config /etc/caddy/Caddyfile
say "The edge is up: https://$EDGE_HOST/  Next: 310 (a GPU box of your own), then 040, then 315."

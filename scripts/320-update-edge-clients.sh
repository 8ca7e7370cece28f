#!/usr/bin/env bash
# Bring the edge's pages up to date with this checkout. Run it on the edge machine.
#
#   scripts/320-update-edge-clients.sh [--dry-run] [--no-check]
#
# Caddy reads files as they are asked for: nothing is restarted and no recording is interrupted.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

check=yes
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    --no-check) check= ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there are --dry-run and --no-check." ;;
  esac
done
load_config
need EDGE_HOST

site=$EDGE_DIR/site
as_root mkdir -p "$site"
# Scripts before the pages that name them; what is no longer part of the site goes last.
for kind in js css svg wav html; do
  for file in "$ROOT/deploy/edge/site/"*."$kind"; do
    target=$site/${file##*/}
    cmp -s "$file" "$target" && continue
    say "${file##*/}"
    as_root install -m 644 "$file" "$target.new"
    as_root mv "$target.new" "$target"
  done
done
for file in "$site/"*; do
  if [ -e "$file" ] && [ ! -e "$ROOT/deploy/edge/site/${file##*/}" ]; then
    say "${file##*/} is no longer part of the site"
    as_root rm -f "$file"
  fi
done
as_root install -m 755 "$ROOT/deploy/edge/test_client.py" "$EDGE_DIR/test_client.py"

if [ -n "$check" ] && [ -z "$DRY_RUN" ]; then
  need_program curl
  sum=$(sha256sum <"$ROOT/deploy/edge/site/main.js")
  served=$(curl -fsSk --max-time 10 "https://$EDGE_HOST${EDGE_HTTPS_PORT:+:$EDGE_HTTPS_PORT}/main.js" | sha256sum) \
    || die "The edge does not serve its pages; run 305, or look at: docker compose logs, in $EDGE_DIR."
  [ "$sum" = "$served" ] || die "The edge serves another version than this one; is EDGE_DIR ($EDGE_DIR) the one it uses?"
  say "The edge serves this version."
fi

#!/usr/bin/env bash
# Start the GPU box again, and restore what changes with its address. Run it on the edge machine.
#
#   scripts/220-startup-restore.sh [--dry-run]
#
# A public address is another one after every stop: GPU_URL in .env-http, Caddy's target and the firewall follow.
# Without Docker on this machine Caddy is left to you. May be repeated, also while the box is running.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there is --dry-run." ;;
  esac
done
load_config
need AWS_REGION GPU_INSTANCE_ID
need_program aws

case ${GPU_ADDRESS:=private} in
  private) kind=PrivateIpAddress ;;
  public) kind=PublicIpAddress ;;
  *) die "GPU_ADDRESS must be private or public." ;;
esac
# describe FIELD
describe() {
  aws_ec2 describe-instances --instance-ids "$GPU_INSTANCE_ID" --query "Reservations[0].Instances[0].$1"
}

state=$(describe State.Name) || die "The instance cannot be read; are AWS_REGION and GPU_INSTANCE_ID right, and may you?"
case $state in
  running | pending) say "The GPU box is $state already" ;;
  stopped | stopping)
    # One that is on its way down cannot be started yet.
    [ "$state" = stopped ] || run aws_ec2 wait instance-stopped --instance-ids "$GPU_INSTANCE_ID"
    say "Starting the GPU box"
    run aws_ec2 start-instances --instance-ids "$GPU_INSTANCE_ID" >/dev/null
    ;;
  *) die "The GPU box is $state; it cannot be started." ;;
esac
run aws_ec2 wait instance-running --instance-ids "$GPU_INSTANCE_ID"

address=$(describe "$kind")
if [ -z "$address" ] || [ "$address" = None ]; then
  [ -n "$DRY_RUN" ] || die "The GPU box has no $GPU_ADDRESS address; see GPU_ADDRESS in .env-http."
  say "Its address is known once it runs; GPU_URL, the firewall and Caddy would follow it."
  exit 0
fi
url=http://$address:$WHISPERLIVE_PORT
case ${GPU_URL:-} in
  "$url") say "Its address is the same: $address" ;;
  https://*) warn "GPU_URL is a gateway and stays so. To use the box, set GPU_URL=$url and run 305." && exit 0 ;;
  *)
    say "Its address is now $address"
    set_config GPU_URL "$url"
    # One that was written down names the old address.
    ! grep -q '^GPU_HEALTH_URL=.' "$CONFIG" || set_config GPU_HEALTH_URL ""
    GPU_URL=$url GPU_HEALTH_URL=http://$address:$HEALTH_CHECK_PORT
    ;;
esac

[ -z "${GPU_SECURITY_GROUP:-}" ] || "$ROOT/scripts/040-configure-edge-security.sh" ${DRY_RUN:+--dry-run} \
  || warn "The firewall could not be restored; run 040 when it can."
if command -v docker >/dev/null && [ -e "$EDGE_DIR/docker-compose.yml" ]; then
  say "Pointing Caddy at it"
  staged=$(mktemp)
  trap 'rm -f "$staged"' EXIT
  edge_environment >"$staged"
  as_root install -m 600 "$staged" "$EDGE_DIR/.env"
  compose up -d --wait
else
  warn "Caddy does not run here; run 305 on the edge with this .env-http."
fi

[ -z "$DRY_RUN" ] || exit 0
say "Waiting for the model, up to ${GPU_WAIT:=300} s"
for ((second = 0; second < GPU_WAIT; second += 2)); do
  if curl -fsS -o /dev/null --max-time 2 "$GPU_HEALTH_URL/ready" 2>/dev/null; then
    say "Ready. 315 tests all of it."
    exit 0
  fi
  sleep 2
done
die "The GPU box runs, its service is not ready: run 315, it says what is broken."

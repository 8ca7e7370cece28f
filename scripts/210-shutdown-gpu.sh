#!/usr/bin/env bash
# Stop the GPU box, so that it costs nothing but its disk. Run it anywhere with the AWS command line.
#
#   scripts/210-shutdown-gpu.sh [--dry-run] [--force]
#
# Refuses while somebody is speaking, or where that cannot be learned, unless --force. 220 starts it again.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

force=
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    --force) force=yes ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there are --dry-run and --force." ;;
  esac
done
load_config
need AWS_REGION GPU_INSTANCE_ID
need_program aws

state=$(aws_ec2 describe-instances --instance-ids "$GPU_INSTANCE_ID" --query 'Reservations[0].Instances[0].State.Name') \
  || die "The instance cannot be read; are AWS_REGION and GPU_INSTANCE_ID right, and may you?"
case $state in
  stopped) say "The GPU box is stopped already." && exit 0 ;;
  stopping) ;;
  running)
    if [ -z "$force" ]; then
      clients=$(curl -fsS --max-time 5 "$GPU_HEALTH_URL/status" 2>/dev/null \
        | sed -n 's/.*"clients": *\([0-9]*\).*/\1/p') || true
      [ -n "$clients" ] || die "Whether clients are connected could not be learned from ${GPU_HEALTH_URL:-GPU_URL, which is not set}. Stop it nevertheless with --force."
      [ "$clients" = 0 ] || die "$clients clients are connected. Try later, or stop it nevertheless with --force."
    fi
    say "Stopping the GPU box"
    run aws_ec2 stop-instances --instance-ids "$GPU_INSTANCE_ID" >/dev/null
    ;;
  *) die "The GPU box is $state; only a running one can be stopped." ;;
esac
run aws_ec2 wait instance-stopped --instance-ids "$GPU_INSTANCE_ID"
[ -n "$DRY_RUN" ] || say "Stopped. The pages say that the GPU box does not answer, until 220 starts it again."

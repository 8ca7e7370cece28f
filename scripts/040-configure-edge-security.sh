#!/usr/bin/env bash
# Open the GPU box's two ports to the edge alone, in its AWS security group. Run it on the edge machine.
#
#   scripts/040-configure-edge-security.sh [--dry-run]
#
# Ports WHISPERLIVE_PORT and HEALTH_CHECK_PORT end up open to the edge's address and to nobody else: every other
# rule for exactly these ports is taken away. Rules for other ports are left alone; wider ones are only reported.

. "$(dirname -- "${BASH_SOURCE[0]}")/edge-common.sh"

for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help) usage && exit 0 ;;
    *) die "Unknown argument $argument; there is --dry-run." ;;
  esac
done
load_config
need AWS_REGION GPU_SECURITY_GROUP
need_program aws
need_program curl

# The edge's address as the GPU box sees it: private within a VPC, else public.
own_address() {
  local metadata=${EDGE_METADATA:-http://169.254.169.254} token kind=local-ipv4
  [ "${GPU_ADDRESS:-private}" = private ] || kind=public-ipv4
  token=$(curl -fsS --max-time 3 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") \
    && curl -fsS --max-time 3 -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/$kind"
}

address=${EDGE_IP:-}
[ -n "$address" ] || address=$(own_address) || die "This machine's address is unknown here; set EDGE_IP in .env-http."
[[ $address =~ ^[0-9]+(\.[0-9]+){3}$ ]] || die "EDGE_IP is not an IPv4 address."
say "The edge is $address"

# A line a source: rule id, first port, last port, IPv4 or IPv6 range or group.
rules() {
  aws_ec2 describe-security-group-rules --filters "Name=group-id,Values=$GPU_SECURITY_GROUP" \
    --query 'SecurityGroupRules[?!IsEgress].[SecurityGroupRuleId,FromPort,ToPort,CidrIpv4||CidrIpv6||ReferencedGroupInfo.GroupId||PrefixListId,IpProtocol]'
}

listed=$(rules) || die "The security group cannot be read; are AWS_REGION and GPU_SECURITY_GROUP right, and may you?"
# First in, then out: a page that is connected now stays so.
for port in "$WHISPERLIVE_PORT" "$HEALTH_CHECK_PORT"; do
  if awk -v p="$port" -v a="$address/32" '$2 == p && $3 == p && $4 == a && $5 == "tcp" { found = 1 } END { exit !found }' <<<"$listed"; then
    say "Port $port is open to the edge already"
  else
    say "Opening port $port to the edge"
    run aws_ec2 authorize-security-group-ingress --group-id "$GPU_SECURITY_GROUP" --protocol tcp --port "$port" \
      --cidr "$address/32" >/dev/null
  fi
  while read -r id from to source protocol; do
    [ -n "$id" ] || continue
    if [ "$from" = "$port" ] && [ "$to" = "$port" ]; then
      [ "$source" != "$address/32" ] || continue
      say "Closing port $port to $source"
      run aws_ec2 revoke-security-group-ingress --group-id "$GPU_SECURITY_GROUP" --security-group-rule-ids "$id" >/dev/null
    elif [ "$protocol" = -1 ] || { [ "$from" -le "$port" ] && [ "$port" -le "$to" ]; }; then
      warn "A wider rule ($id, ports $from to $to) also opens port $port to $source; narrow it yourself."
    fi
  done <<<"$listed"
done

if [ -n "${GPU_URL:-}" ] && [ -z "$DRY_RUN" ]; then
  for port in "$WHISPERLIVE_PORT" "$HEALTH_CHECK_PORT"; do
    if reaches "$(gpu_host)" "$port"; then
      say "The edge reaches port $port"
    else
      warn "The edge does not reach port $port yet: is the service running (310, 220)? 315 tells more."
    fi
  done
fi

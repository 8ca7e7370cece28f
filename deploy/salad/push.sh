#!/bin/sh
# Push the built image where Salad can fetch it.
#   deploy/salad/push.sh [--dry-run] REGISTRY/NAME:VERSION
# Examples: docker.io/USER/whisperlive-salad:v1.0, public.ecr.aws/ALIAS/whisperlive-salad:v1.0. Log in first
# (docker login). A version is asked for because Salad's machines keep what "latest" was.
set -eu

case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

docker=${DOCKER:-docker}
do=
if [ "${1:-}" = --dry-run ]; then
  do='echo would run:'
  shift
fi
target=${1:?usage: push.sh [--dry-run] REGISTRY/NAME:VERSION}
case ${target##*/} in
  *:latest) echo "ERROR: give a version instead of latest." >&2 && exit 2 ;;
  *:?*) ;;
  *) echo "ERROR: $target has no version; add one, as in $target:v1.0." >&2 && exit 2 ;;
esac
# shellcheck disable=SC2086
$do $docker tag "${TAG:-whisperlive-salad:latest}" "$target"
# shellcheck disable=SC2086
$do $docker push "$target"
echo "Container group: set container.image to $target in deploy/salad/container-group.json."

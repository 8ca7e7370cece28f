#!/bin/sh
# Build the image for Salad.
#   deploy/salad/build.sh [MODEL]          default: small.en, baked in
# TAG (whisperlive-salad:latest) names the result, DOCKER (docker) the builder, BASE_IMAGE another base,
# TORCH=cpu a build to try without a card.
set -eu

case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
model=${1:-small.en}
docker=${DOCKER:-docker}
main=${MAIN_IMAGE:-whisper-worker:live}

set -- --build-arg "MODEL=$model" --build-arg "TORCH=${TORCH:-cuda}"
[ -z "${BASE_IMAGE:-}" ] || set -- "$@" --build-arg "BASE_IMAGE=$BASE_IMAGE"
# DOCKER may hold options of its own.
# shellcheck disable=SC2086
$docker build --target live "$@" -t "$main" "$root"
# .dockerignore keeps this directory from the main image; the thin one gets its one file in a context of its own.
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir -p "$context/deploy/salad"
cp "$root/deploy/salad/entrypoint.sh" "$context/deploy/salad/"
# shellcheck disable=SC2086
$docker build --build-arg "MAIN_IMAGE=$main" -f "$root/deploy/salad/Dockerfile.salad" \
  -t "${TAG:-whisperlive-salad:latest}" "$context"
echo "Built ${TAG:-whisperlive-salad:latest}. Next: deploy/salad/push.sh REGISTRY/NAME:VERSION"

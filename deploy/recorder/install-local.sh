#!/bin/sh
# Make the whisper command of this checkout a binary for the recorder, and fetch a model for it.
#   deploy/recorder/install-local.sh [MODEL]      default: small
# The checkout stays where it is. Root is needed for the default places; BIN and
# WHISPER_MODEL_CACHE name others.
set -eu

case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
model=${1:-small}
bin=${BIN:-/usr/local/bin}
cache=${WHISPER_MODEL_CACHE:-/var/lib/whisper}

"${PYTHON:-python3}" "$root/scripts/setup_venv.py" run
mkdir -p "$cache" "$bin"
# The recorder hands on its own environment, which need not know where the models are.
cat >"$bin/whisper" <<SCRIPT
#!/bin/sh
export WHISPER_MODEL_CACHE="\${WHISPER_MODEL_CACHE:-$cache}"
exec "$root/.venv/bin/whisper" "\$@"
SCRIPT
chmod 755 "$bin/whisper"
# Fetches the model, loads it once, and transcribes nothing.
"$bin/whisper" --model "$model" /dev/null

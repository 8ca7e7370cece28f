#!/bin/sh
# Pack the whisper-remote command into one file that needs nothing but Python 3.10 or newer,
# for recorders that must not carry a speech engine:
#   deploy/recorder/build-remote.sh /usr/local/bin/whisper-remote
set -eu

case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
output=${1:-whisper-remote}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for module in __init__ errors formats languages log schema settings types \
  audio/__init__ audio/jobdir doors/__init__ doors/remote \
  doors/cli_client doors/cli_inputs doors/cli_options doors/cli_outputs doors/cli_run; do
  mkdir -p "$work/whisper_worker/$(dirname "$module")"
  cp "$root/whisper_worker/$module.py" "$work/whisper_worker/$module.py"
done
# zipapp's own --main would throw the exit status away.
cat >"$work/__main__.py" <<'PYTHON'
import sys

from whisper_worker.doors.remote import main

sys.exit(main())
PYTHON
# Nothing is cached out of an archive: compiled here, it starts twice as fast on the same Python.
"$python" -m compileall -b -q --invalidation-mode unchecked-hash "$work"
"$python" -m zipapp "$work" --python '/usr/bin/env python3' --output "$output"
chmod 755 "$output"

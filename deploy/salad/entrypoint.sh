#!/bin/sh
# Say what this container found, one line each in the log's own format, then become the live service.
set -u

# log LEVEL MESSAGE
log() {
  if [ "${LOG_FORMAT:-json}" = json ]; then
    message=$(printf '%s' "$2" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')
    printf '{"timestamp":"%s","level":"%s","component":"entrypoint","message":"%s"}\n' \
      "$(date -u +%Y-%m-%dT%H:%M:%S.%3NZ)" "$1" "$message"
  else
    printf '%s | %s | %s\n' "$(date -u '+%Y-%m-%d %H:%M:%S')" "$1" "$2"
  fi >&2
}

log INFO "Container starting"
if command -v nvidia-smi >/dev/null 2>&1 \
  && gpu=$(timeout 10 nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader,nounits); then
  log INFO "GPU: $(printf '%s' "$gpu" | head -n 1)"
else
  log WARNING "No GPU: nvidia-smi does not answer, speech is transcribed by the processor"
fi
versions=$(python -c 'import platform, torch
print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"CUDA available: {torch.cuda.is_available()}")' 2>/dev/null) || versions="PyTorch cannot be imported"
log INFO "$versions"
for name in WHISPER_MODEL WHISPER_COMPUTE_TYPE MAX_CLIENTS MAX_CONNECTION_TIME SALAD_MACHINE_ID; do
  eval "value=\${$name-}"
  [ -z "$value" ] || log INFO "Environment: $name=$value"
done
if [ -n "${WHISPER_API_KEYS:-}" ]; then log INFO "Clients must show a key"; else log INFO "Clients need no key"; fi
log INFO "Starting the live service on port ${WHISPERLIVE_PORT:-9090}, health on port ${HEALTH_CHECK_PORT:-9999}"
# Both families of addresses: gateways come by IPv6, probes by IPv4.
exec whisper-worker live --host "${LIVE_HOST-}" "$@"

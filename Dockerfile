# One file for every image: GPU (the default) or CPU, with the model baked in or mounted, one target for each door.
#
#   docker build -t whisper-worker .                  the RunPod worker for GPUs (torch's default CUDA build)
#     --target serve | live                           the HTTP service, the live service
#     --build-arg TORCH=cpu                           for machines without a GPU; cu126, say, for older drivers
#     --build-arg MODEL=base                          another model from the hub; "none": one will be mounted
#
# Without MODEL, what whisper_model_cache/ in the build context holds is baked in, else the default model from the hub.
# docs/image.md has sizes and times.

ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# The environment: everything from requirements.txt, less what no door runs.
FROM ${BASE_IMAGE} AS packages
ARG TORCH=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl
ARG UNCOMPILED="/(transformers/models|sympy|networkx|mpmath|pygments|torch/(_inductor|testing/_internal|onnx)|pip)/"
SHELL ["/bin/sh", "-euc"]
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update; apt-get install --yes --no-install-recommends binutils; rm -rf /var/lib/apt/lists/*; \
    python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
COPY requirements.txt constraints.txt ./
# torch alone and first, so that no other package chooses its build. pip's own sources may have the CPU build already.
RUN --mount=type=cache,target=/root/.cache/pip \
    version=$(sed -n 's/^torch==//p' constraints.txt); \
    install="pip install --no-compile -c constraints.txt"; \
    if [ "$TORCH" = cuda ]; then $install --no-deps "torch==$version,!=$version+cpu"; \
    else $install --no-deps "torch==$version+$TORCH" \
      || $install --no-deps --index-url "$TORCH_INDEX/$TORCH" "torch==$version+$TORCH"; \
    fi; \
    $install -r requirements.txt setuptools
# Headers, C++ tests and tools of torch, the packages' own tests, and the descriptions of AWS services other than
# storage are not used at run time, and torch's symbol tables are for debuggers; the licences stay. Bytecode is
# written here because nobody may write it later: for what the doors import, not for the thousands of modules
# that they do not.
# The CUDA build of torch comes with triton, which would compile C at the first use of some kernels; there is no
# compiler here, and without triton torch takes its own kernels.
# (The path holds the interpreter's version, so that WORKDIR cannot name it.)
# hadolint ignore=DL3003
RUN cd /opt/venv/lib/python3*/site-packages || exit; \
    pip uninstall --quiet --yes triton; \
    rm -rf torch/include torch/share torch/test; \
    find torch/bin -type f ! -name torch_shm_manager -delete; \
    strip --strip-unneeded torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so; \
    find . -depth -type d -name tests -exec rm -rf {} +; \
    find botocore/data boto3/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts -exec rm -rf {} +; \
    ln -s "$PWD"/imageio_ffmpeg/binaries/ffmpeg-* /opt/venv/bin/ffmpeg; \
    python -m compileall -q -x "$UNCOMPILED" .

# The worker itself, installed beside the environment so that its layer is small.
FROM packages AS code
COPY pyproject.toml README.md LICENSE ./
COPY whisper_worker/ whisper_worker/
RUN pip install --no-deps --no-build-isolation --no-cache-dir --no-compile --prefix /worker . \
    && python -m compileall -q /worker

# The model. It is not saved over what was copied: a directory of a lower layer cannot be replaced in one step.
FROM packages AS model
ARG MODEL=auto
COPY --from=code /worker/ /opt/venv/
COPY save_pipeline.py /
COPY whisper_model_cache/ /given/
RUN save="python /save_pipeline.py --output /whisper_model_cache"; \
    case "$MODEL" in \
      none) mkdir /whisper_model_cache ;; \
      auto) if [ -e /given/model/config.json ]; then cp -R /given /whisper_model_cache; else $save; fi ;; \
      *) $save --model "$MODEL" ;; \
    esac

# What ships with the environment no longer installs anything.
FROM packages AS environment
RUN pip uninstall --yes --quiet setuptools pip && rm -f /opt/venv/bin/pip*

FROM ${BASE_IMAGE} AS runtime
# Debian's stable suite is the pin: the mirrors keep no version that a security update has replaced.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
    && useradd --uid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin worker
COPY --from=environment /opt/venv/ /opt/venv/
COPY --from=model /whisper_model_cache/ /whisper_model_cache/
COPY --from=code /worker/ /opt/venv/
COPY handler.py save_pipeline.py test_input.json LICENSE /
COPY scripts/inspect_config.py /scripts/
# Nothing is fetched at run time but the audio; save_pipeline.py with HF_HUB_OFFLINE=0 may still fill a volume.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    WHISPER_MODEL_CACHE=/whisper_model_cache \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="whisper-worker" \
      org.opencontainers.image.description="Self-hosted Whisper transcription: one engine, several doors" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /
USER 10001:10001
# tini hands SIGTERM on and buries the children of workers that ended.
ENTRYPOINT ["tini", "--"]

# The HTTP service.
FROM runtime AS serve
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:5000/health"]
CMD ["whisper-worker", "serve"]

# The live service; its health has a port of its own.
FROM runtime AS live
EXPOSE 9090 9999
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["sh", "-c", "exec curl -fsS -o /dev/null http://127.0.0.1:${HEALTH_CHECK_PORT:-9999}/health"]
CMD ["whisper-worker", "live"]

# The RunPod worker, which is what a build without --target gives. It listens nowhere: the platform hears its pings.
FROM runtime AS runpod
HEALTHCHECK NONE
CMD ["python", "-u", "/handler.py"]

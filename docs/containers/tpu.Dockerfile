# For TPU slices: docker build -f docs/containers/tpu.Dockerfile -t REGISTRY/stagecraft:tpu .
FROM python:3.12-slim
WORKDIR /opt/stagecraft
COPY . .
RUN pip install --no-cache-dir ".[tpu,data,huggingface]"
# What a host writes stays on it; the run itself goes to --workdir.
WORKDIR /job
ENTRYPOINT []

# For NVIDIA GPUs: docker build -f docs/containers/gpu.Dockerfile -t REGISTRY/stagecraft:gpu .
# CUDA comes with JAX's wheels; the hosts bring the driver and the container toolkit.
FROM python:3.12-slim
WORKDIR /opt/stagecraft
COPY . .
RUN pip install --no-cache-dir ".[cuda,data,huggingface]"
WORKDIR /job
ENTRYPOINT []

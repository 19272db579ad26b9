# The image that scripts/pod.py runs on GKE. Build it from the repository's root:
#   docker build --tag IMAGE --build-arg VERSION=0.2.0 .
ARG BASE=python:3.13-slim
FROM ${BASE}
# Version of the package; the image has no git history to read it from.
ARG VERSION=0.2.0.dev0
# EXTRAS=gcs,gguf,tensorboard,tpu also installs what GGUF models and TensorBoard need.
ARG EXTRAS=gcs,tpu
ENV PYTHONUNBUFFERED=1
WORKDIR /tpaw_jax
COPY . .
RUN SETUPTOOLS_SCM_PRETEND_VERSION="${VERSION}" \
    pip install --no-cache-dir --constraint requirements.lock --editable ".[${EXTRAS}]"
CMD ["tpaw", "--help"]

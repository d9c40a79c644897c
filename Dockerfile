# An image with medcg for CPU, CUDA or TPU:
#   docker build --build-arg DEVICE=cuda --tag=medcg:cuda .
#   docker run --rm --gpus=all --volume="$PWD:/work" medcg:cuda train --config=configs/llava15_7b.py
# DEVICE is cpu, cuda or tpu. CUDA's libraries come with JAX; the host needs NVIDIA's driver and container toolkit alone.
# BASE=python:3.12.12-slim-bookworm@sha256:... pins the base to its bytes.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
ARG DEVICE=cpu
RUN python -m venv /opt/medcg
WORKDIR /build
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY medcg_jax medcg_jax
COPY configs configs
RUN case "$DEVICE" in \
        cpu) extra="" ;; \
        cuda | tpu) extra="[$DEVICE]" ;; \
        *) echo "DEVICE=$DEVICE: expected cpu, cuda or tpu" >&2; exit 2 ;; \
    esac \
    && /opt/medcg/bin/pip install --no-cache-dir --no-input --prefer-binary --constraint=constraints.txt ".$extra" \
    && /opt/medcg/bin/medcg --version

FROM ${BASE}
# Of the NVIDIA container toolkit, which reads them where there is a GPU.
ENV PATH=/opt/medcg/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid=1000 --create-home medcg && install --directory --owner=medcg --group=medcg /work
COPY --from=build /opt/medcg /opt/medcg
# Of medcg, as a number, so that Kubernetes can tell that it is not root.
USER 1000
WORKDIR /work
ENTRYPOINT ["medcg"]
CMD ["--version"]

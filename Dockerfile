# The commands of featinv-pl in a container that runs as an ordinary user:
#
#   docker build --tag featinv-pl .
#   docker run --rm --volume "$PWD:/home/featinv/work" --shm-size 8g featinv-pl --help
#
# By default torch is the CPU build. For GPUs, give PyTorch's index of a CUDA version and run with `--gpus all`:
#
#   docker build --tag featinv-pl --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.13-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Extras, by commas: app, datasets, s3.
ARG EXTRAS=app
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
# Of two builds of one release pip takes that with a local version (+cpu, +cu130), which only TORCH_INDEX has.
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint /tmp/constraints.txt \
	"featinv-pl[$EXTRAS] @ file://$(ls /tmp/wheels/*.whl)"
# Whoever owns the mounted folder: --build-arg UID=$(id -u), unless that is 1000.
ARG UID=1000
RUN useradd --create-home --uid "$UID" featinv && install --directory --owner featinv /home/featinv/work
USER featinv
WORKDIR /home/featinv/work
ENTRYPOINT ["featinv-pl"]
CMD ["--help"]

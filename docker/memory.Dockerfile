# The memory service: FAISS and Redis client, no torch. FAISS=gpu takes FAISS' CUDA build.
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS build
ARG FAISS=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt docker/requirements.py docker/seal.sh ./
# pip works from outside: the service needs none.
RUN python -m venv --without-pip /opt/ramrec && python requirements.py "$FAISS" > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/ramrec/bin/python install --no-compile -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY model ./model
COPY memory_service ./memory_service
COPY api ./api
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt setuptools && \
    SOURCE_DATE_EPOCH=315532800 pip wheel --no-deps --no-build-isolation --wheel-dir . . && \
    pip --python /opt/ramrec/bin/python install --no-compile --no-deps ramrec-*.whl && sh seal.sh

FROM ${PYTHON}
COPY --from=build /seal/ /
COPY --from=build --chown=10001:10001 /seal-owned/ /srv/
# Banks on huge pages are searched a good twentieth faster.
ENV PATH=/opt/ramrec/bin:$PATH HOME=/tmp OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1
USER 10001:10001
EXPOSE 8001
HEALTHCHECK --interval=2s --timeout=3s --start-period=60s --retries=5 CMD ["ready", "8001"]
ENTRYPOINT ["python", "-m", "memory_service"]
CMD ["--host", "0.0.0.0", "--port", "8001"]

# The memory service: FAISS and Redis client, no torch.
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/ramrec
ENV PATH=/opt/ramrec/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model ./model
COPY memory_service ./memory_service
COPY api ./api
RUN pip install -c constraints.txt '.[cpu]'

FROM python:3.11-slim
RUN groupadd --gid 10001 ramrec && useradd --uid 10001 --gid ramrec --no-create-home ramrec
COPY --from=build /opt/ramrec /opt/ramrec
ENV PATH=/opt/ramrec/bin:$PATH OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Banks on huge pages are searched a good twentieth faster.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1
USER 10001:10001
EXPOSE 8001
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=5 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8001/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "memory_service"]
CMD ["--host", "0.0.0.0", "--port", "8001"]

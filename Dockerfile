# A server for a folder of weights, on CPUs:
#   docker build -t llama . && docker run -p 127.0.0.1:8000:8000 -v /path/to/weights:/model:ro llama
# It has been linted, and not been built yet.
FROM python:3.11-slim

# The compiled step is built by g++ at the first start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
# To save gigabytes of CUDA: --build-arg PIP_EXTRA_INDEX_URL=... with the index of PyTorch's CPU builds.
ARG PIP_EXTRA_INDEX_URL=""
RUN pip install --no-cache-dir -c constraints.txt ".[serve,formats,tools,vision]" \
    && useradd --create-home --uid 1000 llama
USER 1000
WORKDIR /home/llama
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready')"]
ENTRYPOINT ["llama", "serve"]
CMD ["/model", "--host", "0.0.0.0"]

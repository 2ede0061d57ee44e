# asit on a CPU, with what reads all formats, writes ONNX and serves the page.
#   docker build -t asit .
#   docker run --rm asit doctor
#   docker run --rm -v "$PWD:/data" asit embed RUN/model recordings/ --out vectors.csv
# Written without Docker at hand: not tried.
FROM python:3.13-slim

ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 PYTHONUNBUFFERED=1

# uv knows where torch's build for CPUs is: a tenth of the default one, which brings CUDA.
WORKDIR /usr/src/asit
RUN pip install uv
COPY constraints.txt pyproject.toml hatch_build.py README.md LICENSE ./
COPY src src
RUN uv pip install --system --torch-backend cpu --constraint constraints.txt ".[av,parquet,onnx,serve,remote]"

# XDG_CACHE_HOME holds features and converted models; mount a volume there to keep them.
RUN useradd --create-home asit && mkdir /data /cache && chown asit /data /cache
ENV XDG_CACHE_HOME=/cache
USER asit
WORKDIR /data
RUN asit doctor

EXPOSE 8000
ENTRYPOINT ["asit"]
CMD ["--help"]

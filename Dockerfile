# docker build -t llamachat . && docker run --gpus all -v "$PWD/runs:/llamachat/runs" llamachat make all
FROM nvidia/cuda:12.8.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /llamachat
COPY . .
RUN make setup
CMD ["make", "help"]

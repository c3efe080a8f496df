# headsplat with its pinned environment and the CUDA compiler that gsplat needs at first use.
#
#   docker build -t headsplat .
#   docker run --rm --gpus all -v /data:/data headsplat make train DATA=/data/shards OUT=/data/work
#
# Its instructions are checked by a test; no container runtime has built it yet.
FROM nvidia/cuda:13.0.1-devel-ubuntu22.04 AS cuda

FROM python:3.11-bookworm
COPY --from=cuda /usr/local/cuda /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda PATH=/usr/local/cuda/bin:/headsplat/.venv/bin:$PATH

# ssh joins hosts (make train NODES=), git tells which code made a checkpoint.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /headsplat
# The environment changes seldom, so it is a layer below the code; an editable install needs the rooms to be there.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir avatars shards eval train cluster launch && make setup
COPY . .

CMD ["make", "help"]

# mfm_dist with the tested versions. Untried: it was written where no image could be built.
#
#   docker build -t mfm_dist .
#   docker run --gpus all --ipc=host -v "$PWD":/work mfm_dist mfm-train --config configs/quickstart.yaml
#
# /work is the working folder: data/ and runs/ are written there, and a file of configs/ in it wins over the shipped one.
FROM python:3.11-slim
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt . && rm -rf /src/build
WORKDIR /work
CMD ["mfm-train", "--help"]

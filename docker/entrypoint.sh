#!/bin/sh
# `serve` (the default), `worker`, and every other command of dve. First it checks what a container gets wrong most often:
# a mounted folder that the image's uid can't write to. Then it is replaced, so that signals reach dve itself.
set -eu
for folder in "${DVE_DATA_DIR}" /tmp; do
  if ! [ -w "${folder}" ]; then
    echo "dve: the folder ${folder} can't be written by uid $(id -u): mount a volume or a tmpfs there, or a folder of the" \
      "host that belongs to uid 10001 (chown -R 10001:10001 FOLDER)" >&2
    exit 2
  fi
done
exec /opt/venv/bin/dve "$@"

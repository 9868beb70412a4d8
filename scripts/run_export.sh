#!/usr/bin/env bash
# Exports a checkpoint: bash scripts/run_export.sh --ckpt RUN [--file-format MINDIR|ONNX|AIR] [--encoder-only] [--out FILE]
exec bash "$(dirname "$0")/launch.sh" export none "$@"

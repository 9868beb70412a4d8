#!/usr/bin/env bash
# Evaluates a checkpoint (GPU), on DEVICE_NUM devices (environment, default 1):
# bash scripts/run_eval_gpu.sh --ckpt RUN [--data-dir DIR]
exec bash "$(dirname "$0")/launch.sh" eval gpu "$@"

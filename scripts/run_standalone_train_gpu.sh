#!/usr/bin/env bash
# Trains on one device (GPU): bash scripts/run_standalone_train_gpu.sh CONFIG [--key value]
exec bash "$(dirname "$0")/launch.sh" standalone_train gpu "$@"

#!/usr/bin/env bash
# Trains on one device (the CPU): bash scripts/run_standalone_train_cpu.sh CONFIG [--key value]
exec bash "$(dirname "$0")/launch.sh" standalone_train cpu "$@"

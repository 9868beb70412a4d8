#!/usr/bin/env bash
# Trains on one device (Ascend): bash scripts/run_standalone_train_ascend.sh CONFIG [--key value]
exec bash "$(dirname "$0")/launch.sh" standalone_train ascend "$@"

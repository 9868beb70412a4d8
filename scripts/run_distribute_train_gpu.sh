#!/usr/bin/env bash
# Trains on DEVICE_NUM GPUs: bash scripts/run_distribute_train_gpu.sh DEVICE_NUM CONFIG [--key value]
# Several machines: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment.
exec bash "$(dirname "$0")/launch.sh" distribute_train gpu "$@"

#!/usr/bin/env bash
# Trains on DEVICE_NUM Ascend devices: bash scripts/run_distribute_train_ascend.sh DEVICE_NUM CONFIG [--key value]
# Several machines: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment.
exec bash "$(dirname "$0")/launch.sh" distribute_train ascend "$@"

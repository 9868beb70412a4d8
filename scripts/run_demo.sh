#!/usr/bin/env bash
# From a fresh machine to a trained, checked encoder, everything under outputs/demo/. Needs Python 3.11 or 3.12.
# Run it again: what is done already is not done twice, and a run that was stopped goes on.
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_environment requirements.txt

out=outputs/demo
python -m localmim.data.builtin --root $out/images
python train.py --config config/demo/localmim_vit.yaml
python -m localmim.evaluation knn --ckpt $out/run --data-dir $out/images --out $out/knn.json
python -m localmim.analysis curve --run $out/run --out $out/loss_curve.png
python -m localmim.analysis reconstruct --ckpt $out/run --data-dir $out/images/val --out $out/reconstructions.png
echo "checkpoint and metrics.jsonl: $out/run"

#!/usr/bin/env bash
# From a fresh machine to a trained, checked, exported encoder and a report: bash scripts/run_demo.sh [vit|swin]
# Everything is under outputs/demo/ (vit) or outputs/demo_swin/. Needs Python 3.11 or 3.12.
# Run it again: what is done already is not done twice, and a run that was stopped goes on.
set -euo pipefail
variant=${1:-vit}
case $variant in
    vit) out=outputs/demo ;;
    swin) out=outputs/demo_swin ;;
    *)
        echo "error: expected vit or swin, got '$variant'" >&2
        exit 2
        ;;
esac
source "$(dirname "$0")/env.sh"
use_environment requirements.txt

images=outputs/demo/images
python -m localmim.data.builtin --root $images
python train.py --config "config/demo/localmim_$variant.yaml"
python -m localmim.evaluation knn --ckpt $out/run --data-dir $images --out $out/knn.json

# What it learned.
python -m localmim.analysis curve --run $out/run --out $out/loss_curve.png
python -m localmim.analysis reconstruct --ckpt $out/run --out $out/reconstructions.png $images/val/target/0099.jpg
python -m localmim.analysis attention --ckpt $out/run --query 48,30 --query 20,75 --out $out/attention.png $images/val/hive/0022.jpg
python -m localmim.analysis nmi --ckpt $out/run --untrained true --data-dir $images/val --out $out/nmi.png

# What can be done with the encoder: probe it, export the result, predict from the exported file.
python train.py --config "config/demo/linear_probe_$variant.yaml"
python eval.py --ckpt $out/linear_probe --out $out/linear_probe.json
python export.py --ckpt $out/linear_probe --file-format MINDIR --out $out/classifier.mindir --overwrite true
python -m localmim.predict --model $out/classifier.mindir $images/val/gear/0000.jpg

# All of it on one page.
python -m localmim.analysis report --run $out/run
echo "checkpoint, metrics.jsonl and report.html: $out/run"

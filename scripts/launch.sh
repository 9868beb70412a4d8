#!/usr/bin/env bash
# The body of the launchers run_*.sh: launch.sh KIND DEVICE [ARGUMENTS], DEVICE cpu, gpu, ascend or none.
# With PYTHON set, that Python is used as it is; otherwise .venv is made and filled the first time.
set -euo pipefail
kind=$1 device=$2
shift 2
case $kind in
    distribute_train) needed=2 arguments="DEVICE_NUM CONFIG [--key value]" ;;
    standalone_train) needed=1 arguments="CONFIG [--key value]" ;;
    eval) needed=2 arguments="--ckpt RUN [--data-dir DIR] [--config FILE] (on \$DEVICE_NUM devices, default 1)" ;;
    export) needed=2 arguments="--ckpt RUN [--file-format MINDIR|ONNX|AIR] [--encoder-only] [--out FILE]" ;;
esac
case $device in
    cpu) name=CPU requirements=requirements.txt ;;
    gpu) name=GPU requirements=requirements-gpu.txt ;;
    ascend) name=Ascend requirements=requirements.txt ;;
    none) name="" requirements=requirements.txt ;;
esac
script=run_$kind.sh
[ "$device" = none ] || script=run_${kind}_$device.sh
usage="usage: bash scripts/$script $arguments [--dry-run]; relative paths are below the repository's root"

dry_run=
words=()
for word in "$@"; do
    case $word in
        -h | --help)
            echo "$usage"
            exit 0
            ;;
        --dry-run) dry_run=--dry-run ;;
        *) words+=("$word") ;;
    esac
done
wrong=
[ ${#words[@]} -ge $needed ] || wrong=1
if [[ $kind = *_train ]]; then # neither DEVICE_NUM nor CONFIG is an option
    for word in "${words[@]:0:needed}"; do
        [[ $word != --* ]] || wrong=1
    done
fi
if [ -n "$wrong" ]; then
    echo "$usage" >&2
    exit 2
fi

source "$(dirname "$0")/env.sh"
if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    if ! command -v "$python" > /dev/null; then
        echo "error: PYTHON is $python, which is no program" >&2
        exit 2
    fi
    export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
else
    if [ -n "$dry_run" ]; then # installs nothing either
        if [ ! -x .venv/bin/python ]; then
            echo "error: --dry-run needs .venv, which the first run makes, or PYTHON set to a Python with the packages" >&2
            exit 2
        fi
        PATH=$PWD/.venv/bin:$PATH
    elif [ "$device" = gpu ] || [ "$device" = ascend ]; then
        python=.venv/bin/python
        [ -x "$python" ] || python=$(find_python)
        count=1
        [[ $kind != distribute_train || ! ${words[0]} =~ ^[1-9][0-9]*$ ]] || count=${words[0]}
        PYTHONPATH=src "$python" -m localmim.doctor --need-driver "$name" --count "$count" # before anything is downloaded
    fi
    [ -n "$dry_run" ] || use_environment "$requirements"
    python=python
fi

case $kind in
    distribute_train) launch=(--devices "${words[0]}" train.py --config "${words[@]:1}") ;;
    standalone_train) launch=(train.py --config "${words[@]}") ;;
    eval) launch=(--devices "${DEVICE_NUM:-1}" eval.py "${words[@]}") ;;
    export) launch=(export.py "${words[@]}") ;;
esac
[ -z "$name" ] || launch=(--device "$name" "${launch[@]}")
exec "$python" -m localmim.launch $dry_run "${launch[@]}"

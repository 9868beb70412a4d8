# Sourced by the other scripts: goes to the repository's root and makes .venv hold what a requirements file pins.
# Installs only when that file has changed since the last time.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in python3.11 python3.12 python3 python; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found; this project is tested with 3.11" >&2
    return 2
}

# use_environment REQUIREMENTS: makes .venv if need be, installs, and puts it first on the path
use_environment() {
    local requirements=$1 python stamp
    stamp=.venv/installed-$(cat requirements*.txt pyproject.toml | cksum | cut -d' ' -f1)-$(basename "$requirements" .txt)
    if [ ! -f "$stamp" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || return
            "$python" -m venv .venv || return
        fi
        echo "installing $requirements into .venv; the first time that takes some minutes (MindSpore is 780 MB)"
        .venv/bin/python -m pip install --disable-pip-version-check -r "$requirements" || return
        .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable . || return
        touch "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
}

#!/usr/bin/env bash
# Prints the path of a Chromium or Chrome, for the browser test: bash scripts/browser.sh [--install]
# With --install, where there is none: takes Debian's package, which needs apt-get and root.
# Exit code 1, and one line on stderr that says why, where there is none.
set -euo pipefail

find_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
        if command -v "$name" > /dev/null && "$name" --version > /dev/null 2>&1; then # a stub of a snap does not start
            command -v "$name"
            return
        fi
    done
    return 1
}

install_browser() {
    export DEBIAN_FRONTEND=noninteractive
    echo "installing Debian's package chromium for the browser test" >&2
    timeout 900 apt-get update -qq > /dev/null 2>&1 &&
        timeout 900 apt-get install -qq -y --no-install-recommends chromium > /dev/null 2>&1
}

find_browser && exit
why="found no Chromium or Chrome"
if [ "${1:-}" = --install ]; then
    if ! command -v apt-get > /dev/null; then
        why="$why, and no apt-get to install one"
    elif [ "$(id -u)" != 0 ]; then
        why="$why, and only root can install one"
    elif install_browser && find_browser; then
        exit
    else
        why="$why, and apt-get could not install the package chromium"
    fi
fi
echo "$why" >&2
exit 1

#!/usr/bin/env bash
# Make .venv and install requirements.txt into it, and every further file named:
#     bash scripts/setup.sh [tests/requirements.txt ...]
# A file is installed again only when it has changed, so a second run needs no network. PYTHON chooses the Python
# (default python3) that a new .venv is made with.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup.sh: error: $1" >&2
    exit 2
}

python=.venv/bin/python
if [ ! -e "$python" ]; then
    maker=${PYTHON:-python3}
    command -v "$maker" >/dev/null || fail "there is no $maker here; install Python 3.11 or newer, or name one in PYTHON"
    "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$maker is $("$maker" -V 2>&1); Python 3.11 or newer is needed, name one in PYTHON"
    "$maker" -m venv .venv || {
        rm -rf .venv
        fail "$maker cannot make a virtual environment; install its venv module (on Debian: apt-get install python3-venv)"
    }
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PWD/.venv has no working Python 3.11 or newer; remove that folder and run this again"

wanted=()
for file in requirements.txt "$@"; do
    [ -f "$file" ] || fail "there is no file $PWD/$file"
    # Each stamp is a copy of what was installed.
    cmp -s "$file" ".venv/installed/${file//\//_}" || wanted+=("$file")
done
[ ${#wanted[@]} -gt 0 ] || exit 0

"$python" -m pip install --disable-pip-version-check "${wanted[@]/#/--requirement=}" ||
    fail "could not install ${wanted[*]}; see the lines above"
"$python" -c 'import cv2' ||
    fail "OpenCV lacks a system library (on Debian: apt-get install libgl1 libglib2.0-0)"
mkdir -p .venv/installed
for file in "${wanted[@]}"; do
    cp "$file" ".venv/installed/${file//\//_}"
done

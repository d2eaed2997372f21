#!/usr/bin/env bash
# Create .venv and install requirements.txt and any further requirements files into it:
#     bash scripts/setup.sh [tests/requirements.txt ...]
# A file is installed again only after it has changed, so a second run needs no network. A new .venv is created with the
# Python that PYTHON names (default: python3).
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup.sh: error: $1" >&2
    exit 2
}

python=.venv/bin/python
if [ ! -e "$python" ]; then
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "there is no $base; install Python 3.11 or newer, or set PYTHON"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$base is $("$base" -V 2>&1); Python 3.11 or newer is needed; set PYTHON"
    "$base" -m venv .venv || {
        rm -rf .venv
        fail "$base cannot create a virtual environment; install its venv module (on Debian: apt-get install python3-venv)"
    }
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PWD/.venv has no working Python 3.11 or newer; remove that folder and run this again"

changed=()
for file in requirements.txt "$@"; do
    [ -f "$file" ] || fail "there is no file $PWD/$file"
    # .venv/installed has a copy of each file as it was installed.
    cmp -s "$file" ".venv/installed/${file//\//_}" || changed+=("$file")
done
[ ${#changed[@]} -gt 0 ] || exit 0

"$python" -m pip install --disable-pip-version-check "${changed[@]/#/--requirement=}" ||
    fail "could not install ${changed[*]}; see the lines above"
"$python" -c 'import cv2' ||
    fail "OpenCV lacks a system library (on Debian: apt-get install libgl1 libglib2.0-0)"
mkdir -p .venv/installed
for file in "${changed[@]}"; do
    cp "$file" ".venv/installed/${file//\//_}"
done

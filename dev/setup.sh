#!/bin/sh
# Make .venv from requirements.lock and install cvnb into it: `make setup` runs this.
# A stamp in .venv says what it was made from, so a second call does nothing; a mark says that an install has begun,
# so one that was interrupted starts anew.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/cvnb-installed
begun=$venv/cvnb-begun
fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python; fi
    seen=
    for name in "$@"; do
        found=$(version "$name") || continue
        if "$name" -c "$fits" >/dev/null 2>&1; then echo "$name"; return; fi
        case $found in
            3.11.*|3.12.*|3.13.*) seen="$seen $name ($found, without venv: on Debian and Ubuntu, apt install python3-venv)" ;;
            *) seen="$seen $name ($found)" ;;
        esac
    done
    echo "cvnb needs Python 3.11, 3.12 or 3.13 with its venv module. Found:${seen:- none of $*}." >&2
    echo "Install one, or say where it is: make setup PYTHON=/path/to/python3.12" >&2
    exit 1
}

# What the environment is made from. The folder counts, because the scripts in .venv/bin hold its path.
inputs="requirements.lock settings.ini setup.py pyproject.toml dev/setup.sh"
want=$(pwd; cat $inputs | cksum)
have=$(cat $stamp 2>/dev/null || true)
is_other_python() { [ -n "${PYTHON:-}" ] && [ "$(version $venv/bin/python)" != "$(version "$PYTHON")" ]; }
is_moved() { [ -n "$have" ] && [ "$(echo "$have" | head -n 1)" != "$(pwd)" ]; }
is_usable() { [ ! -e $begun ] && $venv/bin/python -c "$fits" 2>/dev/null && $venv/bin/python -m pip --version >/dev/null 2>&1; }

if [ "$have" = "$want" ] && [ -x $venv/bin/python ] && ! is_other_python; then exit 0; fi

started=$(date +%s)
python=$(find_python)
if is_moved || is_other_python || ! is_usable; then
    echo "setup: making .venv with Python $(version "$python")"
    rm -f $stamp   # first, so that a call which is stopped here leaves nothing that looks finished
    rm -rf $venv
    mkdir $venv
    touch $begun
    "$python" -m venv $venv
fi
touch $begun
rm -f $stamp
[ -x $venv/bin/uv ] || $venv/bin/python -m pip install --quiet --disable-pip-version-check uv
echo "setup: installing $(grep -c '^[a-zA-Z0-9]' requirements.lock) pinned packages; the first time this downloads some GB"
if [ -t 2 ]; then quiet=; else quiet=--quiet; fi
# Bytecode is compiled here because some environments forbid Python to write it later; imports then take twice as long.
$venv/bin/uv pip install $quiet --python $venv/bin/python --require-hashes --no-deps --compile-bytecode \
    -r requirements.lock
$venv/bin/uv pip install --quiet --python $venv/bin/python --no-deps --no-build-isolation -e .
rm $begun
echo "$want" > $stamp
echo "setup: .venv is ready after $(($(date +%s) - started)) s"

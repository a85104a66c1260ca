# shellcheck shell=bash
# Sourced by examples/quickstart/run, tests/run and .ci/run, which set -euo pipefail: makes .venv in the project's root,
# once, puts its commands first on the PATH and sets ROOT.
#
#   use_environment        cadapter and what it needs
#   use_environment test   and what the tests need
#
# PYTHON        the interpreter that makes .venv (default: python3); 3.10 or newer
# TORCH_SPEC    which torch is installed (default: torch==2.13.0); any that pyproject.toml accepts will do

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

use_environment() {
    local extra="${1:-}" venv="$ROOT/.venv" torch_spec="${TORCH_SPEC:-torch==2.13.0}" python wanted
    local stamp="$venv/installed${extra:+-$extra}"

    if [ ! -x "$venv/bin/python" ]; then
        python="${PYTHON:-python3}"
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "cadapter needs Python 3.10 or newer, and '$python' is none. Set PYTHON to one that is." >&2
            return 2
        fi
        echo "Making a virtual environment in $venv"
        "$python" -m venv "$venv" || { rm -rf -- "$venv"; return 2; }
    fi
    python="$venv/bin/python"

    # Installed once for each state of the two files that say what is needed.
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $torch_spec"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing cadapter${extra:+ and what its tests need}"
        # torch comes first and by itself, so that a build chosen by hand or by pip's own configuration (a CPU build, say)
        # is kept: the next line only asks for what pyproject.toml says of it.
        if ! "$python" -c 'import torch' 2>/dev/null; then
            "$python" -m pip install --quiet --disable-pip-version-check "$torch_spec"
        fi
        (cd "$ROOT" && grep -v '^torch==' constraints.txt |
            "$python" -m pip install --quiet --disable-pip-version-check -c /dev/stdin -e ".${extra:+[$extra]}")
        printf '%s' "$wanted" >"$stamp"
    fi
    PATH="$venv/bin:$PATH"

    # No model is downloaded, and the tokenizers' threads are kept apart from those of torch.
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
}

# part TEXT COMMAND…: a heading, the command as one would type it, and the seconds that it took.
part() {
    local text="$1" started=$SECONDS
    shift
    printf '\n=== %s\n$ %s\n' "$text" "$*"
    "$@"
    printf '(%d s)\n' $((SECONDS - started))
}

# shellcheck shell=bash
# Sourced by examples/quickstart/run, tests/run and .ci/run, which set -euo pipefail: makes .venv in the project's root,
# once, puts its commands first on the PATH and sets ROOT.
#
#   use_environment              cadapter and what it needs
#   use_environment test         and what the tests need
#   use_environment test llama   and llama-cpp-python, where it can be built (a C++ compiler, minutes, once)
#
# PYTHON        the interpreter that makes .venv (default: python3); 3.10 or newer
# TORCH_SPEC    which torch is installed (default: torch==2.13.0); any that pyproject.toml accepts will do

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

use_environment() {
    local venv="$ROOT/.venv" python

    if [ ! -x "$venv/bin/python" ]; then
        python="${PYTHON:-python3}"
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "cadapter needs Python 3.10 or newer, and '$python' is none. Set PYTHON to one that is." >&2
            return 2
        fi
        echo "Making a virtual environment in $venv"
        "$python" -m venv "$venv" || { rm -rf -- "$venv"; return 2; }
    fi

    install_once "${1:-}"
    if [ -n "${2:-}" ] && ! install_once "$2"; then
        echo "The extra '$2' could not be installed: tests that need it are skipped. To try again, remove" \
            "$(stamp_of "$2")." >&2
        wanted >"$(stamp_of "$2")"
    fi
    PATH="$venv/bin:$PATH"

    # No model is downloaded, and the tokenizers' threads are kept apart from those of torch.
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
}

# stamp_of EXTRA: the file that says that cadapter with this extra ("" for none) is installed, and in which state.
stamp_of() {
    printf '%s' "$ROOT/.venv/installed${1:+-$1}"
}

# The state of the two files that say what is needed, and of torch.
wanted() {
    printf '%s' "$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) ${TORCH_SPEC:-torch==2.13.0}"
}

# install_once EXTRA: cadapter with this extra ("" for none), unless that was done.
install_once() {
    local extra="$1" python="$ROOT/.venv/bin/python"
    if [ "$(cat "$(stamp_of "$extra")" 2>/dev/null)" = "$(wanted)" ]; then
        return 0
    fi
    echo "Installing cadapter${extra:+ and what its extra '$extra' needs}"
    # torch comes first and by itself, so that a build chosen by hand or by pip's own configuration (a CPU build, say)
    # is kept: the next line only asks for what pyproject.toml says of it.
    if ! "$python" -c 'import torch' 2>/dev/null; then
        "$python" -m pip install --quiet --disable-pip-version-check "${TORCH_SPEC:-torch==2.13.0}" || return
    fi
    (cd "$ROOT" && grep -v '^torch==' constraints.txt |
        "$python" -m pip install --quiet --disable-pip-version-check -c /dev/stdin -e ".${extra:+[$extra]}") || return
    wanted >"$(stamp_of "$extra")"
}

# part TEXT COMMAND…: a heading, the command as one would type it, and the seconds that it took.
part() {
    local text="$1" started=$SECONDS
    shift
    printf '\n=== %s\n$ %s\n' "$text" "$*"
    "$@"
    printf '(%d s)\n' $((SECONDS - started))
}

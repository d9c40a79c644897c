# Functions for the scripts beside this file: find a Python, make a virtual environment, install the project into it.
# Sourced with the checkout as the working directory. PYTHON=/path/to/python chooses the interpreter.

say() { printf '== %s\n' "$*"; }
fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# Prints "3.12" and so on for an interpreter that runs and can make virtual environments; nothing otherwise.
version_of() {
    "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# Prints the path of a working Python of one of the versions asked for, in that order of preference.
# pyenv's shims exist for versions that are not switched on, so every candidate is run before it is believed.
find_python() {
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/"python$version" \
            "/usr/local/bin/python$version" "/opt/homebrew/bin/python$version" python3 python; do
            if [ "$(version_of "$candidate")" = "$version" ]; then
                command -v "$candidate"
                return 0
            fi
        done
    done
    return 1
}

# Stops with the package that is missing if an interpreter of one of our versions runs but cannot make environments.
refuse_without_venv() {
    local version
    version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true)"
    case "$version" in
        3.11 | 3.12 | 3.13)
            fail "$(command -v "$1") is Python $version without the modules venv and ensurepip; on Debian or Ubuntu:" \
                "apt install python$version-venv" ;;
    esac
}

# Prints the interpreter to use for the main environment, or stops with one line.
choose_python() {
    local version
    if [ -n "${PYTHON:-}" ]; then
        version="$(version_of "$PYTHON")"
        case "$version" in
            3.11 | 3.12 | 3.13) command -v "$PYTHON" ;;
            "") refuse_without_venv "$PYTHON"
                fail "PYTHON=$PYTHON does not run, or has no modules venv and ensurepip; expected 3.11, 3.12 or 3.13" ;;
            *) fail "PYTHON=$PYTHON is Python $version; expected 3.11, 3.12 or 3.13" ;;
        esac
        return
    fi
    find_python 3.11 3.12 3.13 && return
    # Debian and Ubuntu keep these modules in a package of their own.
    for version in 3.13 3.12 3.11; do refuse_without_venv "python$version"; done
    refuse_without_venv python3
    fail "no Python 3.11, 3.12 or 3.13 was found (python3: $(python3 -V 2>&1 || echo none));" \
        "install one, or name one: PYTHON=/path/to/python bash $0"
}

# install_project VENV PYTHON EXTRAS: VENV holds the project afterwards, with the EXTRAS ("" or "test,parity"), in the
# versions of constraints.txt.
# What was installed is written down, which makes the second time quick.
install_project() {
    local venv="$1" python="$2" extras="$3" log="$1/install.log" part
    if [ "$(version_of "$venv/bin/python")" != "$(version_of "$python")" ]; then
        say "making $venv with $python"
        "$python" -m venv --clear "$venv" </dev/null || fail "$python could not make $venv"
    fi
    if is_installed "$venv" "$extras"; then return; fi
    say "installing the project${extras:+ with $extras} into $venv (minutes the first time)"
    # One try more: a registry that once answers slowly should not cost the whole run.
    if ! pip_install "$venv" "$extras" >"$log" 2>&1 && ! pip_install "$venv" "$extras" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "the installation failed: $(grep -m1 -i error "$log" || tail -n 1 "$log") (all of it: $log)"
    fi
    for part in base ${extras//,/ }; do echo "$(stamp) $part"; done >>"$venv/installed"
}

is_installed() {
    local part
    for part in base ${2//,/ }; do
        grep -qx "$(stamp) $part" "$1/installed" 2>/dev/null || return 1
    done
}

pip_install() {
    "$1/bin/python" -m pip install -qq --no-input --disable-pip-version-check --prefer-binary -c constraints.txt \
        -e ".${2:+[$2]}" </dev/null
}

# What decides whether an installation is still right: the project file, the versions, and where the checkout lies.
stamp() {
    { cat pyproject.toml constraints.txt; pwd; } | cksum | tr ' ' '-'
}

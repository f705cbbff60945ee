# Sourced by the launch scripts. `ensure_venv REQUIREMENT` makes .venv if it is missing, activates it, and installs the project.
# If another environment is active, it is used instead. PYTHON selects the interpreter for a new .venv.

ensure_venv() {
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  python -m pip install --quiet --editable "$1"
}

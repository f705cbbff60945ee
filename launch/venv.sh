# Sourced by the launch scripts: `ensure_venv REQUIREMENT` makes .venv if there is none, installs the project into it, and activates it.
# An environment that is active already is used as it is; PYTHON names another interpreter.

ensure_venv() {
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  python -m pip install --quiet --editable "$1"
}

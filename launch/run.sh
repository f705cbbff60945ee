# Sourced by the launch scripts. `run COMMAND …` prints the command, quoted for the shell, and runs it unless dry_run is set.

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [[ -z ${dry_run:-} ]]; then "$@"; fi
}

# Sourced by the launch scripts: `run COMMAND …` prints a command, quoted as a shell reads it, and runs it unless dry_run is set.

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [[ -z ${dry_run:-} ]]; then "$@"; fi
}

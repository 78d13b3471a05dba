# bootstrap DIRECTORY LOG TITLE COMMAND…
#
# Run COMMAND in DIRECTORY; what it prints goes to the end of LOG, and its end, when it fails, to
# stderr, too. Its status.
directory=$1 log=$2 title=$3
shift 3
cd -- "$directory" || exit
printf '== %s: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$title" >>"$log"
begin=$(($(wc -l <"$log") + 1))
"$@" >>"$log" 2>&1 </dev/null
status=$?
[ "$status" = 0 ] || tail -n "+$begin" -- "$log" | tail -n 20 >&2
exit "$status"

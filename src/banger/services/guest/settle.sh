# settle
#
# End all processes but the agent, so that files are as they stay, and remove what is temporary:
# nobody needs to carry it.
running() {
    for process in /proc/[0-9]*; do
        case ${process#/proc/} in
        1 | $$) ;;
        *) if [ -e "$process/exe" ]; then return 0; fi ;; # a thread of the kernel's has none
        esac
    done
    return 1
}
if running; then
    kill -TERM -1
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sleep 1
        running || break
    done
    kill -KILL -1
fi 2>/dev/null
for directory in /tmp /var/tmp; do
    if [ -d "$directory" ] && ! [ -L "$directory" ]; then
        rm -rf -- "$directory"/* "$directory"/.[!.]* "$directory"/..?*
    fi
done

# ssh PUBLIC-KEY
#
# Let whoever has the key in as the user who runs this, and print the public keys of the host.
# 90: there is no sshd. 91: no host has come by a key. 92: the key cannot be put where sshd looks.
[ -x /usr/sbin/sshd ] || exit 90
umask 077
mkdir -p "$HOME/.ssh" && cd "$HOME/.ssh" || exit 92
if ! grep -qxF -- "$1" authorized_keys 2>/dev/null; then
    if [ -s authorized_keys ] && [ -n "$(tail -c 1 authorized_keys)" ]; then
        echo >>authorized_keys || exit 92
    fi
    printf '%s\n' "$1" >>authorized_keys || exit 92
fi
# A guest that has just started makes its key now.
tries=0
while
    keys=$(cat /etc/ssh/ssh_host_*_key.pub 2>/dev/null) # of those that can be read
    [ -z "$keys" ]
do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || exit 91
    sleep 0.1
done
printf '%s\n' "$keys"

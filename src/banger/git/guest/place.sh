# place TARGET STAGING READ_ONLY
#
# Put STAGING at TARGET; what was there goes when that is done, now or with the next transfer.
set -e
target=$1 staging=$2 read_only=$3
old=$staging.old
[ -z "$read_only" ] || chmod -R a-w -- "$staging"
if [ -e "$target" ] || [ -L "$target" ]; then
    mv -T -- "$target" "$old"
fi
mv -T -- "$staging" "$target" || {
    [ ! -e "$old" ] || mv -T -- "$old" "$target"
    exit 1
}
rm -rf -- "$old" >/dev/null 2>&1 </dev/null &

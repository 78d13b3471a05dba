# begin TARGET STAGING REPLACE [DIRECTORY…]
#
# See that nothing is in the way at TARGET, and make STAGING, with its directories, beside it.
# 80: something is there, and REPLACE is empty.
set -e
target=$1 staging=$2 replace=$3
shift 3
# What a transfer that was cut off has left: in the middle of `place` it was the only copy.
if [ -e "$staging.old" ] && [ ! -e "$target" ]; then
    mv -T -- "$staging.old" "$target"
fi
rm -rf -- "$staging" "$staging.old"
if [ -z "$replace" ] && { [ -e "$target" ] || [ -L "$target" ]; }; then
    [ -d "$target" ] && [ ! -L "$target" ] && [ -z "$(ls -A -- "$target")" ] || exit 80
fi
mkdir -p -- "$staging"
for directory; do
    mkdir -p -- "$staging/$directory"
done

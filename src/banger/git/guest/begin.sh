# begin TARGET STAGING REPLACE [DIRECTORY…]
#
# See that nothing is in the way at TARGET, and make STAGING, with its directories, beside it.
# 80: something is there, and REPLACE is empty.
set -e
target=$1 staging=$2 replace=$3
shift 3
if [ -z "$replace" ] && { [ -e "$target" ] || [ -L "$target" ]; }; then
    [ -d "$target" ] && [ ! -L "$target" ] && [ -z "$(ls -A -- "$target")" ] || exit 80
fi
# What a transfer that was cut off has left.
rm -rf -- "$staging"
mkdir -p -- "$staging"
for directory; do
    mkdir -p -- "$staging/$directory"
done

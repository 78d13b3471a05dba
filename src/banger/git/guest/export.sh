# export DIRECTORY BASE WHAT [SUBMODULE BASE]…
#
# Print what is different in DIRECTORY from the commit BASE: as a patch (WHAT = patch), as one that
# has all of each file it takes away (plain: what is renamed, too), or (bundle) the commits that
# BASE does not have. A patch has what is different in each SUBMODULE from its own BASE, too.
#
# All that git writes goes to a directory of its own: neither the index nor the objects of the
# repository change. 81: no git, 82: no such commit, 83: no repository, 84: no commits, 85: that was
# all but what is in repositories within this one, which stderr names.
set -e
directory=$1 base=$2 what=$3
shift 3
command -v git >/dev/null || exit 81
cd -- "$directory" || exit 83
export GIT_OPTIONAL_LOCKS=0 GIT_CONFIG_COUNT=4
export GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
# The copy of an index would have its parts, and its cache, beside the original.
export GIT_CONFIG_KEY_1=core.splitIndex GIT_CONFIG_VALUE_1=false
export GIT_CONFIG_KEY_2=core.untrackedCache GIT_CONFIG_VALUE_2=false
export GIT_CONFIG_KEY_3=advice.addEmbeddedRepo GIT_CONFIG_VALUE_3=false
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

# check BASE: there is a repository here, and it has the commit.
check() {
    git rev-parse --absolute-git-dir >/dev/null || exit 83
    git rev-parse --verify --quiet "$1^{commit}" >/dev/null || exit 82
}

# others DIRECTORY: what git does not track, a line each; in a name NUL stands for the end of a line.
# A repository has a slash at its end.
others() {
    git ls-files -z --others --exclude-standard -- "$1" | tr '\n\0' '\0\n'
}

# patch BASE PREFIX: of the repository here, its paths behind PREFIX.
patch() {
    git_dir=$(git rev-parse --absolute-git-dir)
    objects=$(cd -- "$(git rev-parse --git-path objects)" && pwd -P)
    rm -rf -- "$scratch/objects" "$scratch/index"
    mkdir -p -- "$scratch/objects/info"
    printf '%s\n' "$objects" >"$scratch/objects/info/alternates"
    if [ -e "$git_dir/index" ]; then
        # With its time: what changed after that is compared by content.
        cp -p -- "$git_dir/index" "$scratch/index"
    fi
    renames=--no-renames # git names no prefix where it tells of renames
    [ "$what$2" != patch ] || renames=--find-renames
    export GIT_INDEX_FILE="$scratch/index" GIT_OBJECT_DIRECTORY="$scratch/objects"
    top=$(git rev-parse --show-toplevel)
    git add --all -- "$top" 2>"$scratch/said" || {
        # A repository without a commit within this one.
        git add --update -- "$top"
        others "$top" | LC_ALL=C grep -av '/$' | tr '\n\0' '\0\n' |
            git update-index -z --add --stdin
    }
    tree=$(git write-tree)
    {
        others "$top" | LC_ALL=C grep -a '/$' || true
        git diff-tree -r --diff-filter=A "$1" "$tree" | sed -n 's,^:000000 160000 .*\t,,p'
    } | while IFS= read -r within; do
        printf '%s%s\n' "$2" "${within%/}"
    done | sort -u >>"$scratch/left-out"
    git diff-tree -r -p --binary --full-index "$renames" --no-color --no-ext-diff --no-textconv \
        --ignore-submodules=all --src-prefix="a/$2" --dst-prefix="b/$2" "$1" "$tree"
    unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY
}

check "$base"
if [ "$what" = bundle ]; then
    [ "$(git rev-list --count HEAD --not "$base")" != 0 ] || exit 84
    branch=$(git symbolic-ref --quiet HEAD) || branch=HEAD
    git bundle create --quiet - "$branch" --not "$base"
    exit
fi
patch "$base" ''
while [ $# -ge 2 ]; do
    submodule=$1 own=$2
    shift 2
    [ "$base" != HEAD ] || own=HEAD
    if ! [ -e "$directory/$submodule/.git" ]; then
        continue # deinitialised, or gone
    fi
    cd -- "$directory/$submodule"
    if git rev-parse --verify --quiet "$own^{commit}" >/dev/null; then
        patch "$own" "$submodule/"
    else
        printf '%s\n' "$submodule" >>"$scratch/left-out"
    fi
done
if [ -s "$scratch/left-out" ]; then
    echo "left out, as repositories of their own:" >&2
    sort -u "$scratch/left-out" >&2
    exit 85
fi

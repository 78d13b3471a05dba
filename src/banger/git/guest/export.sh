# export DIRECTORY BASE WHAT [SUBMODULE…]
#
# Print what is different in DIRECTORY from the commit BASE: as a patch (WHAT = patch), as one that
# has all of each file it takes away (plain: what is renamed, too), or (bundle) the commits that
# BASE does not have. A patch has what is different in each SUBMODULE from its own base, too.
#
# All that git writes goes to a directory of its own: neither the index nor the objects of the
# repository change. 81: no git, 82: no such commit, 83: no repository, 84: no commits.
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
    renames=--find-renames
    [ "$what" = patch ] || renames=--no-renames
    export GIT_INDEX_FILE="$scratch/index" GIT_OBJECT_DIRECTORY="$scratch/objects"
    top=$(git rev-parse --show-toplevel)
    git add --all -- "$top" 2>"$scratch/said" || {
        # A repository without a commit within this one: they all are left out.
        echo "left out: repositories within this one" >&2
        git add --update -- "$top"
        git ls-files -z --others --exclude-standard -- "$top" | grep -zv '/$' |
            git update-index -z --add --stdin
    }
    tree=$(git write-tree)
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
for submodule; do
    cd -- "$directory/$submodule" || continue
    [ -e .git ] || continue # deinitialised, or gone
    own=refs/banger/base
    [ "$base" != HEAD ] || own=HEAD
    check "$own"
    patch "$own" "$submodule/"
done

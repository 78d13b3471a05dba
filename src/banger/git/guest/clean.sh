# clean STAGING
rm -rf -- "$1"

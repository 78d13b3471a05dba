/* Extended attributes as records of a pax header. */
#ifndef BANGER_TAR_XATTR_H
#define BANGER_TAR_XATTR_H

#include <stddef.h>

/* To be freed by the caller; no text when there are none. */
struct pax_records {
    char *text;
    size_t size;
};

/* Append those of `base` in the directory `parent` (a descriptor): user.*, capabilities, ACLs. A
 * link's are its own. `shown` is its name for people. */
void xattr_records(int parent, const char *base, const char *shown, struct pax_records *records);

#endif

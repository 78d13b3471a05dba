/* Who a program runs as: USER[:GROUP], names or numbers, as the guest's own files know them. */
#ifndef BANGER_ACCOUNT_H
#define BANGER_ACCOUNT_H

#include <stdbool.h>
#include <sys/types.h>

struct account {
    uid_t uid;
    gid_t gid;
    const char *name, *home, *shell;
    bool with_group; /* it was given: then it is the only one */
};

/* In a child job: ends by fail() for a user or a group that the guest does not have. NULL, and an
 * empty USER: who the agent is. uid 0 and other numbers need no /etc/passwd and no /etc/group. */
struct account account_find(const char *wanted);

/* Become that user, with the groups that /etc/group gives him. Ends by fail(). */
void account_become(const struct account *account);

#endif

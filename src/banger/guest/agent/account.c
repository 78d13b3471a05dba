#define _GNU_SOURCE
#include "account.h"

#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "files.h"

enum { GROUP_LIMIT = 1024 };

static const char PASSWD[] = "/etc/passwd";
static const char GROUP[] = "/etc/group";

/* The C library waits for ever in a FIFO that an image, or a guest's root, has put there. */
static bool is_no_file(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && !S_ISREG(info.st_mode);
}

static bool is_number(const char *text) {
    return text[0] != 0 && text[strspn(text, "0123456789")] == 0;
}

static unsigned number_of(const char *text, const char *what) {
    unsigned long number = strtoul(text, NULL, 10);
    if (number >= UINT_MAX)
        fail(EINVAL, "%s is not a %s id", text, what);
    return (unsigned)number;
}

static gid_t find_group(const char *wanted) {
    if (is_number(wanted))
        return number_of(wanted, "group");
    if (is_no_file(GROUP))
        fail(EINVAL, "%s is not a file", GROUP);
    struct group *entry = getgrnam(wanted);
    if (entry == NULL)
        fail(ENOENT, "there is no group %s in the guest", wanted);
    return entry->gr_gid;
}

static struct account find_user(const char *wanted) {
    struct account account = {geteuid(), getegid(), "root", "/root", "/bin/sh", false};
    uid_t number = is_number(wanted) ? number_of(wanted, "user") : account.uid;
    bool named = wanted[0] != 0 && !is_number(wanted);
    struct passwd *entry = NULL;
    if (!is_no_file(PASSWD))
        entry = named ? getpwnam(wanted) : getpwuid(number);
    else if (named && strcmp(wanted, "root") != 0)
        fail(EINVAL, "%s is not a file", PASSWD);
    if (entry != NULL) {
        account = (struct account){entry->pw_uid, entry->pw_gid, entry->pw_name, entry->pw_dir,
                                   entry->pw_shell, false};
        if (account.shell == NULL || account.shell[0] == 0)
            account.shell = "/bin/sh";
        if (account.home == NULL || account.home[0] == 0)
            account.home = "/";
    } else if (named && strcmp(wanted, "root") != 0) {
        fail(ENOENT, "there is no user %s in the guest", wanted);
    } else if (number != account.uid) {
        /* As container engines have it: in the group root, and at home in /. */
        account = (struct account){number, 0, wanted, "/", "/bin/sh", false};
    }
    return account;
}

struct account account_find(const char *wanted) {
    char *user = must_copy(wanted ? wanted : ""); /* the account's name may point into it */
    char *group = strchr(user, ':');
    if (group != NULL)
        *group++ = 0;
    struct account account = find_user(user);
    if (group != NULL && group[0] != 0) {
        account.gid = find_group(group);
        account.with_group = true;
    }
    return account;
}

void account_become(const struct account *account) {
    if (account->uid == geteuid() && geteuid() != 0 && !account->with_group)
        return;
    gid_t groups[GROUP_LIMIT] = {account->gid};
    int count = GROUP_LIMIT;
    /* More groups than that, or an /etc/group that cannot be read: the user's own alone. */
    if (account->with_group || is_no_file(GROUP) ||
        getgrouplist(account->name, account->gid, groups, &count) < 0)
        count = 1;
    if (setgroups((size_t)count, groups) < 0 || setgid(account->gid) < 0 ||
        setuid(account->uid) < 0)
        fail_errno("cannot become the user");
}

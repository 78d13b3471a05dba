/* What a minimal guest starts by itself: sshd and the scripts of /etc/banger/start.d. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "files.h"
#include "setup.h"

#define START_DIRECTORY "/etc/banger/start.d"
enum { HEAD_START_US = 500000 };
#define SERVICE_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static char *const service_environment[] = {"PATH=" SERVICE_PATH, "HOME=/root", "USER=root",
                                            "LOGNAME=root", "SHELL=/bin/sh", "LANG=C.UTF-8", NULL};

static pid_t spawn(char *const arguments[]) {
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        execve(arguments[0], arguments, service_environment);
        _exit(127);
    }
    return pid;
}

#define STARTED "/run/banger/started"

/* How many host keys there are; with `remove`, were. */
static int host_keys(bool remove) {
    DIR *directory = opendir("/etc/ssh");
    int found = 0;
    for (struct dirent *entry; directory && (entry = readdir(directory)) != NULL;)
        if (strncmp(entry->d_name, "ssh_host_", 9) == 0) {
            found++;
            if (remove && unlinkat(dirfd(directory), entry->d_name, 0) < 0)
                fail_errno("removing a host key");
        }
    if (directory)
        closedir(directory);
    return found;
}

#define HOST_KEY "/etc/ssh/ssh_host_ed25519_key"

/* One key, of the kind that every client of today takes: an RSA key takes seconds to find when the
 * processor is emulated. A machine that is copied while it looks for its key has the same in mind
 * as its copy: who has become somebody else meanwhile begins anew. */
static void make_host_key(void) {
    char path[64], public[80], before[64], after[64];
    snprintf(path, sizeof path, "/etc/ssh/.banger-key-%d", (int)getpid());
    snprintf(public, sizeof public, "%s.pub", path);
    char *const keygen[] = {"/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "",
                            "-f", path, NULL};
    while (host_keys(false) == 0 && access(keygen[0], X_OK) == 0) {
        int status = 0;
        read_line("/etc/machine-id", before, sizeof before);
        waitpid(spawn(keygen), &status, 0);
        read_line("/etc/machine-id", after, sizeof after);
        bool made = strcmp(before, after) == 0 && rename(public, HOST_KEY ".pub") == 0 &&
                    rename(path, HOST_KEY) == 0;
        unlink(path);
        unlink(public);
        if (made || status != 0)
            return;
    }
}

static void start_sshd(void) {
    static char *const sshd[] = {"/usr/sbin/sshd", "-D", NULL};
    if (access(sshd[0], X_OK) < 0)
        return;
    mkdir("/run/sshd", 0755);
    make_host_key();
    spawn(sshd);
}

/* A child that goes on when its job has answered: nobody waits for what it holds open. */
static void leave_job(void) {
    setsid();
    int null = open("/dev/null", O_RDONLY), console = open("/dev/console", O_WRONLY | O_NOCTTY);
    dup2(null, STDIN_FILENO);
    dup2(console < 0 ? null : console, STDOUT_FILENO);
    dup2(STDOUT_FILENO, STDERR_FILENO);
    for (int fd = STDERR_FILENO + 1; fd < 16; fd++)
        close(fd);
}

static void reload_sshd(void) {
    char line[16];
    if (read_line("/run/sshd.pid", line, sizeof line) && atoi(line) > 1)
        kill(atoi(line), SIGHUP);
}

void services_renew_keys(void) {
    if (host_keys(true) == 0)
        return;
    /* What runs already can wait; what is about to start needs its key. */
    if (access(STARTED, F_OK) == 0) {
        if (fork() != 0)
            return;
        leave_job();
        make_host_key();
        reload_sshd();
        _exit(0);
    }
    make_host_key();
    reload_sshd();
}

static int by_name(const struct dirent **left, const struct dirent **right) {
    return strcmp((*left)->d_name, (*right)->d_name);
}

static int is_script(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static void start_scripts(void) {
    struct dirent **entries;
    int count = scandir(START_DIRECTORY, &entries, is_script, by_name);
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "%s/%s", START_DIRECTORY, entries[i]->d_name);
        char *script[] = {path, NULL};
        spawn(script);
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
}

/* The work goes on after SETUP has answered, and begins a little later: what the machine was
 * started for has the processors to itself first. */
void services_start(void) {
    mkdir("/run/banger", 0755);
    int once = open(STARTED, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (once < 0)
        return;
    close(once);
    if (fork() != 0)
        return;
    leave_job();
    usleep(HEAD_START_US);
    if (chdir("/") == 0) {
        start_scripts();
        start_sshd();
    }
    _exit(0);
}

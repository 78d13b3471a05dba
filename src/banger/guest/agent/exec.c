/* Forks: programs with pipes or a PTY, and the agent's own jobs, which look the same from outside. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "account.h"
#include "files.h"
#include "launch.h"
#include "setup.h"

enum {
    PIPE_BYTES = 256 << 10,
    /* What a job may allocate: a hostile archive must not eat the guest's memory. */
    JOB_MEMORY_BYTES = 256 << 20,
};

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

extern char **environ;

struct plan {
    const struct request *request;
    bool in_guest;
    bool pty;
    bool detached;
    int child[4]; /* the child's ends, at their final numbers later: 0, 1, 2, REPORT_FD */
};

static void close_all(int *fds, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static bool make_pipe(int *read_end, int *write_end, bool agent_reads) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return false;
    *read_end = ends[0];
    *write_end = ends[1];
    fcntl(agent_reads ? ends[0] : ends[1], F_SETFL, O_NONBLOCK);
    fcntl(ends[0], F_SETPIPE_SZ, PIPE_BYTES); /* refused past a user's quota: then it is smaller */
    return true;
}

static bool make_pty(struct plan *plan, struct launched *launched) {
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    char name[64];
    uint64_t wanted = plan->request->number[EXEC_SIZE];
    if (plan->request->has[EXEC_SIZE])
        size = (struct winsize){.ws_row = (uint16_t)(wanted >> 16), .ws_col = (uint16_t)wanted};
    launched->out = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (launched->out < 0 || unlockpt(launched->out) < 0 ||
        ptsname_r(launched->out, name, sizeof name) != 0)
        return false;
    ioctl(launched->out, TIOCSWINSZ, &size);
    launched->in = fcntl(launched->out, F_DUPFD_CLOEXEC, 0);
    plan->child[0] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    plan->child[1] = fcntl(plan->child[0], F_DUPFD_CLOEXEC, 0);
    plan->child[2] = fcntl(plan->child[0], F_DUPFD_CLOEXEC, 0);
    return launched->in >= 0 && plan->child[0] >= 0 && plan->child[1] >= 0 && plan->child[2] >= 0;
}

/* Opened in the agent's own loop, where a guest's root may have put a FIFO in a device's place: that
 * must not block. */
static int open_device(const char *path, int flags) {
    struct stat info;
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (fstat(fd, &info) < 0 || !S_ISCHR(info.st_mode) || fcntl(fd, F_SETFL, flags) < 0) {
        close(fd);
        errno = ENODEV;
        return -1;
    }
    return fd;
}

static bool make_ends(struct plan *plan, struct launched *launched) {
    if (!make_pipe(&launched->report, &plan->child[REPORT_FD], true))
        return false;
    if (plan->pty)
        return make_pty(plan, launched);
    if (plan->detached) {
        const char *console = plan->in_guest ? "/dev/console" : "/dev/null";
        plan->child[0] = open_device("/dev/null", O_RDONLY);
        plan->child[1] = open_device(console, O_WRONLY);
        plan->child[2] = fcntl(plan->child[1], F_DUPFD_CLOEXEC, 0);
        return plan->child[0] >= 0 && plan->child[1] >= 0 && plan->child[2] >= 0;
    }
    return make_pipe(&plan->child[0], &launched->in, false) &&
           make_pipe(&launched->out, &plan->child[1], true) &&
           make_pipe(&launched->err, &plan->child[2], true);
}

/* Put the four descriptors in place and close all others, which are the agent's: an end of
 * another stream's pipe kept open here would keep that stream from its end of file. */
static void arrange_descriptors(const struct plan *plan) {
    int high[4];
    for (int i = 0; i <= REPORT_FD; i++)
        high[i] = fcntl(plan->child[i], F_DUPFD_CLOEXEC, 10);
    for (int i = 0; i <= REPORT_FD; i++)
        dup2(high[i], i);
    fcntl(REPORT_FD, F_SETFD, FD_CLOEXEC);
    if (syscall(SYS_close_range, REPORT_FD + 1, ~0U, 0) == 0)
        return;
    for (int fd = REPORT_FD + 1; fd < 4096; fd++) /* before Linux 5.9 */
        close(fd);
}

static void fresh_process(bool pty) {
    sigset_t none;
    sigemptyset(&none);
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) { /* select() breaks above 1024 */
        files.rlim_cur = files.rlim_max < 1024 ? files.rlim_max : 1024;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (score >= 0) {
        (void)!write(score, "0", 1);
        close(score);
    }
    setsid();
    if (pty)
        ioctl(STDIN_FILENO, TIOCSCTTY, 0);
}

/* Programs open their own streams by path as well (`> /dev/stderr`): the user must be allowed to.
 * A terminal is as login(1) leaves it, for write(1) and its like. */
static void give_streams(const struct plan *plan, const struct account *account) {
    enum { TTY_GROUP = 5 }; /* of devpts in every distribution */
    if (plan->detached || geteuid() != 0) /* the console and /dev/null are everyone's */
        return;
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fchown(fd, account->uid, plan->pty ? TTY_GROUP : (gid_t)-1) < 0)
            fail_errno("standard streams");
    if (plan->pty && fchmod(STDIN_FILENO, 0620) < 0)
        fail_errno("terminal");
}

static void set_environment(const struct request *request, const struct account *account,
                            bool pty) {
    clearenv();
    setenv("PATH", DEFAULT_PATH, 1);
    setenv("HOME", account->home, 1);
    setenv("USER", account->name, 1);
    setenv("LOGNAME", account->name, 1);
    setenv("SHELL", account->shell, 1);
    setenv("LANG", "C.UTF-8", 1);
    if (pty)
        setenv("TERM", "xterm-256color", 1);
    for (size_t i = 0; i < request->environment.count; i++)
        if (putenv(request->environment.items[i]) != 0)
            out_of_memory();
}

/* What the image says its programs run in is made when it is missing, by root. */
static void make_directory(const struct request *request) {
    const char *wanted = request->text[EXEC_DIRECTORY];
    if (wanted == NULL || !(request->number[EXEC_FLAGS] & EXEC_MAKE_DIRECTORY))
        return;
    if (!make_parents(wanted) || (mkdir(wanted, 0755) < 0 && errno != EEXIST))
        fail_errno(wanted);
}

static void enter_directory(const char *wanted, const struct account *account) {
    if (wanted == NULL) {
        if (chdir(account->home) < 0 && chdir("/") < 0)
            fail_errno("/");
    } else if (chdir(wanted) < 0) {
        int error = errno;
        fail(error, "cannot enter directory %s: %s", wanted, strerror(error));
    }
}

/* One try; returns the errno, but ELIBACC for a program that is there and of which the kernel does
 * not find what is to run it: the interpreter of a script, or the loader of a dynamic program. */
static int run_file(const char *path, char **arguments) {
    execve(path, arguments, environ);
    return errno == ENOENT && access(path, F_OK) == 0 ? ELIBACC : errno;
}

/* The same; but a file without #! is given to the shell, as a shell does. */
static int try_exec(const char *path, char **arguments) {
    int error = run_file(path, arguments);
    if (error != ENOEXEC)
        return error;
    size_t count = 0;
    while (arguments[count])
        count++;
    char **shell = must_alloc((count + 2) * sizeof *shell);
    shell[0] = (char *)"/bin/sh";
    shell[1] = (char *)path;
    memcpy(shell + 2, arguments + 1, count * sizeof *shell);
    execve(shell[0], shell, environ);
    return ENOEXEC;
}

static int search_exec(char **arguments) {
    const char *name = arguments[0];
    if (strchr(name, '/') != NULL)
        return try_exec(name, arguments);
    const char *directories = getenv("PATH");
    int error = ENOENT;
    for (const char *at = directories ? directories : DEFAULT_PATH; *name && at;) {
        size_t length = strcspn(at, ":");
        char path[PATH_MAX];
        if (snprintf(path, sizeof path, "%.*s%s%s", (int)length, at, length ? "/" : "", name) <
            (int)sizeof path) {
            int found = try_exec(path, arguments);
            if (found != ENOENT && found != ENOTDIR)
                error = found;
        }
        at = at[length] ? at + length + 1 : NULL;
    }
    return error;
}

static bool lets_nobody_in(const char *shell) {
    const char *slash = strrchr(shell, '/');
    const char *name = slash ? slash + 1 : shell;
    return strcmp(name, "nologin") == 0 || strcmp(name, "false") == 0;
}

/* Never returns when the shell runs; its errno. */
static int run_login(const struct account *account) {
    const char *slash = strrchr(account->shell, '/');
    char login[PATH_MAX];
    char *arguments[] = {login, NULL};
    snprintf(login, sizeof login, "-%s", slash ? slash + 1 : account->shell);
    return run_file(account->shell, arguments);
}

static const char *reason(int error, bool is_login, const char *name) {
    if (error == ELIBACC)
        return "the interpreter or loader that it needs is not in the guest";
    if (error == ENOENT && is_login)
        return "there is no such shell in the guest";
    return error == ENOENT && strchr(name, '/') == NULL ? "command not found" : strerror(error);
}

static _Noreturn void run_program(const struct plan *plan) {
    const struct request *request = plan->request;
    struct account account = account_find(request->text[EXEC_USER]);
    bool is_login = request->arguments.count == 0;
    if ((request->number[EXEC_FLAGS] & EXEC_ANY_LOGIN) && lets_nobody_in(account.shell))
        account.shell = "/bin/sh";
    give_streams(plan, &account);
    make_directory(request);
    account_become(&account);
    set_environment(request, &account, plan->pty);
    enter_directory(request->text[EXEC_DIRECTORY], &account);
    int error = is_login ? run_login(&account) : search_exec(request->arguments.items);
    const char *name = is_login ? account.shell : request->arguments.items[0];
    bool is_missing = error == ENOENT || error == ENOTDIR || error == ELIBACC;
    uint32_t status = is_missing ? 127 : 126;
    char message[480];
    snprintf(message, sizeof message, "%s: %s", name, reason(error, is_login, name));
    if (plan->detached)
        fail_exit(EXIT_EXITED, status, message);
    dprintf(STDERR_FILENO, "%s\n", message);
    _exit((int)status);
}

static const uint64_t *number_of(const struct request *request, int tag) {
    return request->has[tag] ? &request->number[tag] : NULL;
}

static _Noreturn void run_job(const struct request *request) {
    struct rlimit memory = {JOB_MEMORY_BYTES, JOB_MEMORY_BYTES};
    /* A job that sets the guest up starts programs, which must not inherit a limit. */
    if (request->kind != KIND_SETUP)
        setrlimit(RLIMIT_DATA, &memory);
    switch (request->kind) {
    case KIND_READ:
        job_read(request->text[FILE_PATH]);
        break;
    case KIND_WRITE:
        job_write(request->text[FILE_PATH], number_of(request, FILE_MODE),
                  number_of(request, FILE_UID), number_of(request, FILE_GID));
        break;
    case KIND_PACK:
        tar_pack(STDOUT_FILENO, request->text[TREE_PATH], request->text[TREE_NAME],
                 request->number[TREE_FLAGS]);
        break;
    case KIND_UNPACK:
        tar_unpack(STDIN_FILENO, request->text[TREE_PATH], request->text[TREE_NAME]);
        break;
    case KIND_STAT:
        job_stat(request->text[FILE_PATH]);
        break;
    case KIND_STATS:
        job_stats();
        break;
    case KIND_SOCKETS:
        job_sockets();
        break;
    case KIND_LISTENERS:
        job_listeners();
        break;
    default:
        job_setup(request);
    }
    _exit(0);
}

static bool check(const struct request *request, bool in_guest, struct failure *why) {
    if (request->kind == KIND_SETUP && !in_guest) {
        failure_set(why, EPERM, "this agent does not run a machine");
        return false;
    }
    if (request->kind != KIND_EXEC)
        return true;
    uint64_t flags = request->number[EXEC_FLAGS];
    bool login = flags & EXEC_LOGIN;
    if (flags > (EXEC_PTY | EXEC_LOGIN | EXEC_DETACHED | EXEC_MAKE_DIRECTORY | EXEC_ANY_LOGIN) ||
        ((flags & EXEC_PTY) && (flags & EXEC_DETACHED)) ||
        login != (request->arguments.count == 0) ||
        (!login && request->arguments.items[0][0] == 0)) {
        failure_set(why, EINVAL, "the program to run is missing, or the flags do not go together");
        return false;
    }
    return true;
}

bool launch(const struct request *request, bool in_guest, struct launched *launched,
            struct failure *why) {
    struct plan plan = {.request = request, .in_guest = in_guest, .child = {-1, -1, -1, -1}};
    *launched = (struct launched){.pid = -1, .in = -1, .out = -1, .err = -1, .report = -1};
    if (!check(request, in_guest, why))
        return false;
    plan.pty = request->kind == KIND_EXEC && (request->number[EXEC_FLAGS] & EXEC_PTY);
    plan.detached = request->kind == KIND_EXEC && (request->number[EXEC_FLAGS] & EXEC_DETACHED);
    launched->pty = plan.pty;
    launched->detached = plan.detached;
    if (make_ends(&plan, launched))
        launched->pid = fork();
    if (launched->pid == 0) {
        arrange_descriptors(&plan);
        fresh_process(plan.pty);
        if (request->kind == KIND_EXEC)
            run_program(&plan);
        run_job(request);
    }
    int error = errno;
    close_all(plan.child, 4);
    if (launched->pid > 0)
        return true;
    int ours[] = {launched->in, launched->out, launched->err, launched->report};
    close_all(ours, 4);
    failure_set(why, error, "cannot start a process in the guest: %s", strerror(error));
    return false;
}

/* Preloaded into a server: remembers what a disk would have if the power went now.

   LOST_PAGES_STORE is the folder that is watched, LOST_PAGES_DISK a folder for what is on the disk:
   files/ID        the bytes of a file when it was last synced
   folders/PATH    a line "KIND ID NAME" for each name in a folder when that was last synced; PATH
                   is "top" and what follows the store's own path, with "%" for each "/"

   An ID is inode and time of birth: inodes are used again. Nothing is synced in truth. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;

static int identify(int folder, const char *name, char *id, size_t size, int *is_folder) {
    struct statx found;
    int flags = *name ? AT_SYMLINK_NOFOLLOW : AT_EMPTY_PATH;
    if (statx(folder, name, flags, STATX_INO | STATX_BTIME | STATX_TYPE, &found)) return -1;
    *is_folder = S_ISDIR(found.stx_mode);
    snprintf(id, size, "%llu-%lld-%u", (unsigned long long)found.stx_ino,
             (long long)found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
    return 0;
}

static int put(FILE *made, const char *from, const char *to) {
    if (fclose(made)) return -1;
    return rename(from, to);
}

static int sync_file(int file, const char *disk, const char *id) {
    static char data[1 << 16];
    char part[PATH_MAX], place[PATH_MAX], self[64];
    snprintf(part, sizeof part, "%s/files/.part", disk);
    snprintf(place, sizeof place, "%s/files/%s", disk, id);
    snprintf(self, sizeof self, "/proc/self/fd/%d", file);
    int source = open(self, O_RDONLY); /* the server's own may be for writing only */
    FILE *made = fopen(part, "w");
    if (source < 0 || !made) return -1;
    ssize_t count;
    while ((count = read(source, data, sizeof data)) > 0) fwrite(data, 1, (size_t)count, made);
    close(source);
    return count < 0 ? -1 : put(made, part, place);
}

static int sync_folder(int file, const char *disk, const char *path) {
    char part[PATH_MAX], place[PATH_MAX], id[100];
    int length = snprintf(place, sizeof place, "%s/folders/top", disk), is_folder;
    snprintf(place + length, sizeof place - (size_t)length, "%s", path);
    for (char *at = place + length; *at; at++)
        if (*at == '/') *at = '%';
    snprintf(part, sizeof part, "%s/folders/.part", disk);
    FILE *made = fopen(part, "w");
    DIR *names = fdopendir(openat(file, ".", O_RDONLY | O_DIRECTORY));
    if (!made || !names) return -1;
    for (struct dirent *each; (each = readdir(names));) {
        if (!strcmp(each->d_name, ".") || !strcmp(each->d_name, "..")) continue;
        if (identify(file, each->d_name, id, sizeof id, &is_folder)) continue; /* it has gone */
        fprintf(made, "%c %s %s\n", is_folder ? 'd' : 'f', id, each->d_name);
    }
    closedir(names);
    return put(made, part, place);
}

static int sync_any(int file, int (*real)(int)) {
    const char *store = getenv("LOST_PAGES_STORE"), *disk = getenv("LOST_PAGES_DISK");
    char self[64], path[PATH_MAX], id[100];
    int is_folder, failed;
    snprintf(self, sizeof self, "/proc/self/fd/%d", file);
    ssize_t length = readlink(self, path, sizeof path - 1);
    if (!store || !disk || length < 0) return real(file);
    path[length] = 0;
    if (strncmp(path, store, strlen(store))) return real(file);
    pthread_mutex_lock(&busy);
    failed = identify(file, "", id, sizeof id, &is_folder);
    if (!failed)
        failed = is_folder ? sync_folder(file, disk, path + strlen(store))
                           : sync_file(file, disk, id);
    pthread_mutex_unlock(&busy);
    if (failed) abort(); /* what it remembers would be wrong */
    return 0;
}

int fsync(int file) { return sync_any(file, (int (*)(int))dlsym(RTLD_NEXT, "fsync")); }

int fdatasync(int file) { return sync_any(file, (int (*)(int))dlsym(RTLD_NEXT, "fdatasync")); }

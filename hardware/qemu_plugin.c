/* Counts the instructions that a program executes under qemu's user-mode emulation.

   A TCG plugin, from qemu 4.2 on. It prints one number, in decimal on a line of the file descriptor given as `fd=N`,
   for every second call of getppid(): the instructions executed since the call before. What it uses of qemu's
   plugin interface is declared here, so that no header of qemu is needed; the interface's number, which qemu checks,
   is given when this file is compiled (PLUGIN_VERSION). */

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef GETPPID
#define GETPPID 173 /* on aarch64 */
#endif

typedef uint64_t plugin_id;
struct block;

extern size_t qemu_plugin_tb_n_insns(const struct block *block);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*seen)(plugin_id, struct block *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct block *block, void (*ran)(unsigned int, void *), int flags,
                                                 void *data);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id id,
                                                 void (*called)(plugin_id, unsigned int, int64_t, uint64_t, uint64_t,
                                                                uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                                                uint64_t));

int qemu_plugin_version = PLUGIN_VERSION;

static uint64_t executed;
static uint64_t began;
static bool counting;
static int out = 2;

static void ran(unsigned int cpu, void *count)
{
    __atomic_fetch_add(&executed, (uint64_t)(uintptr_t)count, __ATOMIC_RELAXED);
}

static void seen(plugin_id id, struct block *block)
{
    qemu_plugin_register_vcpu_tb_exec_cb(block, ran, 0, (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void called(plugin_id id, unsigned int cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    if (number != GETPPID)
        return;
    if (counting)
        dprintf(out, "%" PRIu64 "\n", executed - began);
    counting = !counting;
    began = executed;
}

int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "fd=", 3) == 0)
            out = atoi(argv[i] + 3);
    qemu_plugin_register_vcpu_tb_trans_cb(id, seen);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}

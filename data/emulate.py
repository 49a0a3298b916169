"""Run the kernel where its machine is not: CUDA on an interpreter that finds races, NEON by qemu.

    python data/emulate.py                     a few steps of a small model on an emulated sm_80, against numpy
    python data/emulate.py --machine sm_75     without tensor cores; or armv8-a, or armv8.2-a+dotprod

For whoever changes the kernel and has no such machine. The interpreter needs Linux on x86-64 and g++ (12 or later), ARM
aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu and qemu-user).
"""

import argparse
import ctypes
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nano_eggroll as E

MACHINES = "sm_80", "sm_75", "armv8-a", "armv8.2-a+dotprod"
H100 = 232448  # bytes of shared memory that a block may have


class Fault(BaseException):
    """What a kernel does wrong; no Exception, which CudaLauncher would take for an error of CuPy's."""


SIMT = r"""
// Runs CUDA kernels on the CPU. A thread is a fiber, which runs until it waits for others, at __syncthreads or at a
// collective of its warp. All blocks live at once and take turns, so what they share by mistake goes wrong.
// With __CUDA_ARCH__, this is what a kernel sees of the GPU; g++ -fsanitize makes it call a hook before every access to
// memory. Without, it is the machine, which runs the fibers and defines the hooks.
struct Index { unsigned x; };
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}
#ifdef __CUDA_ARCH__
#include <math.h>
#define __CUDACC__
#define __device__
#define __global__
#define __shared__                                // the driver makes the array a pointer to the block's memory
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if __CUDA_ARCH__ >= 800
#define MMA simt_mma
#endif
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
extern const Index threadIdx, blockIdx, gridDim;
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
int atomicAdd(int *p, int x);
void __syncthreads();
void __syncwarp();
int __all_sync(unsigned all, int x);
int __shfl_xor_sync(unsigned all, int x, int lanes);
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1);

#else
#include <array>
#include <deque>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

enum Kind { READ, WRITE, ATOMIC };
struct Access { struct Fiber *by; Kind kind; unsigned bytes, time, site; };  // bytes: which of a word, as bits
struct Region { char *start; int size; std::vector<std::vector<Access>> words; };
typedef std::array<int, 6> Given;
struct Group {                                    // a warp or a block, whose threads wait for each other
  std::vector<Fiber *> threads;
  const char *where;
  unsigned arrived, rounds, met;                  // met: the time when all last were at a barrier
  Given given[2][32];                             // by lanes, in turn, as one may give again before others have read
};
struct Fiber { unsigned id, site; bool waits; Group *warp, *block; char *stack; ucontext_t context; };

Index threadIdx, blockIdx, gridDim;
char *shared_memory;
extern "C" void call(const char *kernel, void **arguments);
__attribute__((visibility("hidden"))) extern char __ehdr_start[], _end[];  // from the linker: this library
static const size_t STACK = 1 << 17;
static const char *kernel;
static void **arguments;
static unsigned block_size, now;                  // now: counts the barriers, as nothing else orders accesses
static std::vector<Region> regions;               // first the shared memory of each block
static std::vector<Fiber> fibers;
static std::deque<Fiber *> ready;
static Fiber *self;
static ucontext_t host;
static std::string finding;

#define SITE ((unsigned)((char *)__builtin_return_address(0) - __ehdr_start - 1))
static std::string who(const Fiber *f, unsigned site) {  // the driver turns @site into lines of the source
  return "block " + std::to_string(f->id / block_size) + " thread " + std::to_string(f->id % block_size) +
         " @" + std::to_string(site);
}
static void report(const std::string &what) {
  finding = what;
  setcontext(&host);
}

static void access(char *p, size_t n, Kind kind, unsigned site) {
  if ((p >= self->stack && p + n <= self->stack + STACK) || (p >= __ehdr_start && p + n <= _end)) return;
  Region *r = nullptr;
  for (Region &i : regions) if (p >= i.start && p + n <= i.start + i.size) r = &i;
  if (!r) report("out of bounds: " + who(self, site));
  const size_t at = p - r->start, all = ((1 << n) - 1) << at % 4;
  for (size_t word = 0; all >> 4 * word; word++) {
    std::vector<Access> &last = r->words[at / 4 + word];
    const unsigned bytes = all >> 4 * word & 15;
    size_t kept = 0;
    for (const Access &a : last) {
      if (a.by->block == self->block && a.time < self->block->met) continue;  // it is before all to come, too
      const bool ordered = a.by == self || (a.by->warp == self->warp && a.time < self->warp->met);
      if (!ordered && a.bytes & bytes && (a.kind != kind || kind == WRITE))
        report("race: " + who(self, site) + " and " + who(a.by, a.site));
      if (a.by != self || a.kind != kind || a.bytes != bytes) last[kept++] = a;
    }
    last.resize(kept);
    last.push_back({self, kind, bytes, now, site});
  }
}

#define HOOKS(n) \
  extern "C" void __tsan_read##n(char *p) { access(p, n, READ, SITE); } \
  extern "C" void __tsan_write##n(char *p) { access(p, n, WRITE, SITE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(char *p, size_t n) { while (n--) access(p++, 1, READ, SITE); }
extern "C" void __tsan_write_range(char *p, size_t n) { while (n--) access(p++, 1, WRITE, SITE); }
extern "C" void __tsan_init() {}
extern "C" void __ubsan_handle_out_of_bounds(void *, long) { report("index out of bounds: " + who(self, SITE)); }
extern "C" void __ubsan_handle_type_mismatch_v1(void *, char *) { report("misaligned: " + who(self, SITE)); }
int atomicAdd(int *p, int x) { access((char *)p, 4, ATOMIC, SITE); return (*p += x) - x; }

static void go_on() {                             // with the next thread that can
  if (ready.empty()) setcontext(&host);
  Fiber *last = self;
  self = ready.front();
  ready.pop_front();
  threadIdx.x = self->id % block_size;
  blockIdx.x = self->id / block_size;
  shared_memory = regions[blockIdx.x].start;
  swapcontext(&last->context, &self->context);
}

static void live() {                              // what a fiber does
  call(kernel, arguments);
  go_on();
}

// Returns when all of the group are here. If that `orders` accesses, as only barriers do, those before it come before
// those after it.
static void meet(Group &g, const char *where, bool orders, unsigned site) {
  if (g.arrived && g.where != where) report("divergence: " + who(self, site) + ", others are at " + g.where);
  g.where = where, self->site = site, self->waits = true;
  if (++g.arrived < g.threads.size()) return go_on();
  g.arrived = 0, g.rounds++;
  if (orders) g.met = ++now;
  for (Fiber *f : g.threads) {
    f->waits = false;
    if (f != self) ready.push_back(f);
  }
}

static Given *exchange(const Given &mine, const char *where, unsigned site) {
  Given *given = self->warp->given[self->warp->rounds % 2];
  given[threadIdx.x % 32] = mine;
  meet(*self->warp, where, false, site);
  return given;
}

void __syncthreads() { meet(*self->block, "__syncthreads", true, SITE); }
void __syncwarp() { meet(*self->warp, "__syncwarp", true, SITE); }

int __all_sync(unsigned, int x) {
  const Given *given = exchange({x}, "__all_sync", SITE);
  for (int lane = 0; lane < 32; lane++) if (!given[lane][0]) return 0;
  return 1;
}

int __shfl_xor_sync(unsigned, int x, int lanes) {
  return exchange({x}, "__shfl_xor_sync", SITE)[threadIdx.x % 32 ^ lanes][0];
}

// mma.m16n8k32: lane 4g + j has in a0 bytes 4j to 4j+3 of row g of A (a1, a3: of row g+8; a2, a3: bytes +16),
// in b0, b1 the same bytes of column g of B, and in c columns 2j, 2j+1 of row g, then of row g+8.
void simt_mma(int *c, int a0, int a1, int a2, int a3, int b0, int b1) {
  const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  const Given *given = exchange({a0, a1, a2, a3, b0, b1}, "MMA", SITE);
  for (int i = 0; i < 4; i++) for (int k = 0; k < 4; k++) for (int half = 0; half < 2; half++)
    c[i] = __dp4a(given[4 * g + k][i / 2 + 2 * half], given[4 * (2 * j + i % 2) + k][4 + half], c[i]);
}

// Tells what the next launch may access: first the shared memory of each block.
extern "C" void simt_region(char *start, int size) {
  regions.push_back({start, size, std::vector<std::vector<Access>>(size / 4 + 1)});
}

// Runs a kernel and returns what is wrong with it.
extern "C" const char *simt_launch(const char *name, void **values, unsigned blocks, unsigned threads) {
  kernel = name, arguments = values;
  gridDim.x = blocks, block_size = threads, now = 1;
  finding.clear(), ready.clear(), fibers.clear();
  fibers.resize(blocks * threads);
  std::vector<Group> groups(blocks), warps(blocks * threads);  // more than enough
  std::unique_ptr<char[]> stacks(new char[blocks * threads * STACK]);
  for (Fiber &f : fibers) {
    f.id = &f - &fibers[0], f.stack = &stacks[f.id * STACK];
    f.block = &groups[f.id / threads], f.warp = &warps[f.id / threads * threads + f.id % threads / 32];
    for (Group *g : {f.block, f.warp}) g->threads.push_back(&f);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = STACK;
    makecontext(&f.context, live, 0);
    ready.push_back(&f);
  }
  Fiber start;
  self = &start;
  volatile bool ran = false;
  getcontext(&host);
  if (!ran) ran = true, go_on();
  for (Fiber &f : fibers) if (f.waits && finding.empty()) finding = "deadlock: " + who(&f, f.site);
  regions.clear();
  return finding.c_str();
}
#endif
"""


def callable_by_name(source):
    """A kernel source with a function that calls the kernel of a name, given arrays and pointers to numbers."""
    calls = ""
    for name, parameters in re.findall(r"KERNEL (\w+)\(([^)]*)\)", source):
        kinds = re.findall(r"\s*(.+?)\w+\s*(?:,|$)", parameters)
        values = ", ".join(f"({k})values[{i}]" if "*" in k else f"*({k} *)values[{i}]" for i, k in enumerate(kinds))
        calls += f'  if (!__builtin_strcmp(name, "{name}")) {name}({values});\n'
    header = 'KERNEL __attribute__((no_sanitize("thread"))) call(const char *name, void **values)'
    return f"{source}\n{header} {{\n{calls}}}\n"


class Array:
    """Memory of the emulated GPU, far from all other."""

    def __init__(self, a):
        memory = np.full(a.nbytes + 4096, 0xCD, np.uint8)
        start = 2048 - memory.ctypes.data % 256
        self.a = memory[start:start + a.nbytes].view(a.dtype).reshape(a.shape)
        self.a[...] = a
        self.get, self.dtype, self.shape, self.flags = self.a.copy, a.dtype, a.shape, self.a.flags


@cache
class Simt:
    """A source compiled for the emulated GPU."""

    folder = tempfile.TemporaryDirectory(prefix="simt_")

    def __init__(self, source, arch=800, options="-DSHARED=0"):
        self.source = callable_by_name(source).replace("shared_memory[]", "*const shared_memory")
        folder = Path(self.folder.name)
        stem = folder / str(len(os.listdir(folder)))
        stem.with_suffix(".cu").write_text(self.source)
        if not (folder / "simt.cc").exists():
            (folder / "simt.cc").write_text(SIMT)
            self.compile("-O2 -c simt.cc -o simt.o")
        self.compile("-O1 -fsanitize=thread,bounds,alignment --param tsan-instrument-func-entry-exit=0 -gdwarf-4 -g1 "
                     f"-D__CUDA_ARCH__={arch} {options} -include simt.cc -x c++ -c {stem}.cu -o {stem}.o")
        self.compile(f"-shared -Wl,-z,defs simt.o {stem}.o -o {stem}.so")
        self.library = ctypes.CDLL(f"{stem}.so")
        self.library.simt_launch.restype = ctypes.c_char_p

    def compile(self, how):
        """Call the compiler; addr2line gets the files of DWARF 5 wrong."""
        command = f"g++ -std=c++17 -w -fPIC -ffp-contract=off {how}".split()
        subprocess.run(command, cwd=self.folder.name, check=True)

    def lines(self, site):
        """Where in the source the machine found something, and where that is inlined."""
        command = ["addr2line", "-ie", self.library._name, hex(int(site[1]))]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers = [int(n) for n in re.findall(r"\.cu:(\d+)", found)]
        return "".join(f"\n    line {n}: {self.source.splitlines()[n - 1].strip()}" for n in numbers)


class Kernel:
    """A kernel, as CuPy launches it; raises Fault where it does something wrong."""

    def __init__(self, simt, name):
        self.simt, self.name, self.ptr, self.most = simt, name, self, 49152

    def __call__(self, grid, block, args, shared_mem=0):
        assert shared_mem <= self.most
        arrays = [Array(np.full(shared_mem, 0xCD, np.uint8)) for _ in range(*grid)]
        arrays += [a for a in args if isinstance(a, Array)]
        for a in arrays:
            self.simt.library.simt_region(ctypes.c_void_p(a.a.ctypes.data), a.a.nbytes)
        args = [None if isinstance(a, np.uintp) else a.a if isinstance(a, Array) else np.array(a) for a in args]
        pointers = (ctypes.c_void_p * len(args))(*E.c_arguments(args))
        finding = self.simt.library.simt_launch(self.name.encode(), pointers, *grid, *block)
        if finding:
            raise Fault(f"{self.name}: " + re.sub(r" @(\d+)", self.simt.lines, finding.decode()))


def fake_cupy(arch=800, room=H100):
    """As much of CuPy as nano_eggroll uses, on an emulated GPU that runs two blocks at once."""
    cupy = mock.MagicMock()
    cupy.asarray = Array
    cupy.zeros = lambda size, dtype: Array(np.zeros(size, dtype))
    cupy.empty = lambda size, dtype: Array(np.full(size, 0xCD, dtype))
    cupy.cuda.Device().attributes = {"MaxSharedMemoryPerBlockOptin": room, "MultiProcessorCount": 2}
    cupy.cuda.runtime.getDeviceCount.return_value = 1
    cupy.cuda.runtime.memGetInfo.return_value = 2**30, 2**30
    cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor.return_value = 1
    cupy.cuda.driver.funcSetAttribute = lambda kernel, _, value: setattr(kernel, "most", value)
    cupy.cuda.compiler.compile_using_nvrtc = lambda source, options: ((source, arch, options[-1]), None)
    module = cupy.cuda.function.Module()
    module.load = lambda cubin: setattr(module, "get_function", lambda name: Kernel(Simt(*cubin), name))
    return cupy


ARM = r"""
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {                 // calls a kernel, with arguments that are read and then written
  long size[32];
  void *values[32];
  fread(size, 8, 32, stdin);
  for (int i = 0; i < 32; i++) {
    values[i] = size[i] ? aligned_alloc(64, (size[i] + 63) / 64 * 64) : NULL;
    fread(values[i], 1, size[i], stdin);
  }
  call(argv[1], values);
  for (int i = 0; i < 32; i++) fwrite(values[i], 1, size[i], stdout);
}
"""


class Arm:
    """A launcher on an emulated ARM."""

    def __init__(self, source, folder, flags):
        self.program = folder / "kernel"
        command = f"aarch64-linux-gnu-gcc -x c -O2 -static -ffp-contract=off -w -fno-strict-aliasing {flags} - -lm -o"
        subprocess.run([*command.split(), self.program], input=callable_by_name(source) + ARM, text=True, check=True)
        needs = np.zeros(len(E.Needs._fields), np.int32)
        self.run("needs", (needs,))
        self.needs, self.zeros = E.Needs(*needs.tolist()), np.zeros

    def run(self, name, args):
        """Call a kernel."""
        data = [b"" if a is None else a.tobytes() for a in args]
        sizes = np.array([*map(len, data), *[0] * (32 - len(data))])
        back = io.BytesIO(subprocess.run(["qemu-aarch64", self.program, name], capture_output=True, check=True,
                                         input=sizes.tobytes() + b"".join(data)).stdout)
        for a, before in zip(args, data, strict=True):
            after = back.read(len(before))
            if after != before:
                a[...] = np.frombuffer(after, a.dtype).reshape(a.shape)

    def __call__(self, name, which, args, out):
        """Run batches or units of a kernel."""
        scratch = np.zeros(max(self.needs.batch, self.needs.update), np.int8)
        self.run(name, (*args, np.int32(which.start), np.int32(which.stop), scratch))


def main() -> None:
    """Train a small model by numpy and on the machine, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--machine", choices=MACHINES, default=MACHINES[0])
    machine = parser.parse_args().machine
    if not shutil.which("g++" if "sm" in machine else "qemu-aarch64"):
        parser.error(f"{machine} cannot be emulated: install g++, or gcc-aarch64-linux-gnu and qemu-user")
    cfg, es = E.Config(dim=16, layers=2, head_size=8, vocab=50), E.ES(population=40, tokens=5, steps=2, rank=2)
    text, hashes = (E.mix(np.arange(1000)) % cfg.vocab).astype(np.uint16), []
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(sys.modules, cupy=fake_cupy()):
            build = partial(Arm, folder=Path(folder), flags=f"-march={machine}")
            if "sm" in machine:
                sys.modules["cupy"], build = fake_cupy(10 * int(machine[3:])), E.CudaLauncher
            for backend in E.NumpyBackend(cfg, es.rank), E.KernelBackend(cfg, es.rank, machine, build):
                model = E.new_model(cfg, 0)
                E.evolve(model, E.predict(text, es.tokens), es, backend)
                hashes.append(model.sha256())
                print(f"{backend.name:15} weights sha256 {hashes[-1]}")
        if hashes[0] != hashes[1]:
            raise Fault("it does not compute what numpy does: look at what was changed in KERNEL")
    except Fault as e:
        parser.exit(1, f"{machine}: {e}\n")


if __name__ == "__main__":
    main()

"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

Triton throws ptxas's messages away, and only they tell of spills and serialised wgmmas, so the PTX
is assembled a second time with -v. Kernels are compiled in processes of their own, because Triton
chooses between compiler and interpreter when it is imported.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from arrivals import early_arrivals, uncaptured_barriers

ROOT = Path(__file__).parents[1]
TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

HOPPER_BACKWARD = ("backward", "wide-dq", "wide-dkv")


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its pass, the part, the inputs, the launch configuration.

    Attributes:
        pass_: of kernels.configs; or "backward", "wide-dq", "wide-dkv": of the Hopper backward the
            kernel that does all, and those for wide heads.
        adds: whether it reads and adds what is there (CARRY, ADD), or stores.
        documents: whether it reads packed documents.
        merged: whether dk and dv of several sources go to several places.
        one_entry: of the Hopper forward, whether its tiles meet one entry each; None: a portable
            kernel.
        changes: of a Hopper kernel, fields in which its row differs from the checked-in one.
    """

    pass_: str
    arch: int
    head_dim: int
    dtype: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool
    adds: bool
    documents: bool = False
    merged: bool = False
    one_entry: bool | None = None
    changes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        how = "adds" if self.adds else "stores"
        how += "-documents" if self.documents else ""
        how += "-merged" if self.merged else ""
        how += {None: "", True: "-hopper", False: "-hopper-list"}[self.one_entry]
        how += "-hopper" if self.pass_ in HOPPER_BACKWARD else ""
        how += "".join(f"-{name}={int(value)}" for name, value in self.changes)
        return f"sm{self.arch}-{self.pass_}-D{self.head_dim}-{self.dtype}-{how}"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses and issues.

    Attributes:
        error: why it did not compile, "" if it did; all else is then 0.
        registers: a thread.
        spills: bytes that ptxas stores and loads for want of registers.
        shared: bytes of shared memory a program.
        wgmma, mma_sync, tcgen05: tensor-core instructions in the PTX, by generation.
        tma_loads: bulk tensor copies from global to shared memory in the PTX.
        tma_adds: bulk tensor reductions in global memory in the PTX.
        serialized: ptxas's lines on wgmmas that it could not overlap (C7510 to C7514).
        early: what stands between an arrival at an mbarrier and the last meeting of the threads
            that it speaks for, see early_arrivals.
        uncaptured: barriers of the first partition alone, see uncaptured_barriers.
    """

    error: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0
    mma_sync: int = 0
    tcgen05: int = 0
    tma_loads: int = 0
    tma_adds: int = 0
    serialized: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    uncaptured: tuple[str, ...] = ()


def compile_all(jobs: list[Job], seconds: float | None = None) -> list[Report]:
    """Compile every job, in processes without TRITON_INTERPRET, and report in their order.

    Raises:
        RuntimeError: a compiling process broke. subprocess.TimeoutExpired: it took longer.
    """
    given = json.dumps([asdict(job) for job in jobs])
    status, output, errors = run_group([sys.executable, __file__], given, seconds)
    if status:
        raise RuntimeError(errors)
    return [Report(**report) for report in json.loads(output)]


def run_group(command: list[str], given: str, seconds: float | None) -> tuple[int, str, str]:
    """Run a command without TRITON_INTERPRET; return its exit status, output and errors.

    Raises:
        subprocess.TimeoutExpired: it took longer; it and what it started are gone.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(given, seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output, errors


def compile_job(job: Job) -> Report:
    """Compile one job here and now. TRITON_INTERPRET must be unset."""
    try:
        if job.pass_ in HOPPER_BACKWARD:
            return _report(_compile_hopper_backward(job), job.arch)
        compiled = _compile(job) if job.one_entry is None else _compile_hopper(job)
        return _report(compiled, job.arch)
    except Exception as failure:  # Whatever the compiler raises is the result.
        return Report(error=f"{type(failure).__name__}: {failure}")


def _compile(job: Job):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource

    from ring_flash_attn.kernels.configs import LaunchConfig, block_d
    from ring_flash_attn.kernels.dkv import _bwd_kernel_dkv
    from ring_flash_attn.kernels.dq import _bwd_kernel_dq
    from ring_flash_attn.kernels.forward import _fwd_kernel

    kernel = {"forward": _fwd_kernel, "dq": _bwd_kernel_dq, "dkv": _bwd_kernel_dkv}[job.pass_]
    constants = {
        "HEAD_DIM": job.head_dim,
        "BLOCK_M": job.block_m,
        "BLOCK_N": job.block_n,
        "BLOCK_D": block_d(job.head_dim),
        "TMA": job.tma,
        "DOCUMENTS": job.documents,
        "CARRY" if job.pass_ == "forward" else "ADD": job.adds,
    }
    if job.pass_ == "dkv":
        config = LaunchConfig(job.block_m, job.block_n, job.num_warps, job.num_stages)
        constants["COPIES"] = config.copies
        constants["offsets_ptr"] = None
    signature = {name: _type(name, job, constants) for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, _multiples_of_16(signature))
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def _compile_hopper(job: Job):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ring_flash_attn.kernels.hopper.configs import forward_config
    from ring_flash_attn.kernels.hopper.forward import _hopper_fwd_kernel

    config = forward_config(job.head_dim)
    assert config is not None, job
    config = replace(config, **dict(job.changes))
    block_d = max(64, 1 << (job.head_dim - 1).bit_length())
    at_launch, consumer, producer = config.registers
    constants = {
        "HEAD_DIM": job.head_dim,
        "BLOCK_D": block_d,
        "BLOCK_N": config.block_n,
        "CARRY": job.adds,
        "DOCUMENTS": job.documents,
        "ONE_ENTRY": job.one_entry,
        "CONSUMERS": config.consumers,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "PING_PONG": config.ping_pong,
        "RESCALE_LATE": config.rescale_late,
        "Q_COLUMNS": config.q_columns,
        "SHUFFLES": config.shuffles,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }
    k_box = [1, 1, config.block_n, block_d]
    v_box = [1, 1, config.block_n, 1, block_d] if job.documents else k_box
    boxes = {"q": [1, 1, 64, block_d], "k": k_box, "v": v_box}
    if job.adds:
        boxes["state"] = [1, 1, 64, block_d * config.block_n // 128]
    else:
        constants["state"] = None
    half = gl.bfloat16 if job.dtype == "bfloat16" else gl.float16
    signature = {}
    for name in _hopper_fwd_kernel.arg_names:
        box = boxes.get(name)
        if box is None:
            signature[name] = _type(name, job, constants)
            continue
        kind, element = ("fp32", gl.float32) if name == "state" else (TRITON_NAMES[job.dtype], half)
        layout = gl.NVMMASharedLayout.get_default_for(box, element)
        signature[name] = f"tensordesc<{kind}{box},{layout!r}>"
    source = GluonASTSource(_hopper_fwd_kernel, signature, constants, _multiples_of_16(signature))
    options = {"num_warps": job.num_warps, "maxnreg": at_launch}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def _compile_hopper_backward(job: Job):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ring_flash_attn.kernels.hopper.backward import _hopper_bwd_kernel
    from ring_flash_attn.kernels.hopper.backward_wide import _hopper_dkv_kernel
    from ring_flash_attn.kernels.hopper.backward_wide_dq import _hopper_dq_kernel
    from ring_flash_attn.kernels.hopper.configs import backward_config

    kernels = _hopper_bwd_kernel, _hopper_dq_kernel, _hopper_dkv_kernel
    kernel = dict(zip(HOPPER_BACKWARD, kernels, strict=True))[job.pass_]
    config = backward_config(job.head_dim)
    assert config is not None, job
    config = replace(config, **dict(job.changes))
    block_d = max(64, 1 << (job.head_dim - 1).bit_length())
    at_launch, consumer, others = config.registers
    constants = {
        "HEAD_DIM": job.head_dim,
        "BLOCK_D": block_d,
        "ADD": job.adds,
        "DOCUMENTS": job.documents,
        "CONSUMER_REGISTERS": consumer,
        "OTHER_REGISTERS": others,
        "PRODUCER_REGISTERS": others,
        "BLOCK_M": job.block_m,
    }
    fields = "stages", "q_stages", "dout_stages", "dq_stages", "keys_in_registers", "heads_apart"
    fields += ("query_columns",)
    for name in fields:
        constants[name.upper()] = getattr(config, name, None)
    if not job.merged:
        constants["offsets_ptr"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    element = gl.bfloat16 if job.dtype == "bfloat16" else gl.float16
    fused = job.pass_ == "backward"
    rows = job.block_m if fused else 64
    of_inputs = {"q": rows, "dout": rows, "k": 64, "v": 64}
    boxes = {name: (n, block_d, job.dtype, element) for name, n in of_inputs.items()}
    boxes["dq"] = rows, block_d, "float32", gl.float32
    signature = {}
    for name in kernel.arg_names:
        if name in boxes:
            n, width, dtype, kind = boxes[name]
            box = [1, 1, n, 1, width] if job.documents else [1, 1, n, width]
            layout = gl.NVMMASharedLayout.get_default_for(box, kind)
            signature[name] = f"tensordesc<{TRITON_NAMES[dtype]}{box},{layout!r}>"
        else:
            signature[name] = _type(name, job, constants)
    source = GluonASTSource(kernel, signature, constants, _multiples_of_16(signature))
    options = {"num_warps": job.num_warps, "maxnreg": at_launch}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def _type(name: str, job: Job, constants: dict) -> str | tuple[str, ...]:
    """Return Triton's type of a kernel argument, by its name."""
    dtype = TRITON_NAMES[job.dtype]
    if name in constants:
        return "constexpr"
    if name == "offsets_ptr":
        return "*i64"
    if name in ("q", "dout", "k", "v"):
        rows = job.block_n if name in "kv" else job.block_m
        return (
            f"tensordesc<{dtype}[1, 1, {rows}, {constants['BLOCK_D']}]>" if job.tma else f"*{dtype}"
        )
    if name in ("tiles_ptr", "entries_ptr", "counter_ptr"):
        return "*i32"
    if name == "result_ptr":
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return "*fp32"
    if name.endswith("_strides"):
        return ("i32", "i32", "i32")
    return "fp32" if name == "softmax_scale" else "i32"


def _multiples_of_16(signature: dict) -> dict:
    """Return the attributes of what a launch finds to be multiples of 16: pointers, strides."""
    paths: list[tuple[int, ...]] = []
    for index, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            paths += [(index, inner) for inner in range(len(kind))]
        elif kind.startswith("*"):
            paths.append((index,))
    return {path: [["tt.divisibility", 16]] for path in paths}


def _report(compiled, arch: int) -> Report:
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, arch)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills and registers, log
    return Report(
        registers=int(registers.group(1)),
        spills=int(spills.group(1)) + int(spills.group(2)),
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        tma_adds=len(re.findall(r"cp\.reduce\.async\.bulk\.tensor\.\dd\.global.*\.add", ptx)),
        serialized=tuple(line for line in log.splitlines() if re.search(r"C751\d", line)),
        early=early_arrivals(ptx),
        uncaptured=uncaptured_barriers(compiled.asm["ttgir"]),
    )


def _assemble(ptx: str, arch: int) -> str:
    """Return what ptxas -v says of `ptx`."""
    from triton import knobs

    tool = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    part = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={part}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout + done.stderr


if __name__ == "__main__":
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        print(json.dumps([asdict(report) for report in pool.map(compile_job, jobs)]))

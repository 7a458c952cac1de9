"""Compiles every kernel as it would be launched on a GPU that need not be there, and reads what
the compiler says: registers, spills, shared memory, tensor-core path, depth of the pipeline.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import default_tile
from lit_sparse.attention.triton import backend
from lit_sparse.attention.triton.run import Call, recorded
from lit_sparse.attention.triton.select import select
from lit_sparse.budget import Budget

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}
"""Shared memory that a program may have, bytes."""

_REGISTERS = 64 * 1024
"""Registers of a multiprocessor, of both generations."""

_POINTERS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}

GATHERING = ("forward_kernel", "dq_kernel", "dkdv_kernel")
"""Kernels whose loop follows a list, and must have its loads in flight ahead of their use."""


@dataclass(frozen=True)
class Report:
    """What the compiler says of one launch.

    Args:
        registers: of a thread; spills: bytes stored to and loaded from local memory.
        shared: shared memory of a program, bytes.
        programs: that a multiprocessor holds at a time.
        tensor_cores: "wgmma", "mma" or "-".
        ahead: steps that loads run ahead of their use, in the loop where they are fewest.
        warnings: ptxas' own, such as C7515 (wgmma serialised).
    """

    kernel: str
    target: str
    dim: int
    warps: int
    registers: int
    spills: int
    shared: int
    programs: int
    tensor_cores: str
    ahead: int
    warnings: tuple[str, ...]


def attention_calls(
    target: str,
    dim: int,
    groups: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    options: Options | None = None,
    block: int = 64,
    sinks: bool = False,
) -> list[Call]:
    """Every launch of a selection, forward and backward at 8192 tokens and two key-value heads.

    The launches that choose blocks are there for longer contexts too: they hold more of them.
    """
    tokens, heads = 8192, 2
    options = options or Options(dim**-0.5)
    budget, tile = Budget(16, 0.5, floor=0), default_tile(groups)
    plan = make_plan((0, tokens), (0, tokens), budget, block, tile)

    def empty(count: int, tokens: int = tokens) -> torch.Tensor:
        return torch.empty(tokens, count, dim, dtype=dtype, device="meta")

    q, k, v, out = empty(heads * groups), empty(heads), empty(heads), empty(heads * groups)
    logits = torch.empty(heads * groups, dtype=dtype, device="meta") if sinks else None
    with recorded(target) as calls:
        selection = select(q, k, plan, options.scale)
        _, lse = backend.forward(q, k, v, logits, selection, options)
        backend.backward(out, q, k, v, logits, out, lse, selection, options)
    found = list(calls)
    for longer in (65536, 262144, 1048576):
        plan = make_plan((0, longer), (0, longer), budget, block, tile)
        with recorded(target) as calls:
            select(empty(heads * groups, longer), empty(heads, longer), plan, options.scale)
        found.append(calls[-1])  # the last strip's
    return found


def compile_call(call: Call, target: str) -> Report:
    """Compile one launch with the specialisations that Triton would make for its arguments."""
    names = call.kernel.arg_names
    given = dict(zip(names, call.args, strict=False))
    given |= {name: value for name, value in call.options.items() if name in names}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value, parameter = given[name], call.kernel.params[index]
        kind = _kind(value, specialised := not parameter.do_not_specialize)
        if parameter.is_constexpr or kind is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = kind
            if isinstance(value, torch.Tensor) or (
                specialised and isinstance(value, int) and value % 16 == 0
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {key: call.options[key] for key in ("num_warps", "num_stages") if key in call.options}
    compiled = triton.compile(
        ASTSource(call.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", int(target[3:]), 32),
        options=options,
    )
    log = _assemble(compiled.asm["ptx"], target)
    registers = int(_first(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    ptx = compiled.asm["ptx"]
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    return Report(
        kernel=call.kernel.__name__,
        target=target,
        dim=given.get("D", 0),
        warps=warps,
        registers=registers,
        spills=spills,
        shared=shared,
        programs=min(by_registers, by_shared, 64 // warps, 32),
        tensor_cores="wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "-",
        ahead=_ahead(compiled.asm["ttgir"]),
        warnings=tuple(re.findall(r"\(C75\d\d\)[^\n]*|warning[^\n]*", log)),
    )


def _kind(value: object, specialised: bool) -> str | None:
    """Triton's type of an argument; None where it is compiled in."""
    if isinstance(value, torch.Tensor):
        return f"*{_POINTERS[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        box = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_POINTERS[value.base.dtype]}[{box}]>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool) or value is None or (specialised and value == 1):
        return None
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"no Triton type for {value!r}")


def _assemble(ptx: str, target: str) -> str:
    """ptxas' report, with the flags that Triton 3.7 passes."""
    ptxas = triton.knobs.nvidia.ptxas.path
    architecture = "sm_90a" if target == "sm_90" else target
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder) / "kernel.o")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    return done.stderr + done.stdout


_LOOP = re.compile(r"scf\.for ")
_COPY = re.compile(
    r"async_tma_copy_global_to_local|async_copy_global_to_local.*tensor<\d+x\d+x!tt\.ptr<(?:bf|f)16"
)


def _ahead(ttgir: str) -> int:
    """Steps that a pipelined loop's loads run ahead of their use, the fewest of all loops.

    A load that is issued s steps ahead is also issued s times before the loop. Buffers say less: a
    loop whose addresses come too late has three of them and waits for each load in its own step.
    """
    fewest, before, inside, depth = None, 0, 0, 0
    for line in ttgir.splitlines():
        if _LOOP.search(line) and not depth:
            depth = 1
            inside = 0
            continue
        if _COPY.search(line):
            if depth:
                inside += 1
            else:
                before += 1
        if depth:
            depth += line.count("{") - line.count("}") if "scf." in line or "}" in line else 0
            if depth == 0:
                if inside:
                    ahead = before // inside
                    fewest = ahead if fewest is None else min(fewest, ahead)
                before = 0
    return fewest or 0


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in ptxas' report:\n{text}")
    return found.group(1)

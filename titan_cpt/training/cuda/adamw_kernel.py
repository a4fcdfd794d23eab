"""Triton kernels of AdamW: one launch updates every parameter. Importing this module needs Triton.

`advance_steps` raises the step counts and computes each tensor's scalars in float64; `update_weights` then reads every
gradient, weight and moment once, in float32 arithmetic, and writes weight, moments and bf16 compute copy once.

The kernels find the tensors through a table of int64 addresses, one row of `FIELDS` columns for each tensor. T tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)
"""Columns of the address table: weight, gradient, exp_avg, exp_avg_sq, compute copy or 0, step count, elements, group.

Bit 0 of a gradient's address is set if the gradient is in bfloat16; address 0 means that there is no gradient."""
HYPERPARAMETERS = tl.constexpr(7)
"""Columns of the hyperparameter table, float64: lr, beta1, beta2, eps, weight decay, ln(beta1), ln(beta2)."""
SCALARS = tl.constexpr(8)
"""Columns of the scalar table, float32, in the order of `advance_steps`."""


@triton.jit
def advance_steps(table, hyperparameters, scalars, halted, tensors, BLOCK: tl.constexpr):
    """Count a step for every tensor with a gradient, unless halted, and write its row of scalars.

        decay = lr * weight_decay,   step size = lr / (1 - beta1^t)

    Args:
        table: int64 [T, FIELDS].
        hyperparameters: float64 [groups, HYPERPARAMETERS].
        scalars: float32 [T, SCALARS], written.
        halted: float32 [1]; other than 0: no step is counted.
        tensors: T.
        BLOCK: tensors of one program.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = table + tensor * FIELDS
    valid = tensor < tensors
    valid = valid & (tl.load(row + 1, mask=valid, other=0) != 0)
    counts = tl.load(row + 5, mask=valid, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(row + 7, mask=valid, other=0)
    counted = tl.load(counts, mask=valid, other=0.0)
    step = counted + 1.0
    tl.store(counts, tl.where(tl.load(halted) == 0.0, step, counted), mask=valid)

    of_group = hyperparameters + group * HYPERPARAMETERS
    lr = tl.load(of_group, mask=valid, other=0.0)
    beta1 = tl.load(of_group + 1, mask=valid, other=0.0)
    beta2 = tl.load(of_group + 2, mask=valid, other=0.0)
    eps = tl.load(of_group + 3, mask=valid, other=0.0)
    weight_decay = tl.load(of_group + 4, mask=valid, other=0.0)
    power1 = tl.exp(tl.load(of_group + 5, mask=valid, other=-1.0) * step.to(tl.float64))
    power2 = tl.exp(tl.load(of_group + 6, mask=valid, other=-1.0) * step.to(tl.float64))
    out = scalars + tensor * SCALARS
    tl.store(out, (lr * weight_decay).to(tl.float32), mask=valid)
    tl.store(out + 1, beta1.to(tl.float32), mask=valid)
    tl.store(out + 2, (1.0 - beta1).to(tl.float32), mask=valid)
    tl.store(out + 3, beta2.to(tl.float32), mask=valid)
    tl.store(out + 4, (1.0 - beta2).to(tl.float32), mask=valid)
    tl.store(out + 5, (lr / (1.0 - power1)).to(tl.float32), mask=valid)
    tl.store(out + 6, tl.sqrt(1.0 - power2).to(tl.float32), mask=valid)
    tl.store(out + 7, eps.to(tl.float32), mask=valid)


@triton.jit
def update_weights(
    table, scalars, tensor_of_chunk, first_chunk, clip_factor, halted, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """AdamW's update of one chunk of one tensor, unless halted.

    A block whose addresses are all multiples of 16 and which is within the tensor is read and written 16 bytes at a
    time; other blocks (a tensor's end, FSDP2's gradients, which are views of one buffer) element by element.

    Args:
        table: int64 [T, FIELDS].
        scalars: float32 [T, SCALARS], from `advance_steps`.
        tensor_of_chunk: int32 [programs], the row of each program's tensor.
        first_chunk: int32 [T], the number of the first program of each tensor.
        clip_factor: float32 [1], multiplies every gradient.
        halted: float32 [1]; other than 0: nothing is written.
        CHUNK: elements of one program, a multiple of BLOCK.
        BLOCK: elements at a time.
    """
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + program)
    row = table + tensor * FIELDS
    gradient = tl.load(row + 1)
    held_back = tl.load(halted) != 0.0
    if gradient == 0:
        held_back = True
    if not held_back:
        weight = tl.load(row)
        exp_avg = tl.load(row + 2)
        exp_avg_sq = tl.load(row + 3)
        copy = tl.load(row + 4)
        elements = tl.load(row + 6)
        of_tensor = scalars + tensor * SCALARS
        decay = tl.load(of_tensor)
        beta1 = tl.load(of_tensor + 1)
        rest1 = tl.load(of_tensor + 2)
        beta2 = tl.load(of_tensor + 3)
        rest2 = tl.load(of_tensor + 4)
        step_size = tl.load(of_tensor + 5)
        correction2 = tl.load(of_tensor + 6)
        eps = tl.load(of_tensor + 7)
        factor = tl.load(clip_factor)
        aligned = ((weight | (gradient & -2) | exp_avg | exp_avg_sq | copy) & 15) == 0
        first = (program - tl.load(first_chunk + tensor)).to(tl.int64) * CHUNK
        for block in range(CHUNK // BLOCK):
            start = tl.multiple_of(first + block * BLOCK, BLOCK)
            left = tl.minimum(elements - start, BLOCK).to(tl.int32)
            if aligned & (left == BLOCK):
                g = _load_gradient(gradient, start, None, factor, BLOCK, True)
                p = tl.load(_pointers(weight, start, tl.float32, BLOCK, True))
                m = tl.load(_pointers(exp_avg, start, tl.float32, BLOCK, True))
                v = tl.load(_pointers(exp_avg_sq, start, tl.float32, BLOCK, True))
                p, m, v = _adamw(p, g, m, v, decay, beta1, rest1, beta2, rest2, step_size, correction2, eps)
                tl.store(_pointers(weight, start, tl.float32, BLOCK, True), p)
                tl.store(_pointers(exp_avg, start, tl.float32, BLOCK, True), m)
                tl.store(_pointers(exp_avg_sq, start, tl.float32, BLOCK, True), v)
                if copy != 0:
                    tl.store(_pointers(copy, start, tl.bfloat16, BLOCK, True), p.to(tl.bfloat16))
            elif left > 0:
                within = tl.arange(0, BLOCK) < left
                g = _load_gradient(gradient, start, within, factor, BLOCK, False)
                p = tl.load(_pointers(weight, start, tl.float32, BLOCK, False), mask=within)
                m = tl.load(_pointers(exp_avg, start, tl.float32, BLOCK, False), mask=within)
                v = tl.load(_pointers(exp_avg_sq, start, tl.float32, BLOCK, False), mask=within)
                p, m, v = _adamw(p, g, m, v, decay, beta1, rest1, beta2, rest2, step_size, correction2, eps)
                tl.store(_pointers(weight, start, tl.float32, BLOCK, False), p, mask=within)
                tl.store(_pointers(exp_avg, start, tl.float32, BLOCK, False), m, mask=within)
                tl.store(_pointers(exp_avg_sq, start, tl.float32, BLOCK, False), v, mask=within)
                if copy != 0:
                    tl.store(_pointers(copy, start, tl.bfloat16, BLOCK, False), p.to(tl.bfloat16), mask=within)


@triton.jit
def _load_gradient(gradient, start, within, factor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The clipped gradient in float32; bit 0 of its address says that it is stored in bfloat16."""
    if (gradient & 1) != 0:
        g = tl.load(_pointers(gradient & -2, start, tl.bfloat16, BLOCK, ALIGNED), mask=within).to(tl.float32)
    else:
        g = tl.load(_pointers(gradient, start, tl.float32, BLOCK, ALIGNED), mask=within)
    return g * factor


@triton.jit
def _adamw(p, g, m, v, decay, beta1, rest1, beta2, rest2, step_size, correction2, eps):
    """Weight, first and second moment after the step, element by element.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; the order of operations is torch's.
    """
    p = p - decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + eps
    return p - tl.div_rn(step_size * m, denominator), m, v


@triton.jit
def _pointers(address, start, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to `BLOCK` elements of a tensor from `start`; `ALIGNED`: its address is a multiple of 16."""
    first = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, BLOCK)

"""Products that several Triton kernels make; imported by their fused.py alone."""

import triton
import triton.language as tl


@triton.jit
def weighed(values, rows, total):
    """total + values·rows, values in float32. bfloat16 rows: values as a sum of two bfloat16, 16 of their 24 bits."""
    if rows.dtype == tl.bfloat16:
        high = values.to(tl.bfloat16)
        low = (values - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, rows, total, input_precision="ieee")
        return tl.dot(high, rows, total, input_precision="ieee")
    return tl.dot(values, rows.to(tl.float32), total, input_precision="ieee")

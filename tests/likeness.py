"The same numbers, but for the order of a sum."
import torch

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: .03, torch.float16: 3e-3}

def same_logits(a, b):
    """Of a model and of what was loaded from its folder. To rounding: loaded weights lie elsewhere in memory, and some
    processors multiply a matrix that is not aligned in another order"""
    tol = TOLERANCES[a.dtype]
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol)

def same_weights(a, b):
    "Of two models, to the bit"
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

"Experts and routers with random weights, random choices of experts, and how far rounding may lead apart."
import torch
from hypothesis import settings

from libmoe_nb.moe.experts import Experts

tolerances = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

def choices(T, N, K, skew=0., seed=0):
    "K of the N experts and 'no expert', popularities falling as rank to the power of -skew"
    g = torch.Generator().manual_seed(seed)
    noise = torch.empty(T, N+1).exponential_(generator=g).log()
    return (-skew * torch.arange(1, N+2).log() - noise).topk(K).indices, torch.randn(T, K, generator=g)

def build(N=4, d=16, h=24, act='relu', gated=False, bias=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    e = Experts(N, d, h, act, gated, bias).to(dtype)
    for b in e.stacked[2:]:
        if b is not None: torch.nn.init.normal_(b, std=.5)
    return e

quick = settings(derandomize=True, deadline=None, max_examples=60, database=None)

def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def router(cls, *args, seed=0, dtype=torch.float64, **kw):
    r = cls(*args, **kw).to(dtype)
    for i, p in enumerate(r.parameters()): p.data.copy_(rand(*p.shape, seed=seed + i))
    return r

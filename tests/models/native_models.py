"Small models of every body that has a published mixture, in which every part matters."
import torch
from transformers import AutoConfig
from libmoe_nb.moe.layers import MoELayer
from libmoe_nb.models.causal import from_scratch

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=None)
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
              v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=3)
BODIES = dict(llama={}, mistral=dict(sliding_window=None), olmo2={}, olmoe=dict(num_experts=1, num_experts_per_tok=1),
              qwen2={}, qwen3=dict(head_dim=8), deepseek_v3=LATENT, deepseek_v2=LATENT | dict(topk_method='greedy'),
              glm4_moe=dict(head_dim=8, first_k_dense_replace=3), dots1=dict(head_dim=8, first_k_dense_replace=3))
GROUPS = dict(num_experts=9, top_k=3, num_shared_experts=1, n_group=2, topk_group=1, routed_scaling_factor=2.5)
# native architecture -> body, recipe, options
CASES = dict(mixtral=('llama', 'smoe', {}), olmoe=('olmoe', 'smoe', dict(norm_topk_prob=False)),
             flex_olmo=('olmo2', 'smoe', {}), qwen3_moe=('qwen3', 'smoe', {}),
             qwen2_moe=('qwen2', 'sharede_v2', dict(shared_gate=True, num_shared_experts=2, top_k=4)),
             deepseek_v3=('deepseek_v3', 'sharede_v3', dict(GROUPS, expert_bias=True)),
             glm4_moe=('glm4_moe', 'sharede_v3', dict(GROUPS, expert_bias=True)),
             dots1=('qwen3', 'smoe_sigmoid', dict(expert_bias=True)),
             deepseek_v2=('deepseek_v2', 'sharede_v2', dict(GROUPS, norm_topk_prob=False)))

def body(name, **kw): return AutoConfig.for_model(name, **SIZES | BODIES[name] | kw)

def own_layers(model): return [m for m in model.modules() if isinstance(m, MoELayer)]

def make(base, recipe='smoe', layers=None, seed=0, **kw):
    "A model whose every part matters"
    m = from_scratch(recipe, 'tiny', base=base if not isinstance(base, str) else body(base), layers=layers, seed=seed,
                     **dict(gated=True, hidden_act='silu', num_experts=8, top_k=3, moe_intermediate_size=16) | kw)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (.3 if p.dim() > 1 else .1) + (p.dim() < 2))
        for l in own_layers(m):
            if l.router.expert_bias is not None:
                l.router.expert_bias.copy_(torch.randn(l.router.expert_bias.shape, generator=g) * .1)
    return m.eval()

def case(native, **kw):
    b, recipe, options = CASES[native]
    return make(b, recipe, **options | kw)

def ids(B=2, S=40): return torch.randint(1, 96, (B, S), generator=torch.Generator().manual_seed(1))

def close(a, b, tol=1e-4):
    "Relative to the largest logit"
    return (a - b).abs().max() <= tol * b.abs().max()

def padded():
    x, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    return dict(input_ids=x, attention_mask=mask)

"transformers' mixtures run by our kernel, against their own loop."
import inspect
import pytest, torch
from libmoe_nb.analysis.tiny_models import tiny_moe
from libmoe_nb.models import dispatch

# those of the language models that transformers 5.24 lets choose
KINDS = ("afmoe aria_text axk1 axk2 beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 "
         "ernie4_5_moe "
         "exaone_moe flex_olmo flint gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa "
         "granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_text jamba kolibri1 laguna lara_mini "
         "lfm2_moe mellum minimax minimax_m2 mixtral muse_spark_text nemotron_h olmoe openai_privacy_filter phimoe "
         "qwen2_moe qwen3_moe qwen3_next solar_open zaya").split()

def text_model(kind):
    "A tiny model of that type that takes token ids, or a skip that says why there is none"
    try: model = tiny_moe(kind)
    except Exception as e: pytest.skip(f'no tiny {kind}: {type(e).__name__}')
    if 'input_ids' not in inspect.signature(model.forward).parameters: pytest.skip(f'{kind} does not read token ids')
    return model

def run(model, how, ids, weights):
    model.set_experts_implementation(how); model.zero_grad()
    torch.manual_seed(0)
    out = model(input_ids=ids)
    out = getattr(out, 'logits', None) if getattr(out, 'logits', None) is not None else out[0]
    (out.float() * weights[:out.shape[-1]]).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

def close(a, b, name):
    "Equal but for rounding: some classes compute in float32 whatever their weights are"
    torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6 * max(b.abs().max().item(), 1e-6),
                               msg=lambda m: f'{name}: {m}')

@pytest.mark.parametrize('kind', KINDS)
def test_equal_to_eager(kind, monkeypatch):
    dtype = torch.float32 if kind == 'muse_spark_text' else torch.float64   # whose experts have a norm behind them
    model, ids = (text_model(kind).to(dtype).train(),
                  torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(0)))
    weights, calls = torch.linspace(-1, 1, 4096), []
    kernel = dispatch.sorted_kernel
    monkeypatch.setattr(dispatch, 'sorted_kernel', lambda *a: calls.append(a) or kernel(*a))
    try: want, grads = run(model, 'eager', ids, weights)
    except Exception as e: pytest.skip(f'eager {kind} does not run here: {type(e).__name__}')
    got, ours = run(model, 'libmoe', ids, weights)
    assert calls or kind == 'muse_spark_text'
    close(got, want, 'output')
    assert ours.keys() == grads.keys()
    for n in grads: close(ours[n], grads[n], n)

"What new versions of dependencies change: names, warnings, requirements."
import copy, dataclasses, logging, pickle, warnings
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from libmoe_nb.models import MoECausalLMOutput, from_scratch

# one cache, two names: `past_key_values` until transformers 5.23, `cache` from 5.24 on

NAMES = 'cache', 'past_key_values'

@pytest.fixture(scope='module')
def model():
    return from_scratch('smoe', 'tiny', seed=0, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, num_experts=4, top_k=2, moe_intermediate_size=16, vocab_size=96).eval()

@pytest.fixture
def quiet(monkeypatch):
    "Warnings are errors, also those that transformers logs once in a process"
    def fail(self, message, *args, **kwargs): raise AssertionError(f'transformers warns: {message}')
    monkeypatch.setattr(logging.Logger, 'warning_once', fail)
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning): warnings.simplefilter('error', kind)
        yield

def ids(S=9): return torch.randint(1, 96, (2, S), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_both_names_go_in_and_come_out(name, model, quiet):
    x, out = ids(), model(ids()[:, :5], use_cache=True)
    kept = getattr(out, name)
    assert kept is not None and all(kept is c for c in (out.cache, out.past_key_values, out['cache'], out['past_key_values'], out.get('cache'), out.get('past_key_values')))
    assert all(n in out for n in NAMES) and kept in out.to_tuple() and len(set(NAMES) & set(out.keys())) == 1
    torch.testing.assert_close(model(x[:, 5:], **{name: copy.deepcopy(kept)}).logits, model(x).logits[:, 5:], atol=1e-5, rtol=1e-4)
    assert model(x, return_dict=False, use_cache=True)[1].get_seq_length() == 9

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_generation_takes_both_names(name, model, quiet):
    x, plain = ids(), model.generate(ids(), max_new_tokens=4, do_sample=False)
    started = model(x[:, :-1], **{name: DynamicCache(config=model.config)}, use_cache=True)
    assert torch.equal(model.generate(x, max_new_tokens=4, do_sample=False, **{name: getattr(started, name)}), plain)
    out = model.generate(x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)

@torch.no_grad()
def test_no_cache_and_two_caches(model, quiet):
    out = model(ids(), use_cache=False)
    assert out.cache is None and out.past_key_values is None and not any(n in out or out.get(n) for n in NAMES)
    assert model(ids(), cache=None, past_key_values=None).logits.shape == (2, 9, 96)
    a, b = (model(ids()[:, :5], use_cache=True).cache for _ in range(2))
    with pytest.raises(ValueError, match='cache and past_key_values name the same thing: give one of them'): model(ids()[:, 5:], cache=a, past_key_values=b)
    with pytest.raises(ValueError, match='give one of them'): model.generate(ids(), cache=a, past_key_values=b)
    model(ids()[:, 5:], cache=a, past_key_values=a)         # the same one twice is one

def test_an_output_can_be_written_copied_and_pickled(model, quiet):
    out = MoECausalLMOutput(logits=torch.ones(1))
    for i, n in enumerate(NAMES):
        setattr(out, n, i)
        assert out.cache == out.past_key_values == i
    assert pickle.loads(pickle.dumps(out)).past_key_values == copy.copy(out).cache == 1
    assert {f.name for f in dataclasses.fields(MoECausalLMOutput)} == {f.name for f in dataclasses.fields(MoeCausalLMOutputWithPast)}

@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_a_base_model_gets_the_name_that_it_takes(name, model, quiet):
    m, base = copy.deepcopy(model), {}
    def old(self, input_ids=None, past_key_values=None, **kwargs): return base.update(old=past_key_values) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    def new(self, input_ids=None, cache=None, **kwargs): return base.update(new=cache) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    def none(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, return_dict=True):
        return base.update(none=1) or CausalLMOutputWithPast(logits=torch.ones(2, 4, 96))
    for f in (old, new, none):
        m.base.forward = f.__get__(m.base)
        m(ids(4), **({} if f is none else {name: 'a cache'}))
    assert base == dict(old='a cache', new='a cache', none=1)

@torch.no_grad()
def test_compiled(quiet):
    m = from_scratch('dense', 'tiny', seed=0, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16, num_experts=4, top_k=2, moe_intermediate_size=16, vocab_size=96).eval()
    x, c = ids(), torch.compile(m, backend='eager')
    first = c(x[:, :5], use_cache=True)
    for n in NAMES: torch.testing.assert_close(c(x[:, 5:], **{n: copy.deepcopy(first.cache)}).logits, m(x).logits[:, 5:], atol=1e-5, rtol=1e-4)

# tensors that stay in float32

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_base_keeps_no_tensor_of_our_layers_in_float32(dtype, tmp_path):
    base = AutoConfig.for_model('deepseek_v3', vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
                                kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2)
    m = from_scratch('sharede_v3', 'tiny', base=base, seed=0, num_experts=4, top_k=2, shared_gate=True, expert_bias=True, moe_intermediate_size=16).eval().to(dtype)
    m.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = lambda m: {n: t.dtype for n, t in m.state_dict().items()}
    assert kinds(back) == kinds(m) and {n.rpartition('.')[2] for n, t in kinds(m).items() if t != dtype} == {'expert_bias'}
    assert torch.equal(back(ids()).logits, m(ids()).logits)
    smoe = from_scratch('smoe', 'tiny', base=base, seed=0, num_experts=4, top_k=2, moe_intermediate_size=16)
    assert not smoe._keep_in_fp32_modules_strict          # nothing of that name there
